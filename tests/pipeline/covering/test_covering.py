"""The covering against brute force, on random models, vocabularies and documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.covering.covering import Covering, exp_logits
from pipeline.covering.targets import Targets
from pipeline.covering.vocabulary import Vocabulary
from tests.support import brute_force

ALPHABET = [b"a", b"b", b"\xc3", b"\xa9"]


def random_vocabulary(rng: np.random.Generator) -> list[bytes | None]:
    """Draw single bytes, random longer tokens, duplicates, a control token, an end token and one with 0xFF."""
    longer = [b"".join(rng.choice(ALPHABET, size=rng.integers(2, 5))) for _ in range(12)]
    tokens: list[bytes | None] = [*ALPHABET, *longer, longer[0], b"a", None, None, b"a\xff", b"\xff"]
    rng.shuffle(tokens)  # type: ignore[arg-type]
    return tokens


class RandomModel:
    """A softmax over seeded normal logits for every token path."""

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.seed = width, seed

    def logits(self, path: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng([self.seed, len(path), *path]).normal(size=self.width) * 3

    def probs(self, path: tuple[int, ...]) -> np.ndarray:
        logits = self.logits(path)
        exp = np.exp(logits - logits.max())
        return exp / exp.sum()


def random_tokens(rng: np.random.Generator, token_bytes: list[bytes | None], end: int, length: int) -> list[int]:
    usable = [i for i, b in enumerate(token_bytes) if b and b"\xff" not in b and i != end]
    return [int(t) for t in rng.choice(usable, size=length)]


def covering_targets(model: RandomModel, vocabulary: Vocabulary, tokens: list[int], document: bytes) -> Targets:
    covering = Covering(vocabulary, tokens, document)
    logits_RC = np.stack([model.logits(tuple(tokens[:r]))[vocabulary.order] for r in range(len(tokens) + 1)])
    probs_RC = exp_logits(logits_RC)
    return covering.targets(covering.reduce_rows(covering.offsets, probs_RC))


def case(seed: int, num_tokens: int) -> tuple[RandomModel, list[bytes | None], int, list[int], bytes, Vocabulary]:
    rng = np.random.default_rng(seed)
    token_bytes = random_vocabulary(rng)
    end = token_bytes.index(None)
    width = len(token_bytes) + 3  # padding rows of the head
    tokens = random_tokens(rng, token_bytes, end, num_tokens)
    document = b"".join(token_bytes[t] or b"" for t in tokens)
    return RandomModel(width, seed), token_bytes, end, tokens, document, Vocabulary(token_bytes, [end], width)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_canonical_targets_equal_brute_force(seed: int, num_tokens: int) -> None:
    model, token_bytes, end, tokens, document, vocabulary = case(seed, num_tokens)
    expected = brute_force.canonical_targets(model.probs, token_bytes, {end}, tokens, document)
    found = covering_targets(model, vocabulary, tokens, document)
    np.testing.assert_allclose(found.probs_PV, expected, rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_mass_is_conserved_at_every_offset(seed: int, num_tokens: int) -> None:
    model, _, _, tokens, document, vocabulary = case(seed, num_tokens)
    found = covering_targets(model, vocabulary, tokens, document)
    before, after = brute_force.known_masses(found, document)
    # What is known before an offset is what goes on past it, plus what is dropped there, plus what feeds no symbol at a
    # boundary.
    boundary = np.cumsum([len(vocabulary.sorted_bytes[vocabulary.column[t]]) for t in tokens]) - 1
    inside = np.setdiff1d(np.arange(len(document)), boundary)
    balance = after - before * (1 - found.dropped_P[1:])
    assert (np.abs(balance[inside]) <= 1e-12 * before[inside]).all()
    assert (balance <= 1e-12 * before).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_known_prefix_mass_never_exceeds_the_true_one(seed: int) -> None:
    model, token_bytes, end, tokens, document, vocabulary = case(seed, 2)
    found = covering_targets(model, vocabulary, tokens, document)
    true = brute_force.all_targets(model.probs, token_bytes, {end}, document)
    true_log_mass = 0.0
    for position, byte in enumerate(document):
        true_log_mass += np.log(true[position, byte])
        # The true prefix mass, up to what feeds no symbol at the root, which both sides lack alike at position 0.
        assert found.log_prefix_mass_P[position + 1] <= true_log_mass + 1e-9


def test_token_end_is_the_running_maximum_inside_a_token_and_zero_at_boundaries() -> None:
    model, _, _, tokens, document, vocabulary = case(7, 8)
    found = covering_targets(model, vocabulary, tokens, document)
    offset = 0
    for token in tokens:
        length = len(vocabulary.sorted_bytes[vocabulary.column[token]])
        assert found.token_end_P[offset] == 0
        inside = slice(offset + 1, offset + length)
        np.testing.assert_array_equal(found.token_end_P[inside], np.maximum.accumulate(found.dropped_P[inside]))
        offset += length


def test_float32_rows_keep_masses_of_1e_7_to_one_percent() -> None:
    rng = np.random.default_rng(0)
    token_bytes: list[bytes | None] = [
        bytes([first, second]) for first in range(64) for second in range(256) if second != 255
    ]
    vocabulary = Vocabulary([*token_bytes, None], [len(token_bytes)], len(token_bytes) + 1)
    logits = rng.normal(size=(1, len(token_bytes) + 1))
    logits[0, vocabulary.column[:255]] = 0
    logits[0] -= logits[0].max()
    columns = vocabulary.column[:255]  # the tokens that start with byte 0: made as rare as 1e-7 in all
    logits[0, columns] = np.log(1e-7 / 255 * np.exp(np.delete(logits[0], columns)).sum())
    exact, rounded = exp_logits(logits), exp_logits(logits.astype(np.float32))
    covering = Covering(vocabulary, [], b"")
    [exact_row], [rounded_row] = covering.reduce_rows([0], exact), covering.reduce_rows([0], rounded)
    np.testing.assert_allclose(rounded_row.masses_I, exact_row.masses_I, rtol=1e-4)
    assert exact_row.masses_I[0] == pytest.approx(1e-7, rel=1e-3)


def test_a_head_narrower_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="head has 2 rows, fewer than the tokenizer's 3"):
        Vocabulary([b"a", b"b", b"c"], [0], 2)
