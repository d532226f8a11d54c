"""Batches planned by lengths alone."""

from collections import Counter
from itertools import islice

import pytest

from stage2_student.data.batch_plan import BatchPlan, plan_batches
from stage2_student.data.encode import TOO_LONG
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
