"""Batches planned by lengths alone."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from stage2_student.data import order as order_module
from stage2_student.data.batch_plan import BatchPlan, Share, UnionPosition, plan_batches, plan_union
from stage2_student.data.encode import TOO_LONG
from stage2_student.data.order import Position
from stage2_student.data.token_counts import Counted, Lengths


def test_what_cannot_be_used_is_left_out_by_reason_and_nothing_at_all_is_refused() -> None:
    chat = Counted((), "not a chat")
    counts = Lengths.of(
        [[Counted((10,)), chat, Counted((300,))], [], [Counted((20,)), chat, Counted((30,))]],
    )
    batches: list[BatchPlan] = list(islice(plan_batches(counts, 0, 40, 100), 6))
    used = [document.num_tokens for batch in batches for document in batch.documents]
    epochs = batches[-1].after.epoch
    assert set(used) == {10, 20, 30} and epochs >= 2
    left_out = sum((batch.left_out for batch in batches), Counter[str]())
    assert left_out["not a chat"] >= 2 * epochs and left_out[TOO_LONG] >= epochs
    assert all(batch.num_tokens >= 40 for batch in batches)
    with pytest.raises(ValueError, match=r"no record of the dump can be used: .*'not a chat': 2, .*max_tokens': 4"):
        next(plan_batches(counts, 0, 40, 5))
    with pytest.raises(ValueError, match="none of the dump's 2 shards holds a record"):
        next(plan_batches(Lengths.of([[], []]), 0, 40, 5))


@pytest.mark.parametrize("seed", range(9))
def test_batches_planned_by_window_are_those_planned_piece_by_piece(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A union of one corpus is planned piece by piece."""
    monkeypatch.setattr(order_module, "WINDOW_PIECES", (8, 64, 2048)[seed % 3])
    rng = np.random.default_rng(seed)

    def counted() -> Counted:
        if rng.random() < 0.1:
            return Counted((), ("cannot be spelled", "strips")[int(rng.integers(2))], 5)
        return Counted(tuple(rng.integers(1, 30, rng.choice([1, 1, 2, 5])).tolist()), None, 9)

    shards = [[counted() for _ in range(int(rng.integers(0, 60)))] for _ in range(int(rng.integers(3, 30)))]
    lengths = Lengths.of(shards)
    start = Position(int(rng.integers(0, 3)), int(rng.integers(0, lengths.counts_S.sum())))
    for version in order_module.READ:
        slow = plan_union([Share(lengths, 1.0)], seed, 100, 25, UnionPosition((start,), (0,)), version)
        for ours, theirs in zip(islice(plan_batches(lengths, seed, 100, 25, start, version), 60), slow, strict=False):
            assert tuple(ours.documents) == tuple(theirs.documents) and ours.num_tokens == theirs.num_tokens
            assert (ours.windows, ours.left_out) == (theirs.windows, theirs.left_out)
            assert UnionPosition((ours.after,), theirs.after.num_bytes) == theirs.after  # type: ignore[arg-type, union-attr]
