"""The documents of each global batch: the same for any world size, and known without reading a document.

The state is one value, `Position`, handed out with each batch; a checkpoint stores it and needs nothing else.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stage2_student.data.encode import TOO_LONG
from stage2_student.data.order import START, VERSION, Order, Position, RecordRef
from stage2_student.data.token_counts import Lengths


class Planned(NamedTuple):
    """A record, or a piece of one, planned for training."""

    ref: RecordRef
    num_tokens: int  # including the start token: what the student's forward pass sees


@dataclass(frozen=True)
class BatchPlan:
    """The documents of one optimizer step over all ranks, and counts of what was left out while gathering them."""

    documents: tuple[Planned, ...]
    after: Position
    window: tuple[int, int]  # epoch and number of the window that contains `after`; all earlier windows are planned
    left_out: Counter[str]

    @property
    def num_tokens(self) -> int:
        return sum(document.num_tokens for document in self.documents)


def plan_batches(
    lengths: Lengths,
    seed: int,
    batch_tokens: int,
    max_tokens: int,
    start: Position = START,
    version: int = VERSION,
) -> Iterator[BatchPlan]:
    """Yield documents in order, in batches of at least `batch_tokens` student tokens, without end.

    Args:
        version: version of the order, see `Order`.
    Raises:
        ValueError: no record is usable; the message gives the reasons.
    """
    order = Order(seed, lengths.counts_S, lengths.continues_U, version)
    _check_usable(lengths, max_tokens)
    first_S = np.cumsum(lengths.counts_S) - lengths.counts_S
    documents: list[Planned] = []
    left_out: Counter[str] = Counter()
    num_tokens = 0
    for window in order.windows(start):
        epoch, number, before, lane_W, at_W, shard_W, unit_W = window
        tokens_W = lengths.tokens_U[first_S[shard_W] + unit_W].tolist()
        row_W, piece_W = lengths.rows(shard_W, unit_W)
        refs = np.stack([lane_W, at_W, shard_W, row_W, piece_W], axis=1).tolist()
        for index in range(max(start.record - before, 0) if epoch == start.epoch else 0, len(tokens_W)):
            tokens = tokens_W[index]
            if not 0 < tokens <= max_tokens:
                left_out[lengths.reasons.get(int(first_S[shard_W[index]] + unit_W[index]), TOO_LONG)] += 1
                continue
            documents.append(Planned(RecordRef(epoch, number, *refs[index]), tokens))
            num_tokens += tokens
            if num_tokens >= batch_tokens:
                next_window = (epoch, number + (index + 1 == len(tokens_W)))
                yield BatchPlan(tuple(documents), Position(epoch, before + index + 1), next_window, left_out)
                documents, left_out, num_tokens = [], Counter(), 0


def repeated(tokens: int, batch_tokens: int) -> str | None:
    """Return a warning if a step holds more tokens than all usable records together; None otherwise."""
    if tokens >= batch_tokens:
        return None
    return (
        f"train.batch_tokens is {batch_tokens:,}, but all usable records together have only {tokens:,} tokens: "
        f"each record occurs about {batch_tokens / tokens:.1f} times in every step. "
        f"Set train.batch_tokens={tokens:,} or less, or dump more text"
    )


def _check_usable(lengths: Lengths, max_tokens: int) -> None:
    if lengths.usable(max_tokens).any():
        return
    left_out = Counter(lengths.reasons.values())
    left_out[TOO_LONG] += int((lengths.tokens_U > max_tokens).sum())
    raise ValueError(
        f"no record of the dump can be used: {dict(+left_out)}; change the student's tokenizer or train.max_tokens"
    )
