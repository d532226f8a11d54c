"""Sums on a device against the float64 twin on the host, for spans of several documents at once."""

import numpy as np
import pytest
import torch

from pipeline.covering.covering import Covering
from pipeline.covering.intervals import Intervals
from schemas import ARITHMETIC
from stage1_teacher.reduction.device_targets import device_targets
from stage1_teacher.reduction.device_trie import DeviceTrie
from stage1_teacher.reduction.reducer import as_rows
from stage1_teacher.reduction.sparse_targets import SpanRequest, Sparsity, reduce_span
from stage1_teacher.reduction.types import DeviceMasses, Masses
from tests.stage1_teacher.reduction.test_reducer import wide_vocabulary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_span(rng: np.random.Generator, vocabulary: object, arithmetic: int) -> tuple[Covering, SpanRequest]:
    """Draw a document of random tokens, of any lengths, and the request for some parts of it."""
    columns = rng.integers(0, vocabulary.num_text_tokens, size=rng.integers(0, 9))  # type: ignore[attr-defined]
    tokens = vocabulary.order[columns].tolist()  # type: ignore[attr-defined]
    document = b"".join(vocabulary.sorted_bytes[column] for column in columns)  # type: ignore[attr-defined]
    edges = sorted(rng.choice(len(document) + 2, size=2 * min(1 + len(document) // 4, 3), replace=False).tolist())
    covering = Covering(vocabulary, tokens, document, arithmetic)  # type: ignore[arg-type]
    return covering, SpanRequest(0, tokens, document, tuple(zip(edges[::2], edges[1::2], strict=True)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("top_k", "min_prob"), [(16, 0.001), (2, 0.05), (256, 0.0), (1, 0.9)])
def test_targets_summed_on_a_device_are_those_summed_on_the_host(seed: int, top_k: int, min_prob: float) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = wide_vocabulary(rng)
    sparsity = Sparsity(top_k, min_prob, False, ARITHMETIC if seed % 2 else 1)
    spans = [random_span(rng, vocabulary, sparsity.arithmetic) for _ in range(5)]
    intervals = Intervals.join([covering.canonical for covering, _ in spans])
    host = random_masses(rng, intervals, vocabulary.num_text_tokens)
    on_device = DeviceMasses(
        *(torch.from_numpy(of_rows.astype(np.float32)).to(DEVICE) for of_rows in host[:5]), host.row_intervals
    )
    found = device_targets(DeviceTrie.of(vocabulary.trie, DEVICE), spans, on_device, sparsity)
    rows, first = as_rows(intervals, on_device.on_host()), 0
    for of_span, (covering, request) in zip(found, spans, strict=True):
        last = first + len(covering.offsets)
        expected = reduce_span(covering, rows[first:last], request, sparsity)
        np.testing.assert_array_equal(of_span.entries.counts_P, expected.entries.counts_P)
        np.testing.assert_array_equal(of_span.entries.symbols_E, expected.entries.symbols_E)
        np.testing.assert_allclose(of_span.entries.probs_E, expected.entries.probs_E, rtol=1e-9)
        np.testing.assert_allclose(of_span.measures_MP, expected.measures_MP, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(of_span.token_logprobs, expected.token_logprobs, rtol=1e-9)
        first = last


def random_masses(rng: np.random.Generator, intervals: Intervals, num_columns: int) -> Masses:
    """Sum random rows over their intervals, in float64; most of a row is one token, down to 1e-12 of the others."""
    masses = Masses.empty(intervals)
    first_I, last_I = intervals.column_ranges()
    for row in range(intervals.num_rows):
        probs_C = rng.exponential(size=num_columns) ** 8
        column = int(intervals.columns_R[row])
        if column >= 0:
            probs_C[column] = probs_C.sum() * 10.0 ** rng.uniform(-12, 2)
        end = float(rng.exponential())
        sums_C = np.append(0.0, (probs_C / (probs_C.sum() + end)).cumsum())
        of_row = slice(int(masses.row_intervals[row]), int(masses.row_intervals[row + 1]))
        direct = [
            (probs_C[a:b] / (probs_C.sum() + end)).sum() for a, b in zip(first_I[of_row], last_I[of_row], strict=True)
        ]
        masses.masses_I[of_row] = np.maximum(direct, 1e-34)
        masses.end_R[row] = end / (probs_C.sum() + end)
        masses.token_R[row] = max(sums_C[column + 1] - sums_C[column], 1e-34) if column >= 0 else np.nan
    return masses
