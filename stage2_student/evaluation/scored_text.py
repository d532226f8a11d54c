"""Which documents, and which bytes of them, models are scored on: the same for all that are compared.

A document that one of the models cannot be asked about is left out for all, by name. Nothing is left out for its
length.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from stage2_student.evaluation.spelled_text import Span, Spelled, Text, common_spans, spell

GROUP = 256  # documents encoded, and batched by length, at a time
WRITTEN_OTHERWISE = "the models' chat templates write reasoning or calls differently"
NO_COMMON_BYTE = "no bytes that all models can be asked about: their templates' tokens hold some of each answer"


class Reader(NamedTuple):
    """How a model reads text: its name, for messages, its tokenizer, its chat template (None: plain text alone), its
    start token.
    """

    name: str
    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None
    start_id: int

    @classmethod
    def load(cls, name: str, source: ModelSource, start: str | None, chats: bool) -> "Reader":
        """Load what a model reads by; `start` is a token's name, None the tokenizer's own.

        Raises ValueError for a tokenizer without start token; with `chats`, for one without chat template.
        """
        chat = ChatTokenizer.load(source) if chats else None
        tokenizer = ByteTokenizer.load(source) if chat is None else chat.tokenizer
        start_id = tokenizer.token_id(start) if start else tokenizer.default_start
        if start_id is None:
            raise ValueError(f"{source.source}: its tokenizer has no start token; name one with --start")
        return cls(name, tokenizer, chat, start_id)

    def end_ids(self, end: str | tuple[str, ...] | None) -> tuple[int, ...]:
        """The tokens that mean END: `end` by name, or the tokenizer's own; in a chat what the template writes after a
        turn, and `end`.

        Raises ValueError where there is none.
        """
        named: tuple[int | None, ...] = tuple(
            self.tokenizer.token_id(name) for name in ((end,) if isinstance(end, str) else end or ())
        )
        if self.chat is not None:
            named = (self.chat.end_of_turn(), *named)
        elif not named:
            named = (self.tokenizer.default_end,)
        found = tuple(dict.fromkeys(token for token in named if token is not None))
        if not found:
            raise ValueError(f"{self.name}: its tokenizer has no end token; name one with --end")
        return found

    def spell(self, documents: Sequence[Text]) -> Iterator[Spelled | str]:
        return spell(documents, self.tokenizer, self.start_id, self.chat)


@dataclass
class ScoredText:
    """What is scored of some documents.

    Attributes:
        reasons: why a document is left out, by its number.
        parts: the spans of those of which not all that a model can be asked about is scored, by number.
        num_documents, num_bytes: that are scored.
        sha256: of the documents and spans that are scored: figures of unlike text do not compare.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    parts: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    num_documents: int = 0
    num_bytes: int = 0
    sha256: str = ""

    def spans(self, number: int, spelled: Spelled) -> tuple[Span, ...]:
        """What is scored of a document; empty for one that is left out."""
        return () if number in self.reasons else self.parts.get(number, spelled.spans)

    @property
    def left_out(self) -> dict[str, int]:
        """Documents by reason."""
        return dict(Counter(self.reasons.values()))

    def first_left_out(self) -> dict[str, int]:
        """Of each reason the number of the first document."""
        return {reason: number for number, reason in reversed(self.reasons.items())}


def scored_text(documents: Iterable[Text], readers: Sequence[Reader]) -> ScoredText:
    """What all readers can be asked about. Raises ValueError where that is nothing."""
    found, digest = ScoredText(), hashlib.sha256()
    stream, number = iter(documents), 0
    while group := list(islice(stream, GROUP)):
        for document, *spelled in zip(group, *(reader.spell(group) for reader in readers), strict=True):
            spans = _common(spelled, readers)
            if isinstance(spans, str):
                found.reasons[number] = spans
            else:
                if any(isinstance(one, Spelled) and one.spans != spans for one in spelled):
                    found.parts[number] = spans
                found.num_documents += 1
                found.num_bytes += sum(end - start for start, end in spans)
                written = spelled[0].contents if isinstance(spelled[0], Spelled) else b""
                digest.update(f"{document!r}{spans!r}\n".encode() + written)
            number += 1
    if not found.num_bytes:
        raise ValueError(f"no text to evaluate: left out {found.left_out}")
    found.sha256 = digest.hexdigest()
    return found


def _common(spelled: Sequence[Spelled | str], readers: Sequence[Reader]) -> tuple[Span, ...] | str:
    """The spans to score, or the first reason why there is none; among several models it says whose."""
    for one, reader in zip(spelled, readers, strict=True):
        if isinstance(one, str):
            return one if len(readers) == 1 else f"{reader.name}: {one}"
    good = [one for one in spelled if isinstance(one, Spelled)]
    if len({one.contents for one in good}) > 1:
        return WRITTEN_OTHERWISE
    return common_spans(good) or NO_COMMON_BYTE
