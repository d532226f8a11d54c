"""Alternatives of tokens that are kept: what is probable enough, and always the text's own, as natural logs up to 0."""

import math

import numpy as np
import pytest

from schemas.levels import MIN_LOGPROB
from stage1_teacher.reduction.token_entries import TopTokens, keep_tokens

TOP = TopTokens(
    np.array([[5, 2, 7], [5, 2, 7], [1, 3, 4]], np.int32),
    np.log(np.array([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.9, 0.05, 0.01]])).astype(np.float32),
)
TOKENS, PROBS = np.array([2, 9, 4], np.int32), np.array([0.25, 1e-300, 0.01])


def test_a_token_exactly_at_the_limit_is_kept_and_the_texts_own_below_it_comes_last() -> None:
    found = keep_tokens(TOP, TOKENS, PROBS, np.array([0.5, 0.0, 1.0, 0.25]), 0.25)
    assert found.counts_T.tolist() == [2, 3, 2]
    assert found.ids_A.tolist() == [5, 2, 5, 2, 9, 1, 4]
    assert found.logprobs_A[4] == MIN_LOGPROB and found.logprobs_A[6] == pytest.approx(math.log(0.01))
    assert found.end_logprobs_R.tolist() == pytest.approx([math.log(0.5), MIN_LOGPROB, 0.0, math.log(0.25)])
    everything = keep_tokens(TOP, TOKENS, PROBS, np.full(4, 0.5), 0.0)
    assert everything.counts_T.tolist() == [3, 4, 3]


def test_a_sum_that_rounding_leaves_above_1_is_stored_as_certain() -> None:
    above = np.array([1.0 + 1e-6])
    top = TopTokens(np.array([[5]], np.int32), np.log(above)[:, None].astype(np.float32))
    found = keep_tokens(top, np.array([6], np.int32), above, np.array([1.0 + 1e-6, 0.5]), 0.5)
    assert found.logprobs_A.tolist() == [0.0, 0.0] and found.end_logprobs_R[0] == 0.0


def test_the_alternatives_of_some_tokens_leave_no_count_for_the_others() -> None:
    found = keep_tokens(TOP, TOKENS, PROBS, np.array([0.5, 0.0, 1.0, 0.25]), 0.25)
    some = found.some(np.array([True, False, True]))
    assert some.counts_T.tolist() == [2, 0, 2] and some.ids_A.tolist() == [5, 2, 1, 4]
    assert len(some.logprobs_A) == 4 and some.end_logprobs_R.tolist() == found.end_logprobs_R.tolist()
