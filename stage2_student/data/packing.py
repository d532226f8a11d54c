"""Which documents of a global batch run together: rows of a forward pass, with a document each or packed one after
another.

Packed documents share a row, and nothing else: positions begin again at 0 with each, and transformers' mask functions
keep attention inside a document where they do (`find_packed_sequence_indices`). Whether all layers of a model heed that
is asked of the model itself.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from pipeline.runtime.padding import padded_groups

Rows = list[list[int]]  # of a micro-batch: the documents of each row, by index
Packing = Literal["auto", "on", "off"]

PAYS_ABOVE = 0.1  # share of its tokens that packing must save a step
CLOSE = 1 / 16  # how near to the smallest limit on a micro-batch is near enough


def plan_micro_batches(
    lengths: Sequence[int], micro_batch_tokens: int, world: int, packing: Packing = "off"
) -> list[list[Rows]]:
    """The micro-batches of each rank: `plan[rank][micro_batch]`.

    Documents of like length share a micro-batch of at most `micro_batch_tokens`, padding included; one longer than that
    stands alone. Every rank gets the same number of micro-batches, as few as can be, those side by side of like size:
    each rank waits for the largest. The last of some may be empty.

    Args:
        packing: of documents into rows as long as a micro-batch's longest; `auto`: where that saves more than
            `PAYS_ABOVE`.
    """
    found = _even(_side_by_side, lengths, micro_batch_tokens, world)
    if packing != "off":
        packed = _even(_packed, lengths, micro_batch_tokens, world)
        most = 1.0 if packing == "on" else 1 - PAYS_ABOVE
        if packing == "on" or padded_tokens(lengths, packed) < most * padded_tokens(lengths, found):
            found = packed
    found += [[] for _ in range(-len(found) % world)]
    return [found[rank::world] for rank in range(world)]


def _even(
    grouped: Callable[[Sequence[int], int], list[Rows]], lengths: Sequence[int], most: int, world: int
) -> list[Rows]:
    """Of the plans with as few micro-batches a rank as `most` tokens allow, found by bisecting that limit, the one that
    takes the ranks least.
    """
    best = grouped(lengths, most)
    places = -(-len(best) // world) * world
    low, high = sum(lengths) // max(places, 1), min(most, max((_padded(lengths, rows) for rows in best), default=0))
    while high - low > max(1, high * CLOSE):
        limit = (low + high) // 2
        tried = grouped(lengths, limit)
        if len(tried) > places:
            low = limit
            continue
        high = limit
        if tokens_passed(lengths, tried, world) < tokens_passed(lengths, best, world):
            best = tried
    return best


def padded_tokens(lengths: Sequence[int], micro_batches: Sequence[Rows]) -> int:
    """Tokens that a forward pass sees, padding included."""
    return sum(_padded(lengths, rows) for rows in micro_batches)


def _padded(lengths: Sequence[int], rows: Rows) -> int:
    return len(rows) * max((sum(lengths[i] for i in row) for row in rows), default=0)


def tokens_passed(lengths: Sequence[int], micro_batches: Sequence[Rows], world: int) -> int:
    """Tokens that pass while all ranks are at work, padding included: each waits for the largest of the micro-batches
    side by side.

    Args:
        micro_batches: of all ranks, those that run side by side one after another.
    """
    sizes = [_padded(lengths, rows) for rows in micro_batches]
    return sum(max(sizes[first : first + world]) for first in range(0, len(sizes), world))


def _side_by_side(lengths: Sequence[int], limit: int) -> list[Rows]:
    return [[[index] for index in group] for group in padded_groups(lengths, limit)]


def _packed(lengths: Sequence[int], limit: int) -> list[Rows]:
    """Each document in the first row with room for it. Attention costs a row's length squared: it is that of the
    longest document.
    """
    found: list[Rows] = []
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        length = lengths[left[0]]
        rows: Rows = []
        room: list[int] = []
        most_room = 0
        later = []
        for index in left:
            if lengths[index] <= most_room:
                row = next(row for row, free in enumerate(room) if lengths[index] <= free)
                rows[row].append(index)
                room[row] -= lengths[index]
                most_room = max(room)
            elif not rows or length * (len(rows) + 1) <= limit:
                rows.append([index])
                room.append(length - lengths[index])
                most_room = max(most_room, room[-1])
            else:
                later.append(index)
        found.append(rows)
        left = later
    return found


@torch.no_grad()
def packing_fault(lm: Any) -> str | None:
    """Why documents of this model, on the CPU and in float32, must have a row each; None where packing changes no state
    of theirs.
    """
    base = lm.base_model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "it takes no positions"
    if getattr(lm.config.get_text_config(), "attention_chunk_size", None):
        return "its attention goes by chunks of a row"  # longer ones than are tried here
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


def settle(lm: Any, packing: Packing, device_type: str) -> tuple[Packing, str | None]:
    """`packing`; or `off`, and a remark on why, where it was `auto` and the model cannot pack.

    On other devices than a CPU `auto` is `off`: attention of packed rows is masked, which there has a slower kernel
    than causal attention, and where that pays is not measured. Raises ValueError where it was `on` and the model cannot
    pack.
    """
    if packing == "auto" and device_type != "cpu":
        return "off", None
    fault = None if packing == "off" else packing_fault(lm)
    if fault is None:
        return packing, None
    remark = f"packed documents would not stay apart in a {lm.config.model_type}: {fault}"
    if packing == "on":
        raise ValueError(f"train.packing is on, but {remark}. Set it to auto or off.")
    return "off", f"train.packing: auto packs nothing, for {remark}"
