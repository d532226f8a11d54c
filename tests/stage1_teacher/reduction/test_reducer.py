"""The row reduction against its slow twin, on random vocabularies, and what it does with logits that are not finite."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.covering.covering import Covering, ReducedRow, exp_logits
from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.reduction.head import Head
from stage1_teacher.reduction.reducer import Reducer, even_bounds
from stage1_teacher.reduction.types import Rows

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
    vocabulary: Vocabulary, parts: list[tuple[bytes, list[int]]], logits: list[np.ndarray], chunk: int
) -> tuple[list[list[ReducedRow]], list[list[ReducedRow]]]:
    """Reduce rows of some documents at some offsets: as the dump does, and by the slow twin in float64."""
    width = len(vocabulary.order)
    head = Head(torch.eye(width), None, vocabulary)  # its hidden states are its logits, by token id
    coverings = [covering_of(vocabulary, document) for document, _ in parts]
    rows = [
        Rows(covering, offsets, torch.from_numpy(logits_RV.astype(np.float32)))
        for covering, (_, offsets), logits_RV in zip(coverings, parts, logits, strict=True)
    ]
    expected = [
        covering.reduce_rows(offsets, exp_logits(logits_RV[:, vocabulary.order].astype(np.float64)))
        for covering, (_, offsets), logits_RV in zip(coverings, parts, logits, strict=True)
    ]
    return Reducer(head, vocabulary, chunk).reduce(rows), expected


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
    found, expected = reduced_twice(vocabulary, parts, logits, chunk)
    assert_close(found, expected, rtol=2e-5)


def test_masses_of_1e_7_and_far_less_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    vocabulary = wide_vocabulary(rng)
    logits = rng.normal(size=(8, WIDTH)).astype(np.float32)
    logits[:, vocabulary.order[: WIDTH // 2]] -= np.float32([0, 8, 16, 24, 32, 40, 56, 70])[:, None]
    found, expected = reduced_twice(vocabulary, [(b"abcabca", list(range(8)))], [logits], 8)
    smallest = min(row.masses_I.min() for row in expected[0])
    assert smallest < 1e-30
    assert_close(found, expected, rtol=2e-5)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_hidden_state_that_is_not_finite_is_refused(bad: float) -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    logits = np.zeros((3, WIDTH), dtype=np.float32)
    logits[1, 7] = bad
    with pytest.raises(ValueError, match="logits are not finite"):
        reduced_twice(vocabulary, [(b"ab", [0, 1, 2])], [logits], 3)


def test_a_product_that_overflows_is_refused() -> None:
    vocabulary = Vocabulary([b"a", b"b", None], [2], 3)
    head = Head(torch.full((3, 2), 3e38), None, vocabulary)
    with pytest.raises(ValueError, match="logits are not finite"):
        Reducer(head, vocabulary, 4).reduce([Rows(Covering(vocabulary, [0], b"a"), [0, 1], torch.full((2, 2), 3.0))])


def test_no_rows_are_no_rows() -> None:
    vocabulary = wide_vocabulary(np.random.default_rng(0))
    found, _ = reduced_twice(vocabulary, [(b"ab", [])], [np.zeros((0, WIDTH), dtype=np.float32)], 3)
    assert found == [[]]


def test_chunks_are_few_and_about_as_long() -> None:
    assert even_bounds(513, 128) == [0, 102, 205, 307, 410, 513]
    assert even_bounds(128, 128) == [0, 128] and even_bounds(0, 128) == []


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_of_bfloat16_weights_are_summed_and_kept_in_float32(alone: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(300, 64, generator=generator).bfloat16()
    hidden_RD = torch.randn(5, 64, generator=generator).to(dtype)
    vocabulary = Vocabulary([bytes([i]) for i in range(255)], [299], 300)
    exact_RC = (hidden_RD.double() @ weight_VD.double().T)[:, torch.from_numpy(vocabulary.order)]
    found_RC = Head(weight_VD, None, vocabulary, alone=alone).logits(hidden_RD).double()
    torch.testing.assert_close(found_RC, exact_RC, rtol=0, atol=2e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
