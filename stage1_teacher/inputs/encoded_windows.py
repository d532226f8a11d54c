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
        segments: the supervised parts, at least one; END is supervised only at the span's end.
        num_prefix: number of bytes that the tokenizer put before the text.
    """

    first: int
    tokens: list[int]
    covered_bytes: bytes
    start: int
    segments: tuple[Segment, ...]
    num_prefix: int

    @property
    def end(self) -> int:
        """Byte offset in the record at which the span ends."""
        return self.start + len(self.covered_bytes) - self.num_prefix

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """Ranges of its positions that are supervised, counted from the first covered byte."""
        shift = self.num_prefix - self.start
        return tuple((s.start + shift, s.start + shift + s.num_positions) for s in self.segments)


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
        return sum(segment.length for segment in self.segments)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The supervised parts of the record; empty for one that is context alone, which the engine is not given."""
        return tuple(segment for span in self.spans for segment in span.segments)


def cut_document(document: Document, tokenizer: ByteTokenizer, max_tokens: int, overlap: int) -> list[EncodedWindow]:
    """Cut a document into windows and encode them. Raises SpellingError if the tokens do not spell the bytes."""
    budget = max_tokens - 1  # the start token takes one
    tokens = tokenizer.encode(document.text)
    if len(tokens) <= budget:
        bounds = Window(0, len(document.text), 0, True)
        return [_cut_window(document, bounds, tokens, tokenizer)]
    lengths = spelled_lengths(tokenizer, tokens)
    all_bounds = cut_windows(document.text, lengths, lambda part: len(tokenizer.encode(part)), budget, overlap)
    encoded = [tokenizer.encode(document.text[bounds.start : bounds.end]) for bounds in all_bounds]
    return [_cut_window(document, *window, tokenizer) for window in zip(all_bounds, encoded, strict=True)]


def _cut_window(document: Document, bounds: Window, tokens: list[int], tokenizer: ByteTokenizer) -> EncodedWindow:
    """Make a window of a document, which supervises what both its bounds and the document do."""
    start, text = bounds.supervised, document.text[bounds.start : bounds.end]
    supervised = (Segment(0, len(document.text), True),) if document.segments is None else document.segments
    clipped = ((max(s.start, start), min(s.start + s.length, bounds.end), s.has_end) for s in supervised)
    segments = tuple(
        Segment(first - bounds.start, last - first, has_end and bounds.has_end)
        for first, last, has_end in clipped
        if first < last or (first == last and has_end and bounds.has_end)  # the END alone
    )
    return text_window(document.doc_id, bounds, text, tokens, tokenizer.prefix, segments)


def text_window(
    doc_id: str, bounds: Window, text: bytes, tokens: list[int], prefix: bytes, segments: tuple[Segment, ...]
) -> EncodedWindow:
    """Make a window of plain text: all its tokens are covered, and the targets of `segments` are kept.

    A window without segments has no span.
    """
    span = CoveredSpan(0, tokens, prefix + text, 0, segments, len(prefix))
    return EncodedWindow(doc_id, bounds, text, tokens, (span,) if segments else ())


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
