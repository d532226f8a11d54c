"""Targets of several dumps, against sums over all 256 symbols."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import NUM_SYMBOLS
from schemas.record import Record
from stage2_student.data.mix import MIN_LOGPROB, Mix
from tests.support.readable_dumps import with_tokens
from tests.support.small_dumps import make_record, make_text

How = Literal["arithmetic", "geometric"]
HOW: tuple[How, ...] = ("arithmetic", "geometric")


def random_targets(rng: np.random.Generator, num_positions: int) -> np.ndarray:
    """Draw [P, 256], some positions sure, some flat."""
    exp = np.exp(rng.normal(size=(num_positions, NUM_SYMBOLS)) * rng.uniform(0, 5, (num_positions, 1)))
    return exp / exp.sum(1, keepdims=True)


def stored(probs_PV: np.ndarray, document: bytes, rng: np.random.Generator, most: int) -> Record:
    """Make a record of 1 to `most` symbols a position (256: all), the realised one among them."""
    record = make_record("d", document, rng)
    symbols, logprobs, counts = [], [], []
    for probs_V, realised in zip(probs_PV, record.realised(), strict=True):
        count = most if most == NUM_SYMBOLS else int(rng.integers(1, most + 1))
        chosen = [realised, *(s for s in np.argsort(-probs_V) if s != realised)][:count]
        symbols.append(np.array(chosen, dtype=np.uint8))
        logprobs.append(np.log(probs_V[chosen]).astype(np.float32))
        counts.append(count)
    shares = {name: rng.uniform(0, 1, len(counts)).astype(np.float16) for name in ("dropped", "token_end", "doubt")}
    return replace(
        record,
        entry_counts=np.array(counts, dtype=np.uint16),
        symbols=np.concatenate(symbols),
        logprobs=np.concatenate(logprobs),
        **shares,
    )


def dense(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Return ([P, 256] float64 with tails spread evenly, [P, 256] what is stored), by position."""
    probs_PV = np.zeros((record.num_positions, NUM_SYMBOLS))
    is_stored_PV = np.zeros(probs_PV.shape, dtype=bool)
    start = 0
    for position, count in enumerate(record.entry_counts.tolist()):
        for entry in range(start, start + count):
            probs_PV[position, record.symbols[entry]] = np.exp(float(record.logprobs[entry]))
            is_stored_PV[position, record.symbols[entry]] = True
        if count < NUM_SYMBOLS:
            tail = max(0.0, 1 - probs_PV[position].sum()) / (NUM_SYMBOLS - count)
            probs_PV[position, ~is_stored_PV[position]] = max(tail, np.exp(MIN_LOGPROB))
        start += count
    return probs_PV, is_stored_PV


def twin(all_probs: Sequence[np.ndarray], weights: Sequence[float], how: How) -> np.ndarray:
    """Compute the mean over all 256 symbols."""
    if how == "arithmetic":
        return sum(w * probs_PV for w, probs_PV in zip(weights, all_probs, strict=True))
    product_PV = np.prod([probs_PV**w for w, probs_PV in zip(weights, all_probs, strict=True)], axis=0)
    return product_PV / product_PV.sum(1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(HOW), st.sampled_from([1, 16, 256]), st.integers(2, 3))
def test_a_mix_is_the_mean_over_all_symbols_with_tails_spread_evenly(
    seed: int, how: How, most: int, num_dumps: int
) -> None:
    rng = np.random.default_rng(seed)
    document = make_text(rng, 3)
    weights = rng.uniform(0.1, 2, num_dumps)
    records = [stored(random_targets(rng, len(document) + 1), document, rng, most) for _ in range(num_dumps)]
    mixed = Mix.of(weights.tolist(), how)(records)
    expected_PV = twin([dense(record)[0] for record in records], (weights / weights.sum()).tolist(), how)
    found_PV, is_stored_PV = dense(mixed)
    assert (is_stored_PV == np.any([dense(record)[1] for record in records], axis=0)).all()
    np.testing.assert_allclose(found_PV[is_stored_PV], expected_PV[is_stored_PV], rtol=1e-5)
    np.testing.assert_allclose(
        np.where(is_stored_PV, 0, found_PV).sum(1), np.where(is_stored_PV, 0, expected_PV).sum(1), rtol=0, atol=1e-5
    )
    assert (found_PV * is_stored_PV).sum(1).max() < 1 + 1e-5


@pytest.mark.parametrize("how", HOW)
def test_with_everything_stored_a_mix_is_exact(how: How) -> None:
    rng = np.random.default_rng(0)
    document = b"exact"
    targets = [random_targets(rng, 6) for _ in range(2)]
    records = [stored(probs_PV, document, rng, NUM_SYMBOLS) for probs_PV in targets]
    found_PV, is_stored_PV = dense(Mix.of([3, 1], how)(records))
    assert is_stored_PV.all()
    np.testing.assert_allclose(found_PV, twin(targets, [0.75, 0.25], how), rtol=2e-6)


@pytest.mark.parametrize("how", HOW)
def test_a_mix_of_equals_is_what_each_of_them_says(how: How) -> None:
    rng = np.random.default_rng(1)
    document = b"the same twice"
    record = stored(random_targets(rng, len(document) + 1), document, rng, 9)
    mixed = Mix.of([1, 5], how)([record, record])
    np.testing.assert_allclose(dense(mixed)[0], dense(record)[0], rtol=1e-4, atol=1e-8)


def test_a_mixed_record_has_no_tokens_of_any_teacher() -> None:
    record = with_tokens(make_record("d", b"stone", np.random.default_rng(0)))
    mixed = Mix.of([1, 1], "arithmetic")([record, record])
    assert record.tokens is not None and mixed.tokens is None and not len(mixed.teacher_token_lengths)


def test_a_mixed_record_lists_likely_symbols_first_and_shares_doubt_by_weight() -> None:
    rng = np.random.default_rng(2)
    document = b"doubt"
    one, two = (stored(random_targets(rng, 6), document, rng, 9) for _ in range(2))
    mixed = Mix.of([3, 1], "arithmetic")([one, two])
    for name in ("dropped", "token_end", "doubt"):
        means = 0.75 * getattr(one, name).astype(float) + 0.25 * getattr(two, name).astype(float)
        np.testing.assert_allclose(getattr(mixed, name), means, rtol=1e-6)
    starts = np.cumsum(mixed.entry_counts) - mixed.entry_counts
    for start, count in zip(starts, mixed.entry_counts, strict=True):
        assert (np.diff(mixed.logprobs[start : start + count]) <= 0).all()
    assert (mixed.doc_id, mixed.document, mixed.segments) == (one.doc_id, one.document, one.segments)
    assert not len(mixed.teacher_token_lengths) and not len(mixed.teacher_token_logprobs)


@pytest.mark.parametrize("how", HOW)
def test_a_symbol_that_one_teacher_excludes_stays_finite(how: How) -> None:
    rng = np.random.default_rng(3)
    sure, other = (stored(random_targets(rng, 3), b"ok", rng, 5) for _ in range(2))
    sure = replace(
        sure, entry_counts=np.ones(3, np.uint16), symbols=sure.realised().copy(), logprobs=np.zeros(3, np.float32)
    )
    mixed = Mix.of([1, 1], how)([sure, other])
    assert np.isfinite(mixed.logprobs).all() and (mixed.logprobs <= 0).all()
    assert (mixed.logprobs >= MIN_LOGPROB).all()
