"""Sparse targets against the slow and obvious selection."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.reduction.sparsify import sparsify


def random_probs(seed: int, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits_PV = rng.normal(size=(num_positions, 256)) * 4
    probs_PV = np.exp(logits_PV) / np.exp(logits_PV).sum(axis=1, keepdims=True)
    return probs_PV, rng.integers(0, 256, size=num_positions).astype(np.uint8)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(1, 256), st.sampled_from([0.0, 1e-3, 0.2]))
def test_entries_are_the_most_probable_symbols_and_the_realised_one(
    seed: int, num_positions: int, top_k: int, min_prob: float
) -> None:
    probs_PV, realised_P = random_probs(seed, num_positions)
    counts_P, symbols_E, probs_E = sparsify(probs_PV, realised_P, top_k, min_prob)
    start = 0
    for position, count in enumerate(counts_P):
        symbols = symbols_E[start : start + count].tolist()
        ranked = sorted(range(256), key=lambda s: -probs_PV[position, s])[:top_k]
        expected = [s for s in ranked if probs_PV[position, s] >= min_prob]
        if realised_P[position] not in expected:
            expected.append(int(realised_P[position]))
        assert sorted(symbols) == sorted(expected)
        found = probs_E[start : start + count]
        assert (np.diff(found) <= 0).all()
        np.testing.assert_array_equal(found, probs_PV[position, symbols])
        start += count
    assert start == len(symbols_E) == len(probs_E)


def test_a_realised_symbol_of_probability_zero_is_kept() -> None:
    probs_PV = np.zeros((1, 256))
    probs_PV[0, 65] = 1.0
    counts_P, symbols_E, probs_E = sparsify(probs_PV, np.array([66], dtype=np.uint8), 16, 1e-3)
    assert counts_P.tolist() == [2] and symbols_E.tolist() == [65, 66] and probs_E.tolist() == [1.0, 0.0]


def test_of_equal_symbols_the_lower_are_kept_first() -> None:
    probs_PV = np.full((1, 256), 1 / 256)
    counts_P, symbols_E, _ = sparsify(probs_PV, np.array([77], dtype=np.uint8), 3, 0.0)
    assert counts_P.tolist() == [4] and symbols_E.tolist() == [0, 1, 2, 77]


def test_top_256_with_no_floor_stores_everything() -> None:
    probs_PV, realised_P = random_probs(0, 3)
    counts_P, *_ = sparsify(probs_PV, realised_P, 256, 0.0)
    assert counts_P.tolist() == [256, 256, 256]
