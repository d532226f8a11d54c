"""The trie of a vocabulary's bytes in flat arrays, and the cells of rows that walk it, compiled by numba: no Python for each token.

A node is a byte prefix that at least one token starts with, as `pipeline.covering.vocabulary.Node` is; its intervals are column ranges, first
one for each token that spells just the prefix, then one for each symbol that tokens go on with. A row walks the text from where it
stands, as deep as any token reaches. What is left of its nodes when the interval that the walk goes into is taken out of each, are the
row's cells.

Shape legend: N nodes of the trie, J their intervals in turn, R rows, I cells of all rows in turn.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from pipeline.covering.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS

EXACT = -1  # in place of a symbol: the interval holds a token that ends here


class Trie(NamedTuple):
    """All int32."""

    start_N: np.ndarray  # N + 1: node n owns intervals start_N[n] .. start_N[n + 1]; the root is node 0
    first_J: np.ndarray  # columns first_J .. last_J - 1
    last_J: np.ndarray
    symbol_J: np.ndarray  # rising within a node; EXACT comes first
    child_J: np.ndarray  # the node that the interval leads to; EXACT where none

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "Trie":
        lengths = np.array([len(b) for b in vocabulary.sorted_bytes], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(*_build(np.frombuffer(b"".join(vocabulary.sorted_bytes), dtype=np.uint8), starts))


class Walks(NamedTuple):
    """Of each row: how deep it goes, and how many cells it leaves. int64."""

    num_nodes_R: np.ndarray
    num_cells_R: np.ndarray


class RowCells(NamedTuple):
    """See `Plan`."""

    first_I: np.ndarray
    last_I: np.ndarray
    node_I: np.ndarray
    fed_I: np.ndarray
    is_exact_I: np.ndarray


def walk(trie: Trie, text: np.ndarray, at_R: np.ndarray, end_R: np.ndarray) -> Walks:
    """Follow each row along `text` (uint8) from byte `at_R`, before `end_R`."""
    return Walks(*_walk(trie, text, at_R, end_R))


def row_cells(
    trie: Trie, text: np.ndarray, at_R: np.ndarray, end_R: np.ndarray, walks: Walks, position_R: np.ndarray, unique_Q: np.ndarray, num_unique: int
) -> RowCells:  # fmt: skip
    """The cells of rows, from the root down.

    Args:
        position_R: where each row stands among the Q positions.
        unique_Q: see `Plan`; `num_unique` where a position is not asked for.
    """
    num_cells = int(walks.num_cells_R.sum())
    first_I, last_I, node_I, fed_I = (np.empty(num_cells, dtype=np.int32) for _ in range(4))
    into = RowCells(first_I, last_I, node_I, fed_I, np.empty(num_cells, dtype=np.bool_))
    most_nodes = int(walks.num_nodes_R.max(initial=1))
    _fill(trie, text, at_R, end_R, walks.num_nodes_R, position_R, unique_Q, num_unique, most_nodes, into)
    return into


@njit(nogil=True)
def _build(flat: Any, starts: Any) -> Any:
    num_tokens = len(starts) - 1
    # A node is a prefix of a token; an interval leads to one node, or holds one token.
    most = len(flat) + 1
    low_N, high_N, depth_N = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
    start_N, intervals = np.empty(most + 1, np.int32), np.empty((4, most + num_tokens), np.int32)
    low_N[0], high_N[0], depth_N[0] = 0, num_tokens, 0
    num_nodes, n, j = 1, 0, 0
    while n < num_nodes:
        start_N[n] = j
        column, depth = low_N[n], depth_N[n]
        while column < high_N[n] and starts[column + 1] - starts[column] == depth:
            intervals[:, j] = np.array([column, column + 1, EXACT, EXACT], dtype=np.int32)
            column, j = column + 1, j + 1
        while column < high_N[n]:
            symbol, last = flat[starts[column] + depth], column + 1
            while last < high_N[n] and flat[starts[last] + depth] == symbol:
                last += 1
            intervals[:, j] = np.array([column, last, symbol, num_nodes], dtype=np.int32)
            low_N[num_nodes], high_N[num_nodes], depth_N[num_nodes] = column, last, depth + 1
            num_nodes, column, j = num_nodes + 1, last, j + 1
        n += 1
    start_N[n] = j
    return start_N[: n + 1].copy(), intervals[0, :j].copy(), intervals[1, :j].copy(), intervals[2, :j].copy(), intervals[3, :j].copy()  # fmt: skip


@njit(nogil=True)
def _next_interval(trie: Any, node: int, text: Any, at: int, end: int) -> int:
    """The interval of a node that the text goes into at byte `at`; -1 where it ends, or no token goes on so."""
    if at >= end:
        return -1
    low, high = trie.start_N[node], trie.start_N[node + 1]
    last, symbol = high, np.int32(text[at])
    while low < high:
        middle = (low + high) // 2
        if trie.symbol_J[middle] < symbol:
            low = middle + 1
        else:
            high = middle
    return low if low < last and trie.symbol_J[low] == symbol else -1


@njit(nogil=True)
def _walk(trie: Any, text: Any, at_R: Any, end_R: Any) -> Any:
    num_nodes_R, num_cells_R = np.empty(len(at_R), np.int64), np.empty(len(at_R), np.int64)
    for r in range(len(at_R)):
        node, depth, num_cells = 0, 0, 0
        while True:
            num_cells += trie.start_N[node + 1] - trie.start_N[node]
            taken = _next_interval(trie, node, text, at_R[r] + depth, end_R[r])
            depth += 1
            if taken < 0:
                break
            num_cells -= 1
            node = trie.child_J[taken]
        num_nodes_R[r], num_cells_R[r] = depth, num_cells
    return num_nodes_R, num_cells_R


@njit(nogil=True)
def _fill(
    trie: Any, text: Any, at_R: Any, end_R: Any, num_nodes_R: Any, position_R: Any, unique_Q: Any, num_unique: int, most_nodes: int, into: Any
) -> None:  # fmt: skip
    i = 0
    for r in range(len(at_R)):
        node = 0
        for depth in range(num_nodes_R[r]):
            taken = _next_interval(trie, node, text, at_R[r] + depth, end_R[r])
            unique = unique_Q[position_R[r] + depth]
            for j in range(trie.start_N[node], trie.start_N[node + 1]):
                if j == taken:
                    continue
                is_exact = trie.symbol_J[j] == EXACT
                is_fed = unique < num_unique and not is_exact
                into.first_I[i], into.last_I[i] = trie.first_J[j], trie.last_J[j]
                into.node_I[i] = r * most_nodes + depth
                into.fed_I[i] = unique * NUM_SYMBOLS + trie.symbol_J[j] if is_fed else num_unique * NUM_SYMBOLS
                into.is_exact_I[i] = is_exact
                i += 1
            node = trie.child_J[taken]
