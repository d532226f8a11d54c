"""The levels of the columns: their number and spacing, and masks they leave unchanged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import levels


def test_a_column_has_at_most_256_levels_and_shares_have_16() -> None:
    assert len(levels.LOGPROBS) <= 256 and len(levels.TOKEN_LOGPROBS) <= 256 and len(levels.STORED_SHARES) == 16
    for values in (levels.LOGPROBS, levels.OTHER_LOGPROBS, levels.TOP_LOGPROBS, levels.TOKEN_LOGPROBS):
        assert values.dtype == np.float32 and (np.diff(values) > 0).all() and values[0] == -80 and values[-1] <= 0


def test_top_levels_reach_one_and_are_even_in_the_root_of_what_lacks() -> None:
    lacks = np.sqrt(-np.expm1(levels.TOP_LOGPROBS[-50:].astype(np.float64)))
    np.testing.assert_allclose(np.diff(lacks), -1 / 200, atol=1e-5)


@given(st.lists(st.floats(0, 1), max_size=20), st.sampled_from(levels.SHARES.tolist()))
def test_a_mask_at_a_level_takes_what_it_takes_of_the_true_shares(shares: list[float], limit: float) -> None:
    true = np.array(shares)
    for stored in (levels.round_shares(true), levels.round_shares(true).astype(np.float64)):
        expected = true <= limit if limit else true < levels.LEAST_SHARE
        clear = np.abs(true - limit) > 1e-6  # float32 cannot tell nearer ones apart
        assert ((stored <= limit) == expected)[clear].all()


def test_rounded_shares_stay_where_they_are() -> None:
    np.testing.assert_array_equal(levels.round_shares(levels.STORED_SHARES), levels.STORED_SHARES)


@given(st.lists(st.floats(-200, 0), max_size=20))
def test_token_logprobs_go_to_the_nearest_level(logprobs: list[float]) -> None:
    true = np.array(logprobs)
    found = levels.round_token_logprobs(true)
    slow = [levels.TOKEN_LOGPROBS[np.abs(levels.TOKEN_LOGPROBS.astype(np.float64) - x).argmin()] for x in logprobs]
    np.testing.assert_allclose(np.abs(found - true), np.abs(np.array(slow) - true), atol=1e-5)
    inside = true > -16
    assert (np.abs(found - true)[inside] <= 0.02 * np.sqrt(-true[inside]) + 1.1e-4).all()


@pytest.mark.parametrize("value", [0.05, 0.02, 0.1])
def test_a_stored_share_is_not_above_its_decimal_number(value: float) -> None:
    assert float(levels.round_shares(np.array([value]))[0]) <= value
