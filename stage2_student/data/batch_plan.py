"""The documents of each global batch: the same for any world size, and known without reading a document.

A union of several corpora is read corpus by corpus, each in its own order and its own epochs. The next document comes
from the corpus that lags most behind its share of the supervised bytes, over the whole run: two corpora never differ by
more than one document of each from what their shares demand. Bytes, because the loss is divided by supervised bytes: a
share of them is a share of the loss, whatever tokens student and teachers have.

The state is one value, `Position` (of a union `UnionPosition`), handed out with each batch; a checkpoint stores it and
needs nothing else.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from stage2_student.data import order as data_order
from stage2_student.data.encode import TOO_LONG
from stage2_student.data.order import START, VERSION, Order, Position, RecordRef, ShuffleWindow
from stage2_student.data.token_counts import Lengths


class Planned(NamedTuple):
    """A record, or a piece of one, planned for training."""

    ref: RecordRef
    num_tokens: int  # including the start token: what the student's forward pass sees


class UnionPosition(NamedTuple):
    """The next piece of each corpus of a union, and the supervised bytes that each has given so far."""

    of_corpora: tuple[Position, ...]
    num_bytes: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """Return the number of epochs that every corpus has completed."""
        return min(position.epoch for position in self.of_corpora)

    @classmethod
    def start(cls, num_corpora: int) -> "UnionPosition":
        """Return the position before the first batch."""
        return cls((START,) * num_corpora, (0,) * num_corpora)


class Documents(Sequence[Planned]):
    """Planned documents, held as arrays: a large world has thousands in a step, of which a rank looks at a few.

    Args:
        refs: D x 8, int64, the columns of `RecordRef`.
        tokens_D: int64.
    """

    def __init__(self, refs: np.ndarray, tokens_D: np.ndarray) -> None:
        self._refs, self.tokens_D = refs, tokens_D

    def __len__(self) -> int:
        return len(self.tokens_D)

    @overload
    def __getitem__(self, index: int) -> Planned: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: int | slice) -> "Planned | Documents":
        if isinstance(index, slice):
            return Documents(self._refs[index], self.tokens_D[index])
        return Planned(RecordRef(*self._refs[index].tolist()), int(self.tokens_D[index]))

    def at(self, indices: np.ndarray) -> "Documents":
        """Return the documents at these indices."""
        return Documents(self._refs[indices], self.tokens_D[indices])

    @classmethod
    def joined(cls, parts: "Sequence[Documents]") -> "Documents":
        """Put documents one after another."""
        return cls(np.concatenate([p._refs for p in parts]), np.concatenate([p.tokens_D for p in parts]))


@dataclass(frozen=True)
class BatchPlan:
    """The documents of one optimizer step over all ranks, and counts of what was left out while gathering them.

    Attributes:
        windows: of each corpus, epoch and number of the window that contains `after`; all earlier ones are planned.
    """

    documents: Sequence[Planned]
    after: Position | UnionPosition
    windows: tuple[tuple[int, int], ...]
    left_out: Counter[str]

    @property
    def token_counts(self) -> np.ndarray:
        """Return the tokens of each document, int64."""
        if isinstance(self.documents, Documents):
            return self.documents.tokens_D
        return np.array([document.num_tokens for document in self.documents], dtype=np.int64)

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each document."""
        lengths: list[int] = self.token_counts.tolist()
        return lengths

    @property
    def num_tokens(self) -> int:
        return int(self.token_counts.sum())


class Share(NamedTuple):
    """A corpus of a union: its counts, and its share of the supervised bytes relative to the others' shares."""

    lengths: Lengths
    weight: float
    name: str | None = None  # None: there is no other


