"""The GPU's row reduction against the slow twin; run by test_reduce_triton.py in a process of its own."""

import numpy as np
import pytest
import torch

from pipeline.covering.covering import Covering, ReducedRow, exp_logits
from pipeline.covering.intervals import Intervals
from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.reduction.reducer import as_rows
from stage1_teacher.reduction.triton_kernel import TritonKernel, range_probs, top_tokens
from tests.stage1_teacher.reduction.test_reducer import assert_close, covering_of, wide_vocabulary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [1, 31, 32, 100, 4096, 4097, 9000])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_ranges_of_all_lengths_and_places_sum_to_their_probabilities(width: int, spread: float) -> None:
    rng = np.random.default_rng(width)
    logits_RC = (rng.normal(size=(3, width)) * spread).astype(np.float32)
    ends = rng.integers(0, width + 1, size=(40, 2))
    first_J = np.concatenate([ends.min(axis=1), [0, 0, width, 0]])
    last_J = np.concatenate([ends.max(axis=1), [width, 0, width, 1]])
    row_J = rng.integers(0, 3, size=len(first_J))
    shifted = np.exp(logits_RC.astype(np.float64) - logits_RC.max(axis=1, keepdims=True))
    expected = [shifted[r, a:b].sum() / shifted[r].sum() for r, a, b in zip(row_J, first_J, last_J, strict=True)]
    ranges = [torch.from_numpy(a.astype(np.int32)).to(DEVICE) for a in (row_J, first_J, last_J)]
    order_C = rng.permutation(width).astype(np.int32)
    logits_RV = np.empty_like(logits_RC)
    logits_RV[:, order_C] = logits_RC
    given = [torch.from_numpy(values).to(DEVICE) for values in (logits_RV, order_C)]
    probs_J, is_finite = range_probs(*given, *ranges)
    assert bool(is_finite)
    found = probs_J.cpu().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-34)


def test_rows_of_several_documents_equal_the_slow_twin() -> None:
    rng = np.random.default_rng(0)
    vocabulary = wide_vocabulary(rng)
    coverings = [covering_of(vocabulary, document) for document in (b"abcab", b"", b"hgfe")]
    offsets = [[0, 3, 5, 1], [0], [4, 2]]
    logits_RC = (rng.normal(size=(7, len(vocabulary.order))) * 6).astype(np.float32)
    found = reduce(vocabulary, coverings, offsets, logits_RC)
    probs_RC = exp_logits(logits_RC.astype(np.float64))
    bounds = np.cumsum([0, *map(len, offsets)])
    expected = [
        covering.reduce_rows(rows, probs_RC[first:last])
        for covering, rows, first, last in zip(coverings, offsets, bounds[:-1], bounds[1:], strict=True)
    ]
    assert_close([found], [[row for rows in expected for row in rows]], rtol=2e-5)


def reduce(
    vocabulary: Vocabulary, coverings: list[Covering], offsets: list[list[int]], logits: np.ndarray
) -> list[ReducedRow]:
    """Reduce all rows, in chunks of three."""
    intervals = Intervals.join([c.intervals(o) for c, o in zip(coverings, offsets, strict=True)])
    kernel = TritonKernel(vocabulary, torch.device(DEVICE))
    masses = kernel.empty(intervals)
    by_id = np.ascontiguousarray(logits[:, vocabulary.column])
    for first in range(0, len(logits), 3):
        kernel(torch.from_numpy(by_id[first : first + 3]).to(DEVICE), first, intervals, masses)
    kernel.check()
    return as_rows(intervals, masses.on_host())


@pytest.mark.parametrize(("num_top", "spread"), [(1, 1.0), (7, 12.0), (100, 4.0)])
def test_the_most_probable_tokens_are_those_of_a_sort_in_float64(num_top: int, spread: float) -> None:
    rng = np.random.default_rng(num_top)
    vocabulary = wide_vocabulary(rng)
    covering = covering_of(vocabulary, b"abc")
    logits_RV = (rng.normal(size=(4, len(vocabulary.order))) * spread).astype(np.float32)
    logits_RV[2] = logits_RV[2].round()  # many are equal
    kernel = TritonKernel(vocabulary, torch.device(DEVICE))
    masses = kernel.empty(covering.canonical, num_top)
    kernel(torch.from_numpy(logits_RV).to(DEVICE), 0, covering.canonical, masses)
    kernel.check()
    found = masses.on_host()
    shifted_RV = logits_RV.astype(np.float64) - logits_RV.max(axis=1, keepdims=True)
    logprobs_RV = shifted_RV - np.log(np.exp(shifted_RV).sum(axis=1, keepdims=True))
    ids = np.arange(logits_RV.shape[1])
    for row, logprobs_V in enumerate(logprobs_RV):
        expected = np.lexsort((ids, -logprobs_V))[:num_top]
        own = logprobs_V[found.top_ids_RK[row]]
        np.testing.assert_allclose(found.top_logprobs_RK[row], logprobs_V[expected], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(found.top_logprobs_RK[row], own, rtol=2e-5, atol=2e-5)
        assert (np.lexsort((found.top_ids_RK[row], -own)) == np.arange(num_top)).all()
        assert row == 2 or found.top_ids_RK[row].tolist() == expected.tolist()
    assert top_tokens(torch.zeros(1, 5), 0).shape == (1, 0)


def test_masses_far_below_1e_7_keep_their_digits_and_none_is_0() -> None:
    rng = np.random.default_rng(0)
    vocabulary = wide_vocabulary(rng)
    logits_RC = rng.normal(size=(8, len(vocabulary.order))).astype(np.float32)
    logits_RC[:, : len(vocabulary.order) // 2] -= np.float32([0, 8, 16, 24, 32, 40, 56, 300])[:, None]
    covering = covering_of(vocabulary, b"abcabca")
    found = reduce(vocabulary, [covering], [list(range(8))], logits_RC)
    expected = covering.reduce_rows(list(range(8)), exp_logits(logits_RC.astype(np.float64)))
    assert_close([found[:7]], [expected[:7]], rtol=2e-5)
    assert all((row.masses_I > 0).all() for row in found)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("column", [0, 40, 4999, None])
def test_a_row_that_is_not_finite_is_refused(bad: float, column: int | None) -> None:
    """Even where it is one logit, which is not the largest."""
    logits_RC = torch.zeros(2, 5000, device=DEVICE)
    logits_RC[1, slice(None) if column is None else column] = bad
    ranges = [torch.tensor([value], dtype=torch.int32, device=DEVICE) for value in (0, 3, 9)]
    order_C = torch.arange(5000, dtype=torch.int32, device=DEVICE)
    assert not bool(range_probs(logits_RC, order_C, *ranges)[1])


def test_a_step_with_a_logit_that_is_not_finite_is_refused_once() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    covering = covering_of(vocabulary, b"abcab")
    logits_RV = torch.zeros(3, len(vocabulary.order), device=DEVICE)
    kernel, masses = TritonKernel(vocabulary, torch.device(DEVICE)), None
    for bad in (float("nan"), 0.0):
        logits_RV[1, 7] = bad
        masses = kernel.empty(covering.canonical)
        for first in (0, 3):
            kernel(logits_RV, first, covering.canonical, masses)
        if np.isnan(bad):
            with pytest.raises(ValueError, match="logits are not finite"):
                kernel.check()
    kernel.check()
