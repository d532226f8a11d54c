"""The cells of rows, against prefixes looked up one by one."""

import numpy as np
import pytest

from pipeline.covering.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from stage2_student.interfaces.token_marginal.row_cells import row_cells
from tests.pipeline.covering.test_trie import random_vocabulary
from tests.support.brute_force import prefix_columns

Cell = tuple[int, int, int, int, bool]  # first, last, depth, symbol (-1: none is fed), is_complete


def cells_one_by_one(vocabulary: Vocabulary, text: bytes) -> tuple[int, list[Cell]]:
    """Return the number of nodes of a row at the beginning of `text`, and its cells.

    A cell is what is left of a node when the next is taken out.
    """
    found, num_nodes = [], 0
    for depth in range(len(text) + 1):
        prefix = text[:depth]
        columns = prefix_columns(vocabulary, prefix)
        if not len(columns):
            break
        num_nodes += 1
        deeper = prefix_columns(vocabulary, text[: depth + 1]) if depth < len(text) else range(0)
        for column in columns:
            if vocabulary.sorted_bytes[column] == prefix:
                found.append((column, column + 1, depth, -1, True))
        for symbol in range(NUM_SYMBOLS - 1):
            going_on = prefix_columns(vocabulary, prefix + bytes([symbol]))
            if len(going_on) and (going_on != deeper or not len(deeper)):
                found.append((going_on.start, going_on.stop, depth, symbol, False))
    return num_nodes, found


@pytest.mark.parametrize("seed", range(5))
def test_cells_are_those_of_prefixes_looked_up_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = random_vocabulary(rng, 40)
    text = rng.integers(97, 102, 60).astype(np.uint8)  # one of its bytes is in no token
    at_R = np.sort(rng.integers(0, 61, 12))
    end_R = np.minimum(at_R + rng.integers(0, 9, 12), 60)
    paths = vocabulary.trie.walk(text, at_R, end_R)
    unique_Q = rng.permutation(80)
    num_unique = 50  # positions from there on are not asked for
    cells = row_cells(vocabulary.trie, paths, at_R, unique_Q, num_unique)
    max_nodes = int(paths.num_nodes_R.max())
    starts_R = np.concatenate([[0], np.cumsum(cells.num_cells_R)])
    for row, (at, end) in enumerate(zip(at_R.tolist(), end_R.tolist(), strict=True)):
        num_nodes, wanted = cells_one_by_one(vocabulary, text[at:end].tobytes())
        assert paths.num_nodes_R[row] == num_nodes
        found = []
        for i in range(starts_R[row], starts_R[row + 1]):
            depth = int(cells.node_I[i]) - row * max_nodes
            unique, symbol = divmod(int(cells.fed_I[i]), NUM_SYMBOLS)
            asked = int(unique_Q[at + depth])
            is_complete = bool(cells.is_complete_I[i])
            assert unique == (num_unique if is_complete else min(asked, num_unique))
            found.append((int(cells.first_I[i]), int(cells.last_I[i]), depth, symbol, is_complete))
        asked_for = {depth: bool(unique_Q[at + depth] < num_unique) for depth in range(num_nodes)}
        told = [
            (first, last, depth, symbol if symbol >= 0 and asked_for[depth] else 0, is_complete)
            for first, last, depth, symbol, is_complete in wanted
        ]
        assert sorted(found) == sorted(told)


def test_cells_of_a_row_hold_every_column_that_spells_once() -> None:
    rng = np.random.default_rng(7)
    vocabulary = random_vocabulary(rng, 60)
    text = rng.integers(97, 101, 30).astype(np.uint8)
    at_R, end_R = np.arange(30), np.full(30, 30)
    paths = vocabulary.trie.walk(text, at_R, end_R)
    cells = row_cells(vocabulary.trie, paths, at_R, np.arange(60), 60)
    for row in range(30):
        end = int(cells.num_cells_R[: row + 1].sum())
        own = range(end - int(cells.num_cells_R[row]), end)
        columns = [column for i in own for column in range(cells.first_I[i], cells.last_I[i])]
        assert sorted(columns) == list(range(vocabulary.num_text_tokens))


def test_no_rows_have_no_cells() -> None:
    trie, nothing = random_vocabulary(np.random.default_rng(0), 4).trie, np.empty(0, dtype=np.int64)
    paths = trie.walk(np.empty(0, dtype=np.uint8), nothing, nothing)
    assert all(len(part) == 0 for part in row_cells(trie, paths, nothing, nothing, 0))