def plan_batches(
    lengths: Lengths,
    seed: int,
    batch_tokens: int,
    max_tokens: int,
    start: Position = START,
    version: int = VERSION,
) -> Iterator[BatchPlan]:
    """Yield documents of one corpus in order, in batches of at least `batch_tokens` student tokens, without end.

    Args:
        version: version of the order, see `Order`.
    Raises:
        ValueError: no record is usable; the message gives the reasons.
    """
    order = Order(seed, lengths.counts_S, lengths.continues_U, version)
    _check_usable(Share(lengths, 1.0), max_tokens, 1)
    first_S = np.cumsum(lengths.counts_S) - lengths.counts_S
    begun: list[Documents] = []
    num_tokens, left_out = 0, Counter[str]()
    for window in order.windows(start):
        epoch, before = window.epoch, window.first
        index_W = first_S[window.shard_W] + window.unit_W
        tokens_W = lengths.tokens_U[index_W].astype(np.int64)
        documents = Documents(_refs(window, lengths), tokens_W)
        usable_W = (tokens_W > 0) & (tokens_W <= max_tokens)
        at = max(start.record - before, 0) if epoch == start.epoch else 0
        taken_V = at + np.flatnonzero(usable_W[at:])
        up_to_V = np.cumsum(tokens_W[taken_V])
        first = passed = 0
        while (last := int(np.searchsorted(up_to_V, passed + batch_tokens - num_tokens))) < len(taken_V):
            end = int(taken_V[last]) + 1
            begun.append(documents.at(taken_V[first : last + 1]))
            left_out.update(_reasons(lengths, index_W[at:end], usable_W[at:end]))
            windows = ((epoch, window.number + (end == len(tokens_W))),)
            yield BatchPlan(Documents.joined(begun), Position(epoch, before + end), windows, left_out)
            begun, num_tokens, left_out = [], 0, Counter()
            at, first, passed = end, last + 1, int(up_to_V[last])
        if first < len(taken_V):
            begun.append(documents.at(taken_V[first:]))
            num_tokens += int(up_to_V[-1]) - passed
        left_out.update(_reasons(lengths, index_W[at:], usable_W[at:]))


def _refs(window: ShuffleWindow, lengths: Lengths) -> np.ndarray:
    """Return the columns of a window's references."""
    row_W, piece_W = lengths.rows(window.shard_W, window.unit_W)
    same = [np.full_like(row_W, value) for value in (window.epoch, window.number)]
    columns = (*same, window.lane_W, window.at_W, window.shard_W, row_W, piece_W, np.zeros_like(row_W))
    return np.stack(columns, axis=1)


def _reasons(lengths: Lengths, index_W: np.ndarray, usable_W: np.ndarray) -> list[str]:
    """Return why each piece that is not usable is left out."""
    return [lengths.reasons.get(index, TOO_LONG) for index in index_W[~usable_W].tolist()]


def plan_union(
    corpora: Sequence[Share],
    seed: int,
    batch_tokens: int,
    max_tokens: int,
    start: UnionPosition | None = None,
    version: int = VERSION,
) -> Iterator[BatchPlan]:
    """Yield documents of several corpora by their shares, in batches as `plan_batches` does.

    Raises:
        ValueError: no record of a corpus is usable, or none has a supervised byte; the message gives the reasons.
    """
    start = UnionPosition.start(len(corpora)) if start is None else start
    orders = [
        Order(seed, corpus.lengths.counts_S, corpus.lengths.continues_U, version, window_pieces)
        for corpus, window_pieces in zip(corpora, _window_pieces(corpora, max_tokens), strict=True)
    ]
    for corpus in corpora:
        _check_usable(corpus, max_tokens, len(corpora))
    taken = [
        _pieces(corpus.lengths, order, position, max_tokens)
        for corpus, order, position in zip(corpora, orders, start.of_corpora, strict=True)
    ]
    weights = [corpus.weight for corpus in corpora]
    positions, num_bytes = list(start.of_corpora), list(start.num_bytes)
    windows = [(position.epoch, 0) for position in positions]
    documents: list[Planned] = []
    left_out: Counter[str] = Counter()
    num_tokens = 0
    while True:
        number = min(range(len(corpora)), key=lambda i: num_bytes[i] / weights[i])
        piece = next(taken[number])
        documents.append(Planned(piece.ref._replace(corpus=number), piece.num_tokens))
        positions[number], windows[number] = piece.after, piece.window
        num_bytes[number] += piece.num_bytes
        num_tokens += piece.num_tokens
        left_out.update(piece.left_out)
        if num_tokens >= batch_tokens:
            after = UnionPosition(tuple(positions), tuple(num_bytes))
            yield BatchPlan(tuple(documents), after, tuple(windows), left_out)
            documents, left_out, num_tokens = [], Counter(), 0


