"""Which documents make each global batch: the same in any world, and known without reading a document.

Where we are is a value, `Position`, handed out with each batch; a checkpoint stores it and nothing else is needed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stage2_student.data.encode import TOO_LONG
from stage2_student.data.order import START, VERSION, Order, Place, Position
from stage2_student.data.token_counts import Lengths


class Planned(NamedTuple):
    """A record, or a piece of one, that will be trained on."""

    place: Place
    num_tokens: int  # the start token included: what the student's forward pass sees


@dataclass(frozen=True)
class BatchPlan:
    """The documents of one optimizer step over all ranks, and what was left out while they were gathered."""

    documents: tuple[Planned, ...]
    after: Position
    window: tuple[int, int]  # epoch and number of the window in which `after` lies: all before it are planned
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
    """Documents in order until they hold at least `batch_tokens` student tokens; without end.

    Args:
        version: of the order, as `Order` has it.
    Raises:
        ValueError: none of the records can be used, with the reasons.
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
        places = np.stack([lane_W, at_W, shard_W, row_W, piece_W], axis=1).tolist()
        for index in range(max(start.record - before, 0) if epoch == start.epoch else 0, len(tokens_W)):
            tokens = tokens_W[index]
            if not 0 < tokens <= max_tokens:
                left_out[lengths.reasons.get(int(first_S[shard_W[index]] + unit_W[index]), TOO_LONG)] += 1
                continue
            documents.append(Planned(Place(epoch, number, *places[index]), tokens))
            num_tokens += tokens
            if num_tokens >= batch_tokens:
                next_window = (epoch, number + (index + 1 == len(tokens_W)))
                yield BatchPlan(tuple(documents), Position(epoch, before + index + 1), next_window, left_out)
                documents, left_out, num_tokens = [], Counter(), 0


def repeated(tokens: int, batch_tokens: int) -> str | None:
    """What to say of a step that is larger than all there is to learn from; None where it is not."""
    if tokens >= batch_tokens:
        return None
    return (
        f"train.batch_tokens is {batch_tokens:,}, and all usable records together have {tokens:,} tokens: each is in every step some "
        f"{batch_tokens / tokens:.1f} times. Give train.batch_tokens={tokens:,} or less, or dump more text"
    )


def _check_usable(lengths: Lengths, max_tokens: int) -> None:
    if lengths.usable(max_tokens).any():
        return
    left_out = Counter(lengths.reasons.values())
    left_out[TOO_LONG] += int((lengths.tokens_U > max_tokens).sum())
    raise ValueError(
        f"no record of the dump can be used: {dict(+left_out)}; change the student's tokenizer or train.max_tokens"
    )
