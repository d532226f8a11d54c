"""Packing of a global batch: which documents share a micro-batch, and which share a row of it.

Documents packed in a row share nothing else: positions restart at 0 with each document, and transformers' mask
functions then keep attention inside a document (`find_packed_sequence_indices`). The model itself is tested for whether
all of its layers do.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from pipeline.runtime.padding import padded_groups

Rows = list[list[int]]  # the documents of each row of a micro-batch, by index
Packing = Literal["auto", "on", "off"]
Grouped = Callable[[Sequence[int], int], list[Rows]]  # micro-batches of documents, given a limit on their tokens

PAYS_ABOVE = 0.1  # packing must save more than this share of a step's tokens
CLOSE = 1 / 16  # relative precision of the bisected limit on a micro-batch


def plan_micro_batches(
    lengths: Sequence[int],
    micro_batch_tokens: int,
    world: int,
    packing: Packing = "off",
    corpora: Sequence[int] | None = None,
) -> list[list[Rows]]:
    """Plan the micro-batches of each rank: `plan[rank][micro_batch]`.

    Documents of similar length share a micro-batch of at most `micro_batch_tokens`, including padding; a longer one is
    alone. Every rank gets the same minimum number of micro-batches. Those that run side by side are similar in size,
    because each rank waits for the largest. The last ones of some ranks may be empty.

    Args:
        packing: of documents into rows as long as the micro-batch's longest; `auto`: if that saves more than
            `PAYS_ABOVE`.
        corpora: of each document; a micro-batch has documents of one corpus, so that the loss of each is known. None:
            there is only one.
    """
    packed_rows: Grouped = _packed
    if corpora is None:
        groups = _even_side_by_side(lengths, micro_batch_tokens, world)
        plan = [groups.rows(group) for group in range(len(groups.starts) - 1)]
    else:
        packed_rows = partial(_by_corpus, _packed, corpora)
        plan = _even(partial(_by_corpus, _side_by_side, corpora), lengths, micro_batch_tokens, world)
    if packing != "off":
        packed = _even(packed_rows, lengths, micro_batch_tokens, world)
        if packing == "on" or padded_tokens(lengths, packed) < (1 - PAYS_ABOVE) * padded_tokens(lengths, plan):
            plan = packed
    plan += [[] for _ in range(-len(plan) % world)]
    return [plan[rank::world] for rank in range(world)]


def own_micro_batches(lengths_D: np.ndarray, micro_batch_tokens: int, rank: int, world: int) -> list[Rows]:
    """Plan the micro-batches of one rank, without those of the others: `plan_micro_batches(...)[rank]`."""
    groups = _even_side_by_side(lengths_D, micro_batch_tokens, world)
    return [groups.rows(group) for group in range(rank, rank + len(groups.starts) - 1, world)]


def _even(grouped: Grouped, lengths: Sequence[int], max_tokens: int, world: int) -> list[Rows]:
    """Bisect the token limit and return the cheapest plan seen with the minimum number of micro-batches per rank.

    Args:
        max_tokens: the largest limit; it decides that minimum.
    """
    best = grouped(lengths, max_tokens)
    max_micro_batches = -(-len(best) // world) * world
    low = sum(lengths) // max(max_micro_batches, 1)
    high = min(max_tokens, max((_padded(lengths, rows) for rows in best), default=0))
    while high - low > max(1, high * CLOSE):
        limit = (low + high) // 2
        tried = grouped(lengths, limit)
        if len(tried) > max_micro_batches:
            low = limit
            continue
        high = limit
        if tokens_passed(lengths, tried, world) < tokens_passed(lengths, best, world):
            best = tried
    return best


class SideBySide(NamedTuple):
    """Micro-batches of one document a row: slices of the documents in the order of their lengths.

    Attributes:
        order_D: int64, the documents, the longest first.
        starts: the first of each micro-batch in that order, and their number at the end.
    """

    order_D: np.ndarray
    starts: np.ndarray

    def rows(self, group: int) -> Rows:
        """Return a micro-batch; an empty one after the last."""
        if group + 1 >= len(self.starts):
            return []
        return [[index] for index in self.order_D[self.starts[group] : self.starts[group + 1]].tolist()]


def _even_side_by_side(lengths: Sequence[int] | np.ndarray, max_tokens: int, world: int) -> SideBySide:
    """Return what `_even` does with `_side_by_side`.

    Sorted once, and by all groups of a size instead of by document: a large world has thousands of documents in a step,
    and each of its ranks plans all of them.
    """
    lengths_D = np.asarray(lengths, dtype=np.int64)
    order_D = np.argsort(-lengths_D, kind="stable")
    in_turn_D = lengths_D[order_D]
    if not len(in_turn_D):
        return SideBySide(order_D, np.zeros(1, dtype=np.int64))

    def grouped(limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where each group begins, and its tokens with padding."""
        sizes_D = np.maximum(1, limit // in_turn_D)  # of a group that begins there; they ascend
        begun, at = [], 0
        while at < len(in_turn_D):
            size = int(sizes_D[at])
            begun.append(np.arange(at, np.searchsorted(sizes_D, size, side="right"), size))
            at = int(begun[-1][-1]) + size
        starts_G = np.concatenate(begun)
        return starts_G, np.diff(starts_G, append=len(in_turn_D)) * in_turn_D[starts_G]

    def passed(sizes_G: np.ndarray) -> int:
        return int(np.maximum.reduceat(sizes_G, np.arange(0, len(sizes_G), world)).sum())

    best, sizes_G = grouped(max_tokens)
    least = passed(sizes_G)
    max_micro_batches = -(-len(best) // world) * world
    low, high = int(in_turn_D.sum()) // max(max_micro_batches, 1), min(max_tokens, int(sizes_G.max(initial=0)))
    while high - low > max(1, high * CLOSE):
        limit = (low + high) // 2
        tried, sizes_G = grouped(limit)
        if len(tried) > max_micro_batches:
            low = limit
            continue
        high = limit
        if (tokens := passed(sizes_G)) < least:
            best, least = tried, tokens
    return SideBySide(order_D, np.append(best, len(in_turn_D)))


def _by_corpus(grouped: Grouped, corpora: Sequence[int], lengths: Sequence[int], limit: int) -> list[Rows]:
    """Group the documents of each corpus, and return all micro-batches, the largest first."""
    found: list[Rows] = []
    for corpus in sorted(set(corpora)):
        own = [index for index, of in enumerate(corpora) if of == corpus]
        for rows in grouped([lengths[index] for index in own], limit):
            found.append([[own[index] for index in row] for row in rows])
    return sorted(found, key=lambda rows: -_padded(lengths, rows))


def padded_tokens(lengths: Sequence[int], micro_batches: Sequence[Rows]) -> int:
    """Count the tokens in the forward passes, including padding."""
    return sum(_padded(lengths, rows) for rows in micro_batches)


def _padded(lengths: Sequence[int], rows: Rows) -> int:
    return len(rows) * max((sum(lengths[i] for i in row) for row in rows), default=0)


def tokens_passed(lengths: Sequence[int], micro_batches: Sequence[Rows], world: int) -> int:
    """Count the tokens that pass while all ranks are at work, including padding.

    Each rank waits for the largest of the micro-batches side by side.

    Args:
        micro_batches: of all ranks: `world` of them at a time run side by side.
    """
    sizes = [_padded(lengths, rows) for rows in micro_batches]
    return sum(max(sizes[first : first + world]) for first in range(0, len(sizes), world))


def _side_by_side(lengths: Sequence[int], limit: int) -> list[Rows]:
    return [[[index] for index in group] for group in padded_groups(lengths, limit)]


def _packed(lengths: Sequence[int], limit: int) -> list[Rows]:
    """Put each document into the first row with room for it.

    A row is as long as the longest document, because attention costs a row's length squared.
    """
    packed: list[Rows] = []
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        length = lengths[left[0]]
        rows: Rows = []
        room: list[int] = []
        max_room = 0
        later = []
        for index in left:
            if lengths[index] <= max_room:
                row = next(row for row, free in enumerate(room) if lengths[index] <= free)
                rows[row].append(index)
                room[row] -= lengths[index]
                max_room = max(room)
            elif not rows or length * (len(rows) + 1) <= limit:
                rows.append([index])
                room.append(length - lengths[index])
                max_room = max(max_room, room[-1])
            else:
                later.append(index)
        packed.append(rows)
        left = later
    return packed


@torch.no_grad()
def packing_fault(lm: Any) -> str | None:
    """Return why this model cannot pack documents; None if packing changes none of their states.

    Args:
        lm: the model, on the CPU and in float32.
    """
    base = lm.base_model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "it takes no position ids"
    if getattr(lm.config.get_text_config(), "attention_chunk_size", None):
        return "its attention works on chunks of a row"  # chunks longer than the rows tried here
    documents = ([0, 1, 2], [2, 0, 1, 0])
    was_training = lm.training
    lm.eval()
    apart = [base(input_ids=torch.tensor([d]), use_cache=False).last_hidden_state[0] for d in documents]
    packed = base(
        input_ids=torch.tensor([[token for d in documents for token in d]]),
        position_ids=torch.tensor([[i for d in documents for i in range(len(d))]]),
        use_cache=False,
    ).last_hidden_state[0]
    lm.train(was_training)
    difference = float((torch.cat(apart) - packed).abs().max())
    return None if difference <= 1e-4 * float(packed.abs().max()) else f"its states differ by {difference:.2g}"


def resolve_packing(lm: Any, packing: Packing, device_type: str) -> tuple[Packing, str | None]:
    """Return `packing`, or `off` with a remark on why if it was `auto` and the model cannot pack.

    On devices other than a CPU, `auto` is `off`: attention of packed rows is masked, which has a slower kernel there
    than causal attention, and where packing still pays has not been measured.

    Raises:
        ValueError: `packing` is `on`, and the model cannot pack.
    """
    if packing == "auto" and device_type != "cpu":
        return "off", None
    fault = None if packing == "off" else packing_fault(lm)
    if fault is None:
        return packing, None
    remark = f"packed documents would influence each other in a {lm.config.model_type} model: {fault}"
    if packing == "on":
        raise ValueError(f"train.packing is on, but {remark}. Set it to auto or off.")
    return "off", f"train.packing: auto packs nothing, because {remark}"
