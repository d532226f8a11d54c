"""The flat trie against prefixes looked up one by one."""

import numpy as np
import pytest

from pipeline.covering.covering import Covering
from pipeline.covering.trie import COMPLETE, Trie
from pipeline.covering.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from tests.support.brute_force import prefix_columns
from tests.support.row_nodes import row_nodes


def random_vocabulary(rng: np.random.Generator, num_tokens: int) -> Vocabulary:
    """Draw tokens of few different bytes, so that they share prefixes; some have the same bytes."""
    tokens = [bytes(rng.integers(97, 101, rng.integers(1, 6)).tolist()) for _ in range(num_tokens)]
    return Vocabulary([*tokens, b"\xfe", None], end_ids=[num_tokens + 1], width=num_tokens + 4)


def intervals_one_by_one(vocabulary: Vocabulary, prefix: bytes) -> list[tuple[int, int, int]]:
    """Return (first column, last column + 1, symbol) of the intervals of a node.

    First the tokens that are the prefix, then those that continue it with each symbol.
    """
    found = [
        (column, column + 1, COMPLETE)
        for column in prefix_columns(vocabulary, prefix)
        if vocabulary.sorted_bytes[column] == prefix
    ]
    for symbol in range(NUM_SYMBOLS - 1):
        if len(going_on := prefix_columns(vocabulary, prefix + bytes([symbol]))):
            found.append((going_on.start, going_on.stop, symbol))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_node_is_a_prefix_of_a_token_and_its_intervals_are_those_looked_up_one_by_one(seed: int) -> None:
    vocabulary = random_vocabulary(np.random.default_rng(seed), 40)
    trie = vocabulary.trie
    prefixes = {0: b""}
    for node in range(len(trie.start_N) - 1):
        own = range(trie.start_N[node], trie.start_N[node + 1])
        told = [(int(trie.first_J[j]), int(trie.last_J[j]), int(trie.symbol_J[j])) for j in own]
        assert told == intervals_one_by_one(vocabulary, prefixes[node])
        assert trie.num_complete_N[node] == sum(symbol == COMPLETE for _, _, symbol in told)
        for j in own:
            if trie.symbol_J[j] == COMPLETE:
                assert trie.child_J[j] == COMPLETE
            else:
                prefixes[int(trie.child_J[j])] = prefixes[node] + bytes([trie.symbol_J[j]])
    assert sorted(prefixes) == list(range(len(trie.start_N) - 1))
    spelled = {token[:length] for token in vocabulary.sorted_bytes for length in range(len(token) + 1)}
    assert set(prefixes.values()) == spelled and len(prefixes) == len(spelled)


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_goes_as_deep_as_any_token_reaches_and_no_further_than_its_end(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = random_vocabulary(rng, 40)
    text = rng.choice(
        np.array([97, 98, 99, 100, 101, 254, 255], dtype=np.uint8), 60
    )  # two of its bytes are in no token
    at_R = rng.integers(0, 61, 30)
    end_R = np.minimum(at_R + rng.integers(0, 9, 30), 60)
    paths = vocabulary.trie.walk(text, at_R, end_R)
    nodes = np.split(paths.node_N, paths.num_nodes_R.cumsum()[:-1])
    for at, end, own in zip(at_R.tolist(), end_R.tolist(), nodes, strict=True):
        deep = [d for d in range(end - at + 1) if len(prefix_columns(vocabulary, text[at : at + d].tobytes()))]
        assert len(own) == len(deep) and own[0] == 0
        for depth, node in enumerate(own.tolist()):
            numbers = vocabulary.trie.intervals(np.array([node]))
            told = zip(vocabulary.trie.first_J[numbers].tolist(), vocabulary.trie.last_J[numbers].tolist(), strict=True)
            wanted = intervals_one_by_one(vocabulary, text[at : at + depth].tobytes())
            assert list(told) == [(first, last) for first, last, _ in wanted]
            assert vocabulary.trie.labels(np.array([node])).tolist() == [max(symbol, 0) for *_, symbol in wanted]


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_a_covering_are_summed_over_the_prefixes_that_the_document_goes_on_with(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = random_vocabulary(rng, 40)
    tokens = rng.integers(0, 40, 6).tolist()
    document = b"".join(vocabulary.sorted_bytes[vocabulary.column[token]] for token in tokens)
    covering = Covering(vocabulary, tokens, document)
    for offset in range(len(document) + 1):
        for height, node in enumerate(reversed(row_nodes(covering, offset))):
            wanted = intervals_one_by_one(vocabulary, document[offset : offset + height])
            assert node.cuts.tolist() == [*(first for first, _, _ in wanted), wanted[-1][1]]
            assert node.labels.tolist() == [max(symbol, 0) for *_, symbol in wanted]
            assert node.num_complete == sum(symbol == COMPLETE for *_, symbol in wanted)


def test_an_empty_vocabulary_has_a_root() -> None:
    trie = Trie.of([])
    assert trie.start_N.tolist() == [0, 0] and trie.num_complete_N.tolist() == [0]
    nothing = np.empty(0, dtype=np.int64)
    assert all(len(part) == 0 for part in trie.walk(np.empty(0, dtype=np.uint8), nothing, nothing))
    found = trie.walk(np.array([97], dtype=np.uint8), np.array([0]), np.array([1]))
    assert found.num_nodes_R.tolist() == [1] and found.node_N.tolist() == [0]
