"""Sequences in groups of like length."""

import random

import pytest

from pipeline.runtime.padding import padded_groups


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_each_sequence_once_the_longest_first_and_no_more_tokens_than_asked_for(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(0, 60))]
    limit = rng.choice([1, 20, 64, 200])
    groups = padded_groups(lengths, limit)
    order = [index for group in groups for index in group]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        longest = lengths[group[0]]
        assert len(group) == 1 or longest * len(group) <= limit
        assert after is None or longest * (len(group) + 1) > limit  # as full as can be
