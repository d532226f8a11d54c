"""The arithmetic has a number; under one number, results do not change."""

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.covering.targets import BRANCH_SURVIVAL, MAX_ODDS, doubt
from schemas import ARITHMETIC
from tests.pipeline.covering.fixed_targets import GOLDEN, fixed_covering, results

WAY_OUT = """a dump would hold other numbers than one that was begun under arithmetic {number}.
If that is meant: raise schemas.ARITHMETIC,
keep what the older numbers gave, and add the new targets with `python -m tests.pipeline.covering.fixed_targets`."""


def assert_alike(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_alike(found[key], value, f"{where}, {key}")
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12, err_msg=where)


@pytest.mark.parametrize("number", range(1, ARITHMETIC + 1))
def test_each_version_of_the_arithmetic_gives_the_targets_it_always_gave(number: int) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(golden) == [str(known) for known in range(1, ARITHMETIC + 1)], "each version has its targets"
    assert_alike(results(fixed_covering(number)), golden[str(number)], WAY_OUT.format(number=number))


@pytest.mark.parametrize(
    "constant",
    ["targets.BRANCH_SURVIVAL", "targets.MAX_ODDS", "dropped_mass.CARRIED_SHARE", "dropped_mass.PRIOR_POSITIONS"],
)
def test_a_constant_that_changes_without_the_number_is_found(monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[str(ARITHMETIC)]
    monkeypatch.setattr(f"pipeline.covering.{constant}", 0.5)
    with pytest.raises(AssertionError):
        assert_alike(results(fixed_covering(ARITHMETIC)), golden, constant)


def slow_doubt(dropped: list[float], realised: list[float], most: float) -> list[float]:
    """Compute `doubt` in fractions, which do not round."""
    lost, found = Fraction(0), []
    for share, shrinks in zip(dropped, [1.0, *realised], strict=True):
        lost = min(lost * Fraction(BRANCH_SURVIVAL) / Fraction(shrinks), Fraction(most)) if shrinks else Fraction(most)
        known = 1 - Fraction(share)
        lost = min((lost + Fraction(share)) / known, Fraction(most)) if known else Fraction(most)
        found.append(float(lost / (1 + lost)))
    return found


# Shares that round to all of it, to nearly all, and to nothing; 1e-300 is a byte that the target gives next to nothing.
SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1 - 2**-53, 1e-17]))
REALISED = st.one_of(st.floats(1e-6, 1), st.sampled_from([0.0, 1.0, 1e-300]))


@settings(max_examples=300, deadline=None)
@example([(5e-324, 1.0), (0.0, 1e-300), (0.0, 1e-300)])  # the smallest share there is comes back from below it
@example([(5e-324, 1.0), (0.0, 1.0), (0.0, 1e-300), (0.0, 1e-300), (0.0, 0.0)])
@given(st.lists(st.tuples(SHARES, REALISED), min_size=1, max_size=30))
def test_doubt_equals_its_slow_twin_whatever_is_dropped(positions: list[tuple[float, float]]) -> None:
    dropped, realised = [0.0, *(share for share, _ in positions)], [prob for _, prob in positions]
    found = doubt(np.array(dropped), np.array(realised))
    np.testing.assert_allclose(found, slow_doubt(dropped, realised, MAX_ODDS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("drop", [1.0, 1 - 2**-53])
def test_doubt_falls_again_after_a_token_that_the_teacher_gave_next_to_nothing(drop: float) -> None:
    """All known mass was dropped at byte 1; the document then continues as the target expects."""
    dropped_P, realised_P = np.array([0.0, drop, *[0.0] * 10]), np.full(11, 0.9)
    found = doubt(dropped_P, realised_P)
    assert found[1] > 0.999999 and (np.diff(found[1:]) <= 0).all() and found[-1] < 1e-6
    before = doubt(dropped_P, realised_P, arithmetic=1)
    assert before[-1] == 1.0 if drop == 1.0 else math.isclose(before[-1], found[-1], abs_tol=1e-6)
