"""Distances of stored alternatives from a model's own distributions, against loops over tokens."""

import numpy as np
import pytest

from schemas.token_alternatives import TokenAlternatives
from stage1_teacher.targets.own_alternatives import differences

ENDS = (3, 7)


def own_rows(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    logits_RV = 2 * rng.normal(size=(num_rows, 30))
    return np.asarray(logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True)))


def stored(own_RV: np.ndarray, top_k: int) -> TokenAlternatives:
    """Store the most probable tokens of all rows but the last, behind an entry that has none."""
    ids = [np.argsort(-own_V)[:top_k] for own_V in own_RV[:-1]]
    logprobs = np.concatenate([own_V[of] for own_V, of in zip(own_RV, ids, strict=False)])
    ends = np.log(np.exp(own_RV[:, list(ENDS)]).sum(axis=1))
    return TokenAlternatives(
        np.array([0, *(top_k * np.arange(len(own_RV)))]),
        np.concatenate(ids).astype(np.int32),
        logprobs.astype(np.float32),
        np.array([-1, *(of[0] for of in ids)], dtype=np.int32),
        np.zeros(len(own_RV), np.float32),
        np.array([np.nan, *ends], dtype=np.float32),
    )


def kl(own: list[float], other: list[float]) -> float:
    return sum(p * np.log(max(p, 1e-4) / max(q, 1e-4)) for p, q in zip(own, other, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_a_loop_and_vanish_for_the_models_own(seed: int) -> None:
    rng = np.random.default_rng(seed)
    own_RV, other_RV = own_rows(rng, 6), own_rows(rng, 6)
    np.testing.assert_allclose(differences(stored(own_RV, 5), 1, own_RV, ENDS), 0, atol=1e-5)
    tokens = stored(other_RV, 5)
    found = differences(tokens, 1, own_RV, ENDS)
    expected = []
    for row in range(5):
        ids = tokens.ids[5 * row : 5 * row + 5]
        own, other = (list(np.exp(rows[row][ids])) for rows in (own_RV, other_RV))
        expected.append(kl([*own, 1 - sum(own)], [*other, 1 - sum(other)]))
    for row in range(6):
        own_end, other_end = (float(np.exp(rows[row][list(ENDS)]).sum()) for rows in (own_RV, other_RV))
        expected[min(row, 4)] += kl([own_end, 1 - own_end], [other_end, 1 - other_end])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.mean() > 0.05
