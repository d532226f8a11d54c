"""Windows of a document with the teacher's tokens, and the spans of them that are covered; each becomes one record."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.corpus.documents import Document
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.record import Segment
from stage1_teacher.inputs.windows import Window, cut_windows


@dataclass(frozen=True)
class CoveredSpan:
    """Tokens whose bytes are covered: a whole window of text, or a turn of a chat. Tokens before them are context.

    Attributes:
        first: number of the window's tokens before the span.
        covered_bytes: the bytes spelled by the tokens, including the tokenizer's prefix.
        start: byte offset in the record at which the span begins.
        segment: the supervised part, which extends to the span's end.
    """

    first: int
    tokens: list[int]
    covered_bytes: bytes
    start: int
    segment: Segment

    @property
    def skipped(self) -> int:
        """Number of positions before the segment: those of the prefix, and those supervised by an earlier window."""
        return len(self.covered_bytes) - self.segment.length

    @property
    def num_prefix(self) -> int:
        """Number of bytes that the tokenizer put before the text."""
        return self.skipped - (self.segment.start - self.start)


@dataclass(frozen=True)
class EncodedWindow:
    """A future record: a window of a document, or a chat, with its tokens.

    Attributes:
        text: the record's document.
        tokens: the teacher's input after the start token.
        start: the start token of a chat, which its template writes; None for the teacher's own.
        roles, lengths: for a chat, the role and the number of bytes of each message.
        conversation: JSON, for a chat that has more than contents.
    """

    doc_id: str
    bounds: Window
    text: bytes
    tokens: list[int]
    spans: tuple[CoveredSpan, ...]
    start: int | None = None
    roles: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    conversation: str = ""

    @property
    def num_supervised(self) -> int:
        """Number of supervised bytes; END is not one."""
        return sum(span.segment.length for span in self.spans)


def cut_document(document: Document, tokenizer: ByteTokenizer, max_tokens: int, overlap: int) -> list[EncodedWindow]:
    """Cut a document into windows and encode them. Raises SpellingError if the tokens do not spell the bytes."""
    budget = max_tokens - 1  # the start token takes one
    tokens = tokenizer.encode(document.text)
    if len(tokens) <= budget:
        bounds = Window(0, len(document.text), 0, True)
        return [text_window(document.doc_id, bounds, document.text, tokens, tokenizer.prefix)]
    lengths = spelled_lengths(tokenizer, tokens)
    all_bounds = cut_windows(document.text, lengths, lambda part: len(tokenizer.encode(part)), budget, overlap)
    texts = [document.text[bounds.start : bounds.end] for bounds in all_bounds]
    return [
        text_window(document.doc_id, bounds, text, tokenizer.encode(text), tokenizer.prefix)
        for bounds, text in zip(all_bounds, texts, strict=True)
    ]


def text_window(doc_id: str, bounds: Window, text: bytes, tokens: list[int], prefix: bytes) -> EncodedWindow:
    """Make a window of plain text: all its tokens are covered, and what its bounds supervise is kept."""
    start = bounds.supervised - bounds.start
    segment = Segment(start, len(text) - start, bounds.has_end)
    return EncodedWindow(doc_id, bounds, text, tokens, (CoveredSpan(0, tokens, prefix + text, 0, segment),))


def spelled_lengths(tokenizer: ByteTokenizer, tokens: Sequence[int], num_prefix: int | None = None) -> list[int]:
    """Return the document's bytes in each token; the tokenizer's prefix is subtracted from the first."""
    lengths = [len(tokenizer.token_bytes[token] or b"") for token in tokens]
    if lengths:
        lengths[0] -= len(tokenizer.prefix) if num_prefix is None else num_prefix
    return lengths


def token_lengths(tokenizer: ByteTokenizer) -> np.ndarray:
    """Return the bytes of each token id, int64; 0 for one that spells nothing."""
    return np.array([len(spelled or b"") for spelled in tokenizer.token_bytes], dtype=np.int64)


def batches(windows: Iterable[EncodedWindow], batch_tokens: int) -> Iterator[list[EncodedWindow]]:
    """Yield the windows in order, in batches of about `batch_tokens`; the same whenever the shard is made."""
    batch: list[EncodedWindow] = []
    tokens = 0
    for window in windows:
        if batch and tokens + len(window.tokens) + 1 > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(window)
        tokens += len(window.tokens) + 1
    if batch:
        yield batch
