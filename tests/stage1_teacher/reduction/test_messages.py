"""Requests and answers between a dump and its engine's workers, against the float64 twin of what happens between."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from pipeline.covering.covering import Covering, exp_logits
from pipeline.covering.dropped_mass import redistribute
from pipeline.covering.intervals import Intervals
from pipeline.covering.vocabulary import Vocabulary
from schemas import ARITHMETIC
from schemas.columns import MEASURES
from stage1_teacher.reduction.device_trie import DeviceTrie
from stage1_teacher.reduction.messages import (
    Answering,
    read_masses,
    read_spans,
    rows_message,
    spans_message,
    sum_on_device,
)
from stage1_teacher.reduction.reducer import ComputedRows, CpuKernel
from stage1_teacher.reduction.sparse_targets import SpanRequest, Sparsity, sparse_targets
from stage1_teacher.reduction.token_entries import TokenEntries
from stage1_teacher.reduction.types import DeviceMasses, Masses, RowsAlong
from tests.stage1_teacher.reduction.test_reducer import WIDTH, covering_of, reducer_of, wide_vocabulary

Travel = Any  # plain values, as they arrive


def travel(message: dict[str, Any]) -> Travel:
    """Send a message as vLLM does, where lists come out of tuples."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


class OnDevice(CpuKernel):
    """A kernel whose masses stay on a device, as a GPU's do."""

    def empty(self, intervals: Intervals, num_top: int = 0) -> DeviceMasses:  # type: ignore[override]
        return DeviceMasses.empty(intervals, num_top, torch.device("cpu"))

    def __call__(self, logits_RV: torch.Tensor, first_row: int, intervals: Intervals, into: Any) -> None:
        rows = intervals.some_rows(first_row, first_row + len(logits_RV))
        num_top = into.top_ids_RK.shape[1]
        masses = Masses.empty(rows, num_top)
        super().__call__(logits_RV, 0, rows, masses)
        part = into.some_rows(first_row, first_row + len(logits_RV), num_top)
        for on_device, on_host in zip(part[:5], masses[:5], strict=True):
            on_device[:] = torch.from_numpy(on_host)


def answer(
    message: dict[str, Any], vocabulary: Vocabulary, logits_RV: np.ndarray, chunk: int = 3, on_device: bool = False
) -> bytes:
    """Answer a message as a worker does that computes a prompt in steps of four tokens."""
    answering, reducer = Answering(travel(message), vocabulary), reducer_of(vocabulary, chunk)
    if on_device:
        reducer.kernel = OnDevice(vocabulary)
    for begin in range(0, len(logits_RV), 4):
        start, stop = answering.rows.between(begin, begin + 4)
        states_RV = torch.from_numpy(logits_RV[answering.rows.index_R[start:stop]])
        reducer.reduce([ComputedRows(answering.rows, start, states_RV)], lambda states_RV: states_RV)
    if on_device:
        sum_on_device([answering], DeviceTrie.of(vocabulary.trie, torch.device("cpu")))
    return answering.bytes()


def spans_of(coverings: list[Covering], first: int) -> list[SpanRequest]:
    """Request parts of documents, one behind another in a prompt, of one byte a token."""
    spans = []
    for covering in coverings:
        ids = covering.vocabulary.order[covering.canonical.columns_R[:-1]].tolist()
        size = len(covering.document)
        kept = ((1, size + 1),) if len(spans) % 2 else ((0, 1), (size - 1, size))
        spans.append(SpanRequest(first, ids, covering.document, kept if size else ((0, 1),)))
        first += len(ids) + 2
    return spans


@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(16, 0.01, False, ARITHMETIC),
        Sparsity(3, 0.1, True, ARITHMETIC),
        Sparsity(256, 0.0, False, ARITHMETIC),
        Sparsity(5, 0.0, False, 1),
        Sparsity(16, 0.04, False, ARITHMETIC, 16, 0.001),
        Sparsity(8, 0.04, True, ARITHMETIC, 3, 0.3),
    ],
)
@pytest.mark.parametrize("on_device", [False, True])
def test_sparse_targets_that_a_worker_sums_are_those_of_the_float64_twin(sparsity: Sparsity, on_device: bool) -> None:
    rng = np.random.default_rng(sparsity.top_k)
    vocabulary = wide_vocabulary(rng)
    documents = [bytes(rng.choice(list(b"abcdefgh"), size=size).tolist()) for size in (7, 2, 11, 0)]
    coverings = [
        Covering(vocabulary, tokens, document, sparsity.arithmetic)
        for document in documents
        for tokens in [vocabulary.order[covering_of(vocabulary, document).canonical.columns_R[:-1]].tolist()]
    ]
    spans = spans_of(coverings, 2)
    logits_RV = (4 * rng.normal(size=(40, WIDTH))).astype(np.float32)
    found = read_spans(answer(spans_message(spans, sparsity), vocabulary, logits_RV, on_device=on_device))
    assert len(found) == len(spans)
    for of_span, span, covering in zip(found, spans, coverings, strict=True):
        rows_RV = logits_RV[span.first : span.first + len(span.tokens) + 1].astype(np.float64)
        rows = covering.reduce_rows(covering.offsets, exp_logits(rows_RV[:, vocabulary.order]))
        targets = covering.targets(rows)
        summed = redistribute(targets, covering) if sparsity.redistribute else targets
        check_tokens(of_span.tokens, rows_RV, vocabulary, span, sparsity)
        expected = sparse_targets(summed, span, sparsity._replace(num_top=0))
        assert len(of_span.entries.counts_P) == sum(last - first for first, last in span.kept)
        np.testing.assert_array_equal(of_span.entries.counts_P, expected.entries.counts_P)
        np.testing.assert_array_equal(of_span.entries.symbols_E, expected.entries.symbols_E)
        np.testing.assert_allclose(of_span.entries.probs_E, expected.entries.probs_E, rtol=2e-5, atol=1e-12)
        np.testing.assert_allclose(of_span.measures_MP, expected.measures_MP, rtol=1e-4, atol=1e-6)
        assert of_span.measures_MP.shape == (len(MEASURES), len(expected.entries.counts_P))
        np.testing.assert_allclose(of_span.token_logprobs, expected.token_logprobs, rtol=2e-5)


