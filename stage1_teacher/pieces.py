"""Documents cut into what becomes one record each: windows, with the teacher's tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.corpus import Document
from pipeline.tokenizer_bytes import ByteTokenizer
from stage1_teacher.windows import Window, cut_windows


@dataclass(frozen=True)
class Piece:
    """One record to be: a window of a document with its tokens."""

    doc_id: str
    window: Window
    text: bytes
    tokens: list[int]


def cut_pieces(document: Document, tokenizer: ByteTokenizer, max_tokens: int, overlap: int) -> list[Piece]:
    """A document's windows, encoded. Raises SpellingError where the tokens do not spell the bytes."""
    budget = max_tokens - 1  # the start token takes one
    tokens = tokenizer.encode(document.text)
    if len(tokens) <= budget:
        return [Piece(document.doc_id, Window(0, len(document.text), 0, True), document.text, tokens)]
    lengths = spelled_lengths(tokenizer, tokens)
    windows = cut_windows(document.text, lengths, lambda part: len(tokenizer.encode(part)), budget, overlap)
    texts = [document.text[window.start : window.end] for window in windows]
    return [Piece(document.doc_id, w, text, tokenizer.encode(text)) for w, text in zip(windows, texts, strict=True)]


def spelled_lengths(tokenizer: ByteTokenizer, tokens: Sequence[int]) -> list[int]:
    """Bytes of the document in each token: what the tokenizer puts before the document is taken off the first."""
    lengths = [len(tokenizer.token_bytes[token] or b"") for token in tokens]
    if lengths:
        lengths[0] -= len(tokenizer.prefix)
    return lengths


def batches(pieces: Sequence[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Pieces in order, about `batch_tokens` at once: the same batches whenever the shard is made."""
    batch: list[Piece] = []
    tokens = 0
    for piece in pieces:
        if batch and tokens + len(piece.tokens) + 1 > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(piece)
        tokens += len(piece.tokens) + 1
    if batch:
        yield batch
