"""The codes of a shard, against their formulas written out slowly and at the edges."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import END, coding
from schemas.coding import CodedEntries, Entries, decode_entries, encode_entries
from schemas.shard import Record, Segment, commit_shard, read_shard, to_table


def random_entries(seed: int, num_positions: int, most: int, sharpness: float) -> Entries:
    """Positions with 1 to `most` of 256 symbols that sum to at most 1; now and then all of the mass is stored."""
    rng = np.random.default_rng(seed)
    counts, symbols, probs = [], [], []
    for _ in range(num_positions):
        logits = rng.normal(size=256) * sharpness
        every = np.exp(logits) / np.exp(logits).sum()
        chosen = np.sort(rng.choice(256, rng.integers(1, most + 1), replace=False))
        counts.append(len(chosen))
        symbols.append(chosen.astype(np.uint8))
        probs.append(every[chosen] / (every[chosen].sum() if rng.random() < 0.2 else 1.0))
    return Entries(np.array(counts, dtype=np.int64), np.concatenate(symbols), np.concatenate(probs))


def decoded_slowly(coded: CodedEntries) -> list[tuple[dict[int, float], float]]:
    """Per position (symbol -> probability, tail), as the specification words it."""
    found = []
    start = 0
    columns = (coded.top_symbols.tolist(), coded.tail_codes.tolist(), coded.other_counts.tolist())
    for top, tail_code, count in zip(*columns, strict=True):
        probs = {}
        for symbol, code in zip(coded.other_symbols[start:], coded.other_codes[start : start + count], strict=False):
            probs[int(symbol)] = (int(code) / 100) ** 2 if code <= 100 else 0.0001 * 2.0 ** (100 - int(code))
        tail = (tail_code / 100) ** 2
        probs[top] = 1 - tail - sum(probs.values())
        found.append((probs, tail))
        start += count
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1, 4, 17, 256]), st.sampled_from([0.01, 1.0, 4.0])
)
def test_codes_decode_by_the_formula_to_what_was_stored(
    seed: int, num_positions: int, most: int, sharpness: float
) -> None:
    entries = random_entries(seed, num_positions, most, sharpness)
    coded = encode_entries(entries)
    counts_P, symbols_E, logprobs_E = decode_entries(coded)
    np.testing.assert_array_equal(counts_P, entries.counts_P)
    start = 0
    for count, (slow, tail) in zip(counts_P, decoded_slowly(coded), strict=True):
        taken = slice(start, start + count)
        found = dict(zip(symbols_E[taken].tolist(), logprobs_E[taken].tolist(), strict=True))
        true = dict(zip(entries.symbols_E[taken].tolist(), entries.probs_E[taken].tolist(), strict=True))
        assert found.keys() == slow.keys() == true.keys()
        for symbol, logprob in found.items():
            assert logprob == pytest.approx(math.log(slow[symbol]), abs=1e-5 + 1e-7 / slow[symbol])
            # Half a step is at most 0.01; where errors are carried on, one step. The top may be off by a twentieth besides.
            assert abs(slow[symbol] - true[symbol]) < 0.021 + 0.05 * (symbol == symbols_E[start])
        assert abs(tail - max(0.0, 1 - sum(true.values()))) < 0.021
        assert sum(slow.values()) + tail == pytest.approx(1)
        start += count


def test_the_top_is_the_most_probable_symbol_and_the_first_of_equals() -> None:
    coded = encode_entries(
        Entries(np.array([3, 2]), np.array([1, 2, 9, 4, 5], np.uint8), np.array([0.1, 0.6, 0.2, 0.4, 0.4]))
    )
    assert coded.top_symbols.tolist() == [2, 4] and coded.other_symbols.tolist() == [1, 9, 5]


@pytest.mark.parametrize("prob", [1.0, 1 - 1e-12, 0.0, 1e-35, 1e-300, 7.4e-5, 7.6e-5, 1e-4])
def test_a_symbol_of_any_probability_is_stored_beside_a_sure_one(prob: float) -> None:
    other = max(prob, 1 - prob)
    entries = Entries(
        np.array([2]), np.array([65, END], np.uint8), np.array([other, 1 - other if prob > 0.5 else prob])
    )
    _, symbols_E, logprobs_E = decode_entries(encode_entries(entries))
    assert symbols_E.tolist() == [65, END] and np.isfinite(logprobs_E).all()
    assert logprobs_E[0] == pytest.approx(0, abs=2e-4)
    rare = 1 - other if prob > 0.5 else prob
    if rare >= 1e-48:
        assert logprobs_E[1] == pytest.approx(math.log(rare), abs=0.36)  # half an octave
    else:
        assert logprobs_E[1] < -116


def test_256_entries_have_no_tail_and_an_equal_share_each() -> None:
    entries = Entries(np.array([256]), np.arange(256, dtype=np.uint8), np.full(256, 1 / 256))
    coded = encode_entries(entries)
    assert coded.tail_codes.tolist() == [0] and coded.other_counts.tolist() == [255]
    _, _, logprobs_E = decode_entries(coded)
    probs_E = np.exp(logprobs_E.astype(np.float64))
    assert probs_E.sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(probs_E - 1 / 256).max() < 1.3e-3  # a step is 1.25e-3 wide here


def test_something_is_left_for_a_top_that_is_stored_alone() -> None:
    entries = Entries(np.array([1]), np.array([65], np.uint8), np.array([1 / 256]))
    _, _, logprobs_E = decode_entries(encode_entries(entries))
    assert 0 < np.exp(logprobs_E[0]) < 0.02


def test_nothing_encodes_to_nothing() -> None:
    none = Entries(np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0))
    assert [len(column) for column in encode_entries(none)] == [0] * 5
    assert [len(column) for column in decode_entries(encode_entries(none))] == [0] * 3


@given(st.lists(st.floats(0, 1), max_size=20))
def test_shares_are_rounded_up_so_that_masks_leave_out_no_less(shares: list[float]) -> None:
    decoded = coding.decode_shares(coding.encode_shares(np.array(shares)))
    assert (decoded >= np.array(shares) * (1 - 1e-6)).all()
    np.testing.assert_array_equal(coding.decode_shares(coding.encode_shares(decoded)), decoded)
    assert ((decoded == 0) == (np.array(shares) == 0)).all()


@given(st.lists(st.floats(-2000, 0), max_size=20))
def test_token_logprobs_are_within_half_a_step(logprobs: list[float]) -> None:
    decoded = coding.decode_token_logprobs(coding.encode_token_logprobs(np.array(logprobs)))
    assert (np.abs(decoded - np.maximum(logprobs, -1023)) <= 1 / 128 + 1e-4).all()


def record(document: bytes = b"ab") -> Record:
    zeros = np.zeros(3, dtype=np.uint8)
    coded = encode_entries(Entries(np.array([1, 2, 1]), np.array([97, 97, 98, END], np.uint8), np.full(4, 0.5)))
    tokens = np.array([len(document)], dtype=np.int32)
    return Record("0", 0, document, (Segment(0, 2, True),), tokens, np.array([64], np.uint16), *(zeros,) * 3, *coded)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    commit_shard(to_table([record(), record()], {"a": 1}), tmp_path / "part.parquet", 3)
    for found in read_shard(tmp_path / "part.parquet"):
        assert found.faults() == [] and found.document == b"ab"
        assert found.symbols.tolist() == [97, 97, 98, END]
        np.testing.assert_allclose(np.exp(found.logprobs), [0.5, 0.5, 0.5, 0.5], atol=0.01)
        assert found.teacher_token_logprobs.tolist() == [-1.0]


def test_a_shard_found_alone_tells_its_formulas(tmp_path: Path) -> None:
    commit_shard(to_table([record()], {"a": 1}), tmp_path / "part.parquet", 3)
    told = pq.read_schema(tmp_path / "part.parquet").metadata[b"bld.decoding"].decode()
    assert all(formula in told for formula in coding.FORMULAS.values())
    assert str(coding.PROB_SCALE) in coding.FORMULAS["tail_codes"]
    assert str(coding.SHARE_SCALE) in coding.FORMULAS["dropped_codes, token_end_codes, doubt_codes"]
    assert str(coding.TOKEN_LOGPROB_SCALE) in coding.FORMULAS["teacher_token_codes"]


def test_faults_are_named() -> None:
    assert replace(record(), tail_codes=np.array([100, 0, 0], np.uint8)).faults() == [
        "a position's codes leave nothing for its top symbol, or a stored probability is 0"
    ]
    assert replace(record(), other_symbols=np.array([97], np.uint8)).faults()[0] == (
        "a symbol is stored twice at one position"
    )
    assert replace(record(), other_codes=np.empty(0, np.uint8)).faults() == ["entry columns differ in length"]