class _Piece(NamedTuple):
    """A usable piece, the position and window after it, and the reasons of pieces left out since the one before it."""

    ref: RecordRef
    num_tokens: int
    num_bytes: int
    after: Position
    window: tuple[int, int]
    left_out: list[str]


def _pieces(lengths: Lengths, order: Order, start: Position, max_tokens: int) -> Iterator[_Piece]:
    """Yield the usable pieces of a corpus, epoch after epoch."""
    first_S = np.cumsum(lengths.counts_S) - lengths.counts_S
    left_out: list[str] = []
    for window in order.windows(start):
        epoch, number, before, lane_W, at_W, shard_W, unit_W = window
        index_W = first_S[shard_W] + unit_W
        tokens_W = lengths.tokens_U[index_W].tolist()
        bytes_W = lengths.bytes_U[index_W].tolist() if len(lengths.bytes_U) else [0] * len(tokens_W)
        row_W, piece_W = lengths.rows(shard_W, unit_W)
        refs = np.stack([lane_W, at_W, shard_W, row_W, piece_W], axis=1).tolist()
        for index in range(max(start.record - before, 0) if epoch == start.epoch else 0, len(tokens_W)):
            if not 0 < tokens_W[index] <= max_tokens:
                left_out.append(lengths.reasons.get(int(index_W[index]), TOO_LONG))
                continue
            ref = RecordRef(epoch, number, *refs[index])
            after, window_after = Position(epoch, before + index + 1), (epoch, number + (index + 1 == len(tokens_W)))
            yield _Piece(ref, tokens_W[index], bytes_W[index], after, window_after, left_out)
            left_out = []


def _window_pieces(corpora: Sequence[Share], max_tokens: int) -> list[int | None]:
    """Return the size of each corpus's windows: together as large as the window of a single corpus.

    They pass at about the same rate, so that a small share neither holds back records of the others nor has many of
    its own waiting in memory.
    """
    if len(corpora) == 1:
        return [None]
    rates = []
    for lengths, weight, _ in corpora:
        rates.append(weight * len(lengths.tokens_U) / max(lengths.sums(max_tokens).num_bytes, 1))
    return [max(1, round(data_order.WINDOW_PIECES * rate / sum(rates))) for rate in rates]


def repeated(tokens: int, batch_tokens: int) -> str | None:
    """Return a warning if a step holds more tokens than all usable records together; None otherwise."""
    if tokens >= batch_tokens:
        return None
    return (
        f"train.batch_tokens is {batch_tokens:,}, but all usable records together have only {tokens:,} tokens: "
        f"each record occurs about {batch_tokens / tokens:.1f} times in every step. "
        f"Set train.batch_tokens={tokens:,} or less, or dump more text"
    )


def _check_usable(corpus: Share, max_tokens: int, num_corpora: int) -> None:
    lengths, _, name = corpus
    sums = lengths.sums(max_tokens)
    if sums.usable and (num_corpora == 1 or sums.num_bytes):
        return
    left_out = lengths.reason_counts()
    left_out[TOO_LONG] += sums.too_long
    if sums.usable:
        raise ValueError(
            f"no byte of the corpus {name} is supervised, so it cannot have a share of each step: remove it from "
            "student.dumps"
        )
    whose = "no record of the dump can be used" if name is None else f"no record of the corpus {name} can be used"
    raise ValueError(f"{whose}: {dict(+left_out)}; change the student's tokenizer or train.max_tokens")
