"""The row reduction against its slow twin, on random vocabularies; logits that are not finite; rows in any chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.covering.covering import MIN_LOGIT, Covering, ReducedRow, exp_logits
from pipeline.covering.softmax_numba import finite_largest32, sum32
from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.reduction.reducer import ComputedRows, PromptRows, Reducer, even_bounds
from stage1_teacher.reduction.types import RowsAlong

WIDTH = 5000


def wide_vocabulary(rng: np.random.Generator) -> Vocabulary:
    """Draw short random tokens over few bytes, so that most prefixes branch.

    Some are control tokens; two of these mean END.
    """
    tokens: list[bytes | None] = [bytes([byte]) for byte in b"abcdefgh"]
    while len(tokens) < WIDTH - 20:
        tokens.append(bytes(rng.choice(list(b"abcdefgh"), size=rng.integers(1, 7)).tolist()))
    tokens += [None] * 10
    return Vocabulary(tokens, [WIDTH - 30, WIDTH - 21], WIDTH)


def reduced_twice(
    vocabulary: Vocabulary,
    parts: list[tuple[bytes, list[int]]],
    logits: list[np.ndarray],
    chunk: int,
    in_byte_order: bool = False,
) -> tuple[list[list[ReducedRow]], list[list[ReducedRow]]]:
    """Reduce rows of some documents at some offsets: as the dump does, and by the slow twin in float64."""
    coverings = [covering_of(vocabulary, document) for document, _ in parts]
    rows = [
        PromptRows.along([along(covering, offsets)], vocabulary)
        for covering, (_, offsets) in zip(coverings, parts, strict=True)
    ]
    expected = [
        covering.reduce_rows(offsets, exp_logits(logits_RV[:, vocabulary.order].astype(np.float64)))
        for covering, (_, offsets), logits_RV in zip(coverings, parts, logits, strict=True)
    ]
    computed = [
        ComputedRows(of_prompt, 0, torch.from_numpy(logits_RV.astype(np.float32)))  # its states are its logits
        for of_prompt, logits_RV in zip(rows, logits, strict=True)
    ]
    reducer = Reducer(vocabulary, torch.device("cpu"), chunk, in_byte_order=in_byte_order)
    order_V = torch.from_numpy(vocabulary.order)
    reducer.reduce(computed, lambda states_RV: states_RV[:, order_V] if in_byte_order else states_RV)
    return [of_request for of_prompt in rows for of_request in of_prompt.rows()], expected


def reducer_of(vocabulary: Vocabulary, chunk: int) -> Reducer:
    return Reducer(vocabulary, torch.device("cpu"), chunk)


def along(covering: Covering, offsets: list[int], first: int = 0) -> RowsAlong:
    """Request the rows that end at some offsets of a covering."""
    offsets_R = np.array(offsets, dtype=np.int64)
    return RowsAlong(first, covering.document, offsets_R, covering.intervals(offsets_R).columns_R)


def covering_of(vocabulary: Vocabulary, document: bytes) -> Covering:
    """Make a covering whose canonical path is one byte a token; any offset may be asked for."""
    ids = {spelled: int(vocabulary.order[column]) for column, spelled in enumerate(vocabulary.sorted_bytes)}
    return Covering(vocabulary, [ids[bytes([byte])] for byte in document], document)


def assert_close(found: list[list[ReducedRow]], expected: list[list[ReducedRow]], rtol: float) -> None:
    for found_rows, expected_rows in zip(found, expected, strict=True):
        for row, twin in zip(found_rows, expected_rows, strict=True):
            assert row.offset == twin.offset
            np.testing.assert_allclose(row.masses_I, twin.masses_I, rtol=rtol)
            np.testing.assert_allclose([row.end, row.token], [twin.end, twin.token], rtol=rtol)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([1.0, 4.0, 12.0]))
def test_rows_at_any_offsets_of_several_documents_equal_the_slow_twin(seed: int, chunk: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = wide_vocabulary(rng)
    parts = []
    for length in rng.integers(0, 12, size=3):
        document = bytes(rng.choice(list(b"abcdefgh"), size=length).tolist())
        parts.append((document, rng.integers(0, length + 1, size=rng.integers(0, 6)).tolist()))
    parts.append((b"abc", [0, 1, 2, 3]))
    logits = [rng.normal(size=(len(offsets), WIDTH)).astype(np.float32) * spread for _, offsets in parts]
    for in_byte_order in (False, True):
        found, expected = reduced_twice(vocabulary, parts, logits, chunk, in_byte_order)
        assert_close(found, expected, rtol=2e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([1, 6, 16, 2 * WIDTH]))
def test_the_most_probable_tokens_are_those_of_a_sort_in_float64(seed: int, chunk: int, num_top: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = wide_vocabulary(rng)
    logits_RV = (4 * rng.normal(size=(6, WIDTH))).astype(np.float32)
    logits_RV[1] = logits_RV[1].round()  # many are equal
    logits_RV[2, rng.permutation(WIDTH)[: WIDTH - 3]] = -np.inf
    shifted_RV = np.maximum(logits_RV.astype(np.float64) - logits_RV.max(axis=1, keepdims=True), MIN_LOGIT)
    logprobs_RV = shifted_RV - np.log(np.exp(shifted_RV).sum(axis=1, keepdims=True))
    order_V = torch.from_numpy(vocabulary.order)
    for in_byte_order in (False, True):
        prompts = [PromptRows.along([along(covering_of(vocabulary, b"ab"), [0, 1, 2])._replace(num_top=n)], vocabulary)
                   for n in (num_top, 2)]  # fmt: skip
        computed = [
            ComputedRows(of_prompt, 0, torch.from_numpy(logits_RV[first : first + 3]))
            for first, of_prompt in zip((0, 3), prompts, strict=True)
        ]
        reducer = Reducer(vocabulary, torch.device("cpu"), chunk, in_byte_order=in_byte_order)
        reducer.reduce(computed, lambda states_RV: states_RV[:, order_V] if in_byte_order else states_RV)  # noqa: B023
        rows = [row for of_prompt in prompts for of_request in of_prompt.rows() for row in of_request]
        for row, logits_V, logprobs_V, size in zip(rows, logits_RV, logprobs_RV, [num_top] * 3 + [2] * 3, strict=True):
            expected = np.lexsort((np.arange(WIDTH), -logits_V))[:size]
            assert row.top_ids_K.tolist() == expected.tolist()
            np.testing.assert_allclose(row.top_logprobs_K, logprobs_V[expected], rtol=1e-5, atol=1e-5)


def test_masses_of_1e_7_and_far_less_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    vocabulary = wide_vocabulary(rng)
    logits = rng.normal(size=(8, WIDTH)).astype(np.float32)
    logits[:, vocabulary.order[: WIDTH // 2]] -= np.float32([0, 8, 16, 24, 32, 40, 56, 70])[:, None]
    found, expected = reduced_twice(vocabulary, [(b"abcabca", list(range(8)))], [logits], 8)
    smallest = min(row.masses_I.min() for row in expected[0])
    assert smallest < 1e-30
    assert_close(found, expected, rtol=2e-5)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 300, 9000])
def test_sums_of_any_range_of_columns_are_those_of_float64(width: int) -> None:
    rng = np.random.default_rng(width)
    probs_C = (10.0 ** rng.uniform(-9, 0, size=width)).astype(np.float32)
    ranges = [(0, width), (width, width), *np.sort(rng.integers(0, width + 1, size=(200, 2)), axis=1).tolist()]
    for first, last in ranges:
        expected = probs_C[first:last].sum(dtype=np.float64)
        assert sum32(probs_C, first, last) == pytest.approx(expected, rel=2e-6)


def test_the_largest_of_finite_logits_is_found_and_others_give_nan() -> None:
    rng = np.random.default_rng(0)
    for logits_C in (rng.normal(size=(50, 33)) - rng.choice([0, 100], size=(50, 1))).astype(np.float32):
        assert finite_largest32(logits_C.view(np.int32)) == logits_C.max()
        logits_C[rng.integers(33)] = rng.choice([np.nan, -np.nan, np.inf])
        assert np.isnan(finite_largest32(logits_C.view(np.int32)))
    assert np.isnan(finite_largest32(np.full(5, -np.inf, dtype=np.float32).view(np.int32)))
    assert finite_largest32(np.array([-np.inf, -3], dtype=np.float32).view(np.int32)) == -3


@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0])
def test_a_constant_added_to_all_logits_changes_nothing(offset: float) -> None:
    rng = np.random.default_rng(1)
    vocabulary = wide_vocabulary(rng)
    logits = rng.integers(-40, 40, size=(3, WIDTH)).astype(np.float32) / 4
    found, _ = reduced_twice(vocabulary, [(b"ab", [0, 1, 2])], [logits + np.float32(offset)], 3)
    _, expected = reduced_twice(vocabulary, [(b"ab", [0, 1, 2])], [logits], 3)
    assert_close(found, expected, rtol=2e-5)


def test_the_next_token_may_be_the_first_of_all_columns() -> None:
    vocabulary = Vocabulary([b"b", b"a", None], [2], 3)
    logits = np.log(np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]))
    assert vocabulary.column[1] == 0
    found, expected = reduced_twice(vocabulary, [(b"a", [0, 1])], [logits], 2)
    assert_close(found, expected, rtol=2e-5)
    assert found[0][0].token == pytest.approx(0.5, rel=1e-5) and np.isnan(found[0][1].token)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 7, WIDTH - 1, None])
def test_a_logit_that_is_nan_or_infinite_is_refused_wherever_it_is(bad: float, column: int | None) -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    logits = np.zeros((3, WIDTH), dtype=np.float32)
    logits[1, slice(None) if column is None else column] = bad
    with pytest.raises(ValueError, match="logits are not finite"):
        reduced_twice(vocabulary, [(b"ab", [0, 1, 2])], [logits], 3)


def test_a_fault_in_one_chunk_leaves_no_other_process_waiting_and_lets_the_next_step_follow() -> None:
    """Each process applies the head to all chunks: under tensor parallelism the others wait for one that does not."""
    rng = np.random.default_rng(6)
    vocabulary = wide_vocabulary(rng)
    rows = PromptRows.along([along(covering_of(vocabulary, b"abcab"), list(range(6)))], vocabulary)
    logits_RV = torch.from_numpy(rng.normal(size=(6, WIDTH)).astype(np.float32))
    bad_RV = logits_RV[:4].clone()
    bad_RV[0, 7] = torch.nan
    asked: list[int] = []

    def logits_of(states_RV: torch.Tensor) -> torch.Tensor:
        asked.append(len(states_RV))
        return states_RV

    reducer = reducer_of(vocabulary, 1)
    with pytest.raises(ValueError, match="logits are not finite"):
        reducer.reduce([ComputedRows(rows, 0, bad_RV)], logits_of)
    assert asked == [1, 1, 1, 1]
    reducer.reduce([ComputedRows(rows, 4, logits_RV[4:])], logits_of)
    assert rows.num_done == 6


def test_a_token_that_the_model_never_says_has_the_smallest_mass() -> None:
    """Suppressed ids have a logit of minus infinity."""
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    logits = np.zeros((1, WIDTH), dtype=np.float32)
    logits[0, vocabulary.order[0]] = -np.inf
    [[row]], _ = reduced_twice(vocabulary, [(b"", [0])], [logits], 1)
    assert row.masses_I.min() > 0 and np.isfinite(row.masses_I).all()


def test_rows_come_in_any_pieces_and_from_the_start_again() -> None:
    rng = np.random.default_rng(3)
    vocabulary, reducer = wide_vocabulary(rng), reducer_of(wide_vocabulary(np.random.default_rng(3)), 2)
    covering = covering_of(vocabulary, b"abcabc")
    requests = [along(covering, [0, 1, 2], 1), along(covering, [3, 4, 5], 4)]  # rows 1 .. 6 of a prompt
    logits = torch.from_numpy(rng.normal(size=(7, WIDTH)).astype(np.float32))
    rows = PromptRows.along(requests, vocabulary)
    for begin, end in ((0, 3), (0, 1), (1, 2), (2, 6), (6, 7)):
        start, stop = rows.between(begin, end)
        reducer.reduce([ComputedRows(rows, start, logits[rows.index_R[start:stop]])], lambda states_RV: states_RV)
    found = rows.rows()
    _, expected = reduced_twice(vocabulary, [(b"abcabc", [0, 1, 2, 3, 4, 5])], [logits[1:].numpy()], 7)
    assert_close(found, [expected[0][:3], expected[0][3:]], rtol=2e-5)


def test_rows_that_are_missing_or_out_of_order_are_an_error() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    covering = covering_of(vocabulary, b"abc")
    rows = PromptRows.along([along(covering, [0, 1, 2])], vocabulary)
    with pytest.raises(RuntimeError, match="row 1 of a prompt was computed after row -1"):
        reducer_of(vocabulary, 4).reduce([ComputedRows(rows, 1, torch.zeros(2, WIDTH))], lambda states_RV: states_RV)
    with pytest.raises(RuntimeError, match="computed 0 of the 3 rows requested"):
        rows.rows()
    with pytest.raises(ValueError, match="requested in order"):
        PromptRows.along([along(covering, [0], 5), along(covering, [1], 2)], vocabulary)


def test_a_process_that_gets_no_logits_reduces_nothing_but_asks_as_often() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    rows, asked = PromptRows.along([along(covering_of(vocabulary, b"abc"), [0, 1, 2])], vocabulary), []
    reducer_of(vocabulary, 2).reduce([ComputedRows(rows, 0, torch.zeros(3, 4))], asked.append)
    assert list(map(len, asked)) == [1, 2] and rows.num_done == 0


def test_logits_of_another_width_are_refused() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    rows = PromptRows.along([along(covering_of(vocabulary, b""), [0])], vocabulary)
    with pytest.raises(ValueError, match=f"logits of 7 ids, not {WIDTH}"):
        reducer_of(vocabulary, 2).reduce([ComputedRows(rows, 0, torch.zeros(1, 7))], lambda states_RV: states_RV)


def test_no_rows_are_no_rows() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    found, _ = reduced_twice(vocabulary, [(b"ab", [])], [np.zeros((0, WIDTH), dtype=np.float32)], 3)
    assert found == [[]]


def test_chunks_are_few_and_about_as_long() -> None:
    assert even_bounds(513, 128) == [0, 102, 205, 307, 410, 513]
    assert even_bounds(128, 128) == [0, 128] and even_bounds(0, 128) == []
