"""A sample of `tests.bench.fuzz`: random damage is refused in words."""

from pathlib import Path

import pytest

from tests.fuzz import TARGETS, accepted


@pytest.mark.parametrize("target", TARGETS)
def test_random_damage_is_refused_in_words_or_does_no_harm(target: str, tmp_path: Path) -> None:
    taken = [accepted(target, seed, tmp_path) for seed in range(150)]
    assert any(taken) and not all(taken)
