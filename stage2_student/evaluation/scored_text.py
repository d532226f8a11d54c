"""The documents, and the bytes of them, that models are scored on: the same for all that are compared.

A document that is unusable for one of the models is left out for all, and the model is named. No document is left out
for its length.
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
    """The parts of a model that read text.

    Attributes:
        name: the model's, for messages.
        tokenizer: its tokenizer.
        chat: its chat template; None: it reads plain text only.
        start_id: its start token.
    """

    name: str
    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None
    start_id: int

    @classmethod
    def load(cls, name: str, source: ModelSource, start: str | None, chats: bool) -> "Reader":
        """Load a model's tokenizer; `start` is a token's name, None the tokenizer's own.

        Raises:
            ValueError: the tokenizer has no start token, or with `chats`, no chat template.
        """
        chat = ChatTokenizer.load(source) if chats else None
        tokenizer = ByteTokenizer.load(source) if chat is None else chat.tokenizer
        start_id = tokenizer.token_id(start) if start else tokenizer.default_start
        if start_id is None:
            raise ValueError(f"{source.source}: its tokenizer has no start token; name one with --start")
        return cls(name, tokenizer, chat, start_id)

    def end_ids(self, end: str | tuple[str, ...] | None) -> tuple[int, ...]:
        """Return the tokens that mean END: `end` by name, or the tokenizer's own.

        In a chat, the token that the template writes after a turn, and `end`.

        Raises:
            ValueError: there is none.
        """
        named: tuple[int | None, ...] = tuple(
            self.tokenizer.token_id(name) for name in ((end,) if isinstance(end, str) else end or ())
        )
        if self.chat is not None:
            named = (self.chat.end_of_turn(), *named)
        elif not named:
            named = (self.tokenizer.default_end,)
        ids = tuple(dict.fromkeys(token for token in named if token is not None))
        if not ids:
            raise ValueError(f"{self.name}: its tokenizer has no end token; name one with --end")
        return ids

    def spell(self, documents: Sequence[Text]) -> Iterator[Spelled | str]:
        return spell(documents, self.tokenizer, self.start_id, self.chat)


@dataclass
class ScoredText:
    """The parts of some documents that are scored.

    Attributes:
        reasons: document number -> why it is left out.
        parts: document number -> the spans scored, for documents where that is not everything a model could be scored
            on.
        num_documents, num_bytes: of the scored text.
        sha256: hash of the scored documents and spans: figures on different text are not comparable.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    parts: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    num_documents: int = 0
    num_bytes: int = 0
    sha256: str = ""

    def spans(self, number: int, spelled: Spelled) -> tuple[Span, ...]:
        """Return the spans scored in a document; none if it is left out."""
        return () if number in self.reasons else self.parts.get(number, spelled.spans)

    @property
    def left_out(self) -> dict[str, int]:
        """Number of documents left out, by reason."""
        return dict(Counter(self.reasons.values()))

    def first_left_out(self) -> dict[str, int]:
        """Return the number of the first document left out for each reason."""
        return {reason: number for number, reason in reversed(self.reasons.items())}


def scored_text(documents: Iterable[Text], readers: Sequence[Reader]) -> ScoredText:
    """Find the text that can be scored by all readers.

    Raises:
        ValueError: there is none.
    """
    text, digest = ScoredText(), hashlib.sha256()
    stream, number = iter(documents), 0
    while group := list(islice(stream, GROUP)):
        for document, *spelled in zip(group, *(reader.spell(group) for reader in readers), strict=True):
            spans = _common(spelled, readers)
            if isinstance(spans, str):
                text.reasons[number] = spans
            else:
                if any(isinstance(one, Spelled) and one.spans != spans for one in spelled):
                    text.parts[number] = spans
                text.num_documents += 1
                text.num_bytes += sum(end - start for start, end in spans)
                written = spelled[0].contents if isinstance(spelled[0], Spelled) else b""
                digest.update(f"{document!r}{spans!r}\n".encode() + written)
            number += 1
    if not text.num_bytes:
        raise ValueError(f"no text to evaluate: left out {text.left_out}")
    text.sha256 = digest.hexdigest()
    return text


def _common(spelled: Sequence[Spelled | str], readers: Sequence[Reader]) -> tuple[Span, ...] | str:
    """Return the spans to score, or the first reason why there are none.

    With several models, the reason names the model.
    """
    for one, reader in zip(spelled, readers, strict=True):
        if isinstance(one, str):
            return one if len(readers) == 1 else f"{reader.name}: {one}"
    good = [one for one in spelled if isinstance(one, Spelled)]
    if len({one.contents for one in good}) > 1:
        return WRITTEN_OTHERWISE
    return common_spans(good) or NO_COMMON_BYTE