def check_tokens(
    found: TokenEntries | None, rows_RV: np.ndarray, vocabulary: Vocabulary, span: SpanRequest, sparsity: Sparsity
) -> None:
    """Hold the alternatives of a span's tokens against a softmax in float64, row by row."""
    assert (found is not None) is bool(sparsity.num_top)
    if found is None:
        return
    logprobs_RV = rows_RV - np.log(np.exp(rows_RV - rows_RV.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    logprobs_RV -= rows_RV.max(axis=1, keepdims=True)
    ends_R = np.log(np.exp(logprobs_RV[:, list(vocabulary.end_ids)]).sum(axis=1))
    np.testing.assert_allclose(found.end_logprobs_R, ends_R, rtol=1e-5, atol=1e-5)
    at = 0
    for token, logprobs_V, count in zip(span.tokens, logprobs_RV, found.counts_T.tolist(), strict=False):
        top = np.lexsort((np.arange(WIDTH), -logprobs_V))[: sparsity.num_top].tolist()
        expected = [one for one in top if np.exp(logprobs_V[one]) >= sparsity.min_token_prob]
        expected += [] if token in expected else [token]
        assert found.ids_A[at : at + count].tolist() == expected
        np.testing.assert_allclose(found.logprobs_A[at : at + count], logprobs_V[expected], rtol=1e-5, atol=1e-5)
        at += count
    assert at == len(found.ids_A) == len(found.logprobs_A)


@pytest.mark.parametrize("on_device", [False, True])
def test_rows_that_a_worker_sums_are_those_of_the_float64_twin(on_device: bool) -> None:
    rng = np.random.default_rng(5)
    vocabulary = wide_vocabulary(rng)
    covering = covering_of(vocabulary, b"abcabcab")
    requests = [RowsAlong.single(covering, offset, 2 * offset)._replace(num_top=5) for offset in (0, 3, 8)]
    logits_RV = rng.normal(size=(17, WIDTH)).astype(np.float32)
    message = rows_message(requests)
    masses = read_masses(answer(message, vocabulary, logits_RV, on_device=on_device))
    assert masses.top_ids_RK.shape == (3, 5)
    probs_RC = exp_logits(logits_RV[[0, 6, 16]].astype(np.float64)[:, vocabulary.order])
    expected = covering.reduce_rows([0, 3, 8], probs_RC)
    np.testing.assert_allclose(masses.masses_I, np.concatenate([row.masses_I for row in expected]), rtol=2e-5)
    np.testing.assert_allclose(masses.end_R, [row.end for row in expected], rtol=2e-5)
    np.testing.assert_allclose(masses.token_R, [row.token for row in expected], rtol=2e-5)


def test_an_engine_that_gives_no_probable_tokens_is_told_so() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    covering = covering_of(vocabulary, b"ab")
    rows = covering.reduce_rows(covering.offsets, exp_logits(np.zeros((3, WIDTH))))
    [span] = spans_of([covering], 0)
    with pytest.raises(
        ValueError, match=r"the engine gives no most probable tokens of its rows, which dump\.tokens needs"
    ):
        sparse_targets(covering.targets(rows), span, Sparsity(16, 0.1, num_top=4), rows)


def test_a_fault_is_the_answer_to_either_kind_of_message() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    covering = covering_of(vocabulary, b"ab")
    for message, read in (
        (rows_message([RowsAlong.single(covering, 0, 0)]), read_masses),
        (spans_message(spans_of([covering], 0), Sparsity(16, 0.1, False, ARITHMETIC)), read_spans),
    ):
        answering = Answering(message, vocabulary)
        answering.fault = "the teacher's logits are not finite"
        with pytest.raises(ValueError, match="logits are not finite"):
            read(answering.bytes())  # type: ignore[operator]
