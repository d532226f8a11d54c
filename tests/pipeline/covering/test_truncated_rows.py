"""Targets from listed tokens against the full softmax and brute force.

On random models, vocabularies and documents.
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.covering.covering import Covering
from pipeline.covering.targets import Targets
from pipeline.covering.truncated_rows import ListedRows, listed_targets
from pipeline.covering.vocabulary import Vocabulary
from tests.pipeline.covering.test_covering import RandomModel, case, covering_targets
from tests.support import brute_force


def listed_ids(model: RandomModel, tokens: list[int], end: int, row: int, top_k: int) -> np.ndarray:
    """Return the ids that a server lists for a row: the most probable ones, and the next token or END."""
    order = np.argsort(-model.probs(tuple(tokens[:row])))
    return np.union1d(order[:top_k], [*tokens, end][row])


def from_server(model: RandomModel, tokens: list[int], end: int, top_k: int) -> ListedRows:
    ids = [listed_ids(model, tokens, end, row, top_k) for row in range(len(tokens) + 1)]
    logprobs = [np.log(model.probs(tuple(tokens[:row]))[listed]) for row, listed in enumerate(ids)]
    return ListedRows(np.array([len(i) for i in ids]), np.concatenate(ids), np.concatenate(logprobs), top_k)


def targets(
    model: RandomModel, token_bytes: list[bytes | None], end: int, tokens: list[int], document: bytes, top_k: int
) -> Targets:
    """Compute targets as for a served teacher.

    The vocabulary ends where the tokenizer's does, and the server lists padding beyond it.
    """
    vocabulary = Vocabulary(token_bytes, [end], len(token_bytes))
    return listed_targets(Covering(vocabulary, tokens, document), from_server(model, tokens, end, top_k))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_a_list_of_the_whole_vocabulary_gives_the_full_targets(seed: int, num_tokens: int) -> None:
    model, token_bytes, end, tokens, document, vocabulary = case(seed, num_tokens)
    expected = covering_targets(model, vocabulary, tokens, document)
    found = targets(model, token_bytes, end, tokens, document, model.width)
    for name in ("probs_PV", "log_prefix_mass_P", "dropped_P", "token_end_P", "doubt_P", "token_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(1, 8))
def test_targets_equal_brute_force_over_what_is_listed(seed: int, num_tokens: int, top_k: int) -> None:
    model, token_bytes, end, tokens, document, _ = case(seed, num_tokens)

    def known(path: tuple[int, ...]) -> np.ndarray:
        listed = listed_ids(model, tokens, end, len(path), top_k)
        probs = np.zeros(model.width)
        probs[listed] = model.probs(path)[listed]
        return probs

    expected = brute_force.canonical_targets(known, token_bytes, {end}, tokens, document)
    found = targets(model, token_bytes, end, tokens, document, top_k)
    np.testing.assert_allclose(found.probs_PV, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.probs_PV.sum(axis=1), 1, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 8))
def test_known_and_unlisted_mass_balance_at_every_offset(seed: int, num_tokens: int, top_k: int) -> None:
    model, token_bytes, end, tokens, document, _ = case(seed, num_tokens)
    found = targets(model, token_bytes, end, tokens, document, top_k)
    after = np.exp(found.log_prefix_mass_P)
    known = np.ones(len(document) + 1)
    known[1:] = after[:-1] * found.probs_PV[np.arange(len(document)), np.frombuffer(document, np.uint8)]
    silent = np.zeros(len(document) + 1)  # mass at the rows on listed tokens that feed no symbol
    offset, weight = 0, 1.0
    for row in range(len(tokens) + 1):
        probs = model.probs(tuple(tokens[:row]))
        for token in listed_ids(model, tokens, end, row, top_k):
            spelled = token_bytes[token] if token < len(token_bytes) else None
            if token != end and (spelled is None or b"\xff" in spelled):
                silent[offset] += weight * probs[token]
        if row < len(tokens):
            offset += len(token_bytes[tokens[row]] or b"")
            weight *= probs[tokens[row]]
    np.testing.assert_allclose((after + silent) / known, 1 - found.dropped_P, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 12))
def test_doubt_bounds_the_distance_to_the_targets_of_the_whole_softmax(seed: int, num_tokens: int, top_k: int) -> None:
    model, token_bytes, end, tokens, document, vocabulary = case(seed, num_tokens)
    full = covering_targets(model, vocabulary, tokens, document)
    found = targets(model, token_bytes, end, tokens, document, top_k)
    distance_P = np.abs(found.probs_PV - full.probs_PV).sum(axis=1) / 2
    assert (distance_P <= found.doubt_P + 1e-9).all()
    assert (found.doubt_P <= 1).all()


def test_unlisted_tokens_that_disagree_with_the_text_raise_no_doubt_inside_a_token() -> None:
    token_bytes = [b"a", b"b", b"ab", b"ac", None]
    vocabulary = Vocabulary(token_bytes, [4], 5)
    # The document is "ab", one token. All that starts with "a" is listed; 0.3 lies on what is not.
    first, last = np.log([0.1, 0.4, 0.2]), np.log([0.9])
    listed = ListedRows(np.array([3, 1]), np.array([0, 2, 3, 4]), np.concatenate([first, last]), 3)
    found = listed_targets(Covering(vocabulary, [2], b"ab"), listed)
    np.testing.assert_allclose(found.dropped_P, [0.3, 0.1 / 0.7, 0.1], atol=1e-12)
    # At 1 the branch "a" alone, which is listed and not followed; at 2 hardly anything is left of it.
    np.testing.assert_allclose(found.doubt_P, [0.3, 0.1 / 0.7, 0.1], atol=1e-3)


def test_a_token_that_follows_with_probability_0_leaves_finite_targets() -> None:
    vocabulary = Vocabulary([b"a", b"b", None], [2], 3)
    listed = ListedRows(np.array([2, 2]), np.array([0, 1, 0, 2]), np.array([-9999.0, 0.0, 0.0, -9999.0]), 1)
    found = listed_targets(Covering(vocabulary, [0], b"a"), listed)
    for values in (found.probs_PV, found.log_prefix_mass_P, found.dropped_P, found.doubt_P, found.token_logprobs):
        assert np.isfinite(values).all()


def test_some_rows_of_a_prompt_are_those_rows() -> None:
    listed = ListedRows(np.array([2, 1, 3, 2]), np.arange(8), -np.arange(8.0), 2)
    part = listed[1:3]
    assert part.counts_R.tolist() == [1, 3] and part.token_ids_E.tolist() == [2, 3, 4, 5] and part.top_k == 2
    assert part.logprobs_E.tolist() == [-2.0, -3.0, -4.0, -5.0]
