"""The hash of a document, by which a plan knows its shards' documents."""

import hashlib
from dataclasses import dataclass

from pipeline.corpus.documents import Document


@dataclass(frozen=True)
class DigestedDocument(Document):
    """A document that another process has read: `text` has its size, but zeros in place of its content."""

    digest: bytes = b""


def document_digest(document: Document) -> bytes:
    """Return a hash of 32 bytes over id and text, each preceded by its length; for a chat, over everything said.

    Also over what is supervised, where that is not everything.
    """
    if isinstance(document, DigestedDocument):
        return document.digest
    if document.conversation is not None:
        texts = [document.conversation.to_json()]
    else:
        texts = [text for message in document.messages or () for text in message.values()]
    parts = [document.doc_id.encode(), *([document.text] if document.messages is None else map(str.encode, texts))]
    if document.segments is not None:
        parts += [b"%d %d %d" % (segment.start, segment.length, segment.has_end) for segment in document.segments]
    if document.turns is not None:
        parts += [b"turn %d" % turn for turn in document.turns]
    if not document.has_end:
        parts.append(b"cut off")
    return hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).digest()
