"""Prompts as a writer reads them: token ids, and what precedes a completion of them."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipeline.config import GenerateConfig
from pipeline.corpus.documents import Document
from pipeline.tokenization.byte_tokenizer import SpellingError
from pipeline.tokenization.chat_template import ChatError
from pipeline.tokenization.conversation import Conversation
from stage1_teacher.generation.writer import Writer

TOO_LONG = "a prompt longer than generate.max_prompt_tokens"


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        doc_id: its document's.
        tokens: everything that the writer reads before it writes.
        text: of plain text; "" for a chat.
        conversation: of a chat.
        tail: the end of the template's text behind its last control token, which may open the reasoning.
    """

    doc_id: str
    tokens: tuple[int, ...]
    text: str = ""
    conversation: Conversation | None = None
    tail: str = ""


def encode_prompts(
    documents: Iterable[Document], writer: Writer, config: GenerateConfig, left_out: dict[str, str]
) -> Iterator[Prompt]:
    """Encode documents as prompts. Those that cannot be are added to `left_out`, with the reason."""
    for document in documents:
        try:
            prompt = _encode(document, writer, config)
        except (SpellingError, ChatError) as error:
            left_out[document.doc_id] = error.reason
            continue
        if len(prompt.tokens) > config.max_prompt_tokens:
            left_out[document.doc_id] = TOO_LONG
        else:
            yield prompt


def _encode(document: Document, writer: Writer, config: GenerateConfig) -> Prompt:
    if document.messages is None:
        text = _cut(document.text, config.prompts.max_bytes)
        start = () if writer.ids.start is None else (writer.ids.start,)
        tokens = writer.tokenizer.encode(text.encode())
        return Prompt(document.doc_id, (*start, *tokens), text=text)
    assert writer.chat is not None
    conversation = document.conversation or Conversation(document.messages)
    chat_tokens, tail = writer.chat.encode_prompt(conversation, config.reasoning != "none")
    return Prompt(document.doc_id, tuple(chat_tokens), conversation=conversation, tail=tail)


def _cut(text: bytes, max_bytes: int | None) -> str:
    """Return the first bytes of a text, up to the end of a character."""
    return text[:max_bytes].decode("utf-8", errors="ignore" if max_bytes is not None else "strict")


def seed_of(seed: int, doc_id: str, completion: int) -> int:
    """Return the seed of a completion: the same for its prompt's id and its number, whatever else is written."""
    text = f"{seed}\0{doc_id}\0{completion}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1  # engines take 63 bits
