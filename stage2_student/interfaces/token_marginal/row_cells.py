"""The cells of rows that walk a text through the trie of a vocabulary, compiled by numba: no Python per token.

A row's cells are what remains of its nodes when each node loses the interval that the walk continues into.

Shape legend: N nodes of all rows in turn, R rows, I cells of all rows in turn, Q positions.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from pipeline.covering.trie import COMPLETE, Paths, Trie
from schemas import NUM_SYMBOLS


class RowCells(NamedTuple):
    """The cells of some rows, in the fields of `Plan`."""

    num_cells_R: np.ndarray
    first_I: np.ndarray
    last_I: np.ndarray
    node_I: np.ndarray
    fed_I: np.ndarray
    is_complete_I: np.ndarray


def row_cells(trie: Trie, paths: Paths, position_R: np.ndarray, unique_Q: np.ndarray, num_unique: int) -> RowCells:
    """Return the cells of rows, from the root down.

    Args:
        position_R: index of each row's position among the Q positions.
        unique_Q: see `Plan`; `num_unique` for positions that are not requested.
    """
    before_N = np.append(0, trie.sizes(paths.node_N).cumsum())
    edges = np.append(0, paths.num_nodes_R.cumsum())
    num_cells_R = np.diff(before_N[edges]) - (paths.num_nodes_R - 1)
    first_I, last_I, node_I, fed_I = (np.empty(int(num_cells_R.sum()), dtype=np.int32) for _ in range(4))
    into = RowCells(num_cells_R, first_I, last_I, node_I, fed_I, np.empty(len(first_I), dtype=np.bool_))
    max_nodes = int(paths.num_nodes_R.max(initial=1))
    _fill(trie, paths.node_N, paths.num_nodes_R, position_R, unique_Q, num_unique, max_nodes, into)
    return into


@njit(nogil=True)
def _fill(
    trie: Any, node_N: Any, num_nodes_R: Any, position_R: Any, unique_Q: Any, num_unique: int, max_nodes: int, into: Any
) -> None:  # fmt: skip
    i, n = 0, 0
    for r in range(len(num_nodes_R)):
        for depth in range(num_nodes_R[r]):
            node, unique = node_N[n], unique_Q[position_R[r] + depth]
            n += 1
            # 0 for the last node: no interval leads to the root.
            next_node = node_N[n] if depth + 1 < num_nodes_R[r] else np.int64(0)
            for j in range(trie.start_N[node], trie.start_N[node + 1]):
                if trie.child_J[j] == next_node:
                    continue
                is_complete = trie.symbol_J[j] == COMPLETE
                is_fed = unique < num_unique and not is_complete
                into.first_I[i], into.last_I[i] = trie.first_J[j], trie.last_J[j]
                into.node_I[i] = r * max_nodes + depth
                into.fed_I[i] = unique * NUM_SYMBOLS + trie.symbol_J[j] if is_fed else num_unique * NUM_SYMBOLS
                into.is_complete_I[i] = is_complete
                i += 1
