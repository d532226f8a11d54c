"""A sample of `tests.bench.fuzz`: random damage is refused in words."""

import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fuzz import TARGETS, accepted


@pytest.mark.parametrize("target", TARGETS)
def test_random_damage_is_refused_in_words_or_does_no_harm(target: str, tmp_path: Path) -> None:
    taken = [accepted(target, Random(seed), tmp_path) for seed in range(100)]
    assert any(taken) and not all(taken)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(rng=st.randoms())
def test_damage_that_hypothesis_draws_is_too(target: str, rng: Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        accepted(target, rng, Path(folder))
