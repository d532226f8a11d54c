"""Documents cut into what becomes one record each: windows, with the teacher's tokens and what is asked of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.corpus.documents import Document
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.record import Segment
from stage1_teacher.inputs.windows import Window, cut_windows


@dataclass(frozen=True)
class CoveredSpan:
    """Tokens whose bytes are covered: a whole window of text, or a turn of a chat. What is before them is context.

    Attributes:
        first: tokens of the window before them.
        covered_bytes: the bytes that they spell, the tokenizer's prefix included.
        start: the first byte of the record that they spell.
        segment: what of it is supervised, to its end.
    """

    first: int
    tokens: list[int]
    covered_bytes: bytes
    start: int
    segment: Segment

    @property
    def skipped(self) -> int:
        """Positions before the segment: of the prefix, and of what an earlier window supervises."""
        return len(self.covered_bytes) - self.segment.length

    @property
    def num_prefix(self) -> int:
        """Bytes that the tokenizer put before."""
        return self.skipped - (self.segment.start - self.start)


@dataclass(frozen=True)
class EncodedWindow:
    """One record to be: a window of a document, or a chat, with its tokens.

    Attributes:
        text: the record's document.
        tokens: what the teacher reads after the start token.
        start: the start token of a chat, which its template writes; None for the teacher's own.
        roles, lengths: of a chat, who says each message, and its bytes.
        conversation: JSON, of a chat with more than contents.
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
        """Bytes; END is not one."""
        return sum(span.segment.length for span in self.spans)


def cut_document(document: Document, tokenizer: ByteTokenizer, max_tokens: int, overlap: int) -> list[EncodedWindow]:
    """A document's windows, encoded. Raises SpellingError where the tokens do not spell the bytes."""
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
    """A window of plain text: all its tokens are covered, and what the window supervises is kept."""
    start = bounds.supervised - bounds.start
    segment = Segment(start, len(text) - start, bounds.has_end)
    return EncodedWindow(doc_id, bounds, text, tokens, (CoveredSpan(0, tokens, prefix + text, 0, segment),))


def spelled_lengths(tokenizer: ByteTokenizer, tokens: Sequence[int], num_prefix: int | None = None) -> list[int]:
    """Bytes of the document in each token: what the tokenizer puts before the document is taken off the first."""
    lengths = [len(tokenizer.token_bytes[token] or b"") for token in tokens]
    if lengths:
        lengths[0] -= len(tokenizer.prefix) if num_prefix is None else num_prefix
    return lengths


def batches(windows: Sequence[EncodedWindow], batch_tokens: int) -> Iterator[list[EncodedWindow]]:
    """Pieces in order, about `batch_tokens` at once: the same batches whenever the shard is made."""
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
