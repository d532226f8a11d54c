"""Trie of a vocabulary's byte prefixes in flat arrays, and walks of a text through it.

The teacher's covering and the student's both use it. A node is a byte prefix that at least one token starts with. Its
intervals are column ranges of a sorted vocabulary: first one for each token that spells exactly the prefix, then one
for each symbol that tokens continue with. Nothing loops over tokens in Python.

Shape legend: T tokens in byte order, N nodes (of the trie, or of rows in order), J intervals of all nodes of the trie
in order, I intervals of some nodes in order, R rows: places in a text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.covering.walk_numba import walk

COMPLETE = -1  # instead of a symbol: the interval holds a token that ends here


class Paths(NamedTuple):
    """Nodes along a text from each of some places, the root first."""

    num_nodes_R: np.ndarray  # int64, 1 or more
    node_N: np.ndarray  # int64


class Trie(NamedTuple):
    """Byte prefixes of a vocabulary and their intervals; columns and nodes are int32."""

    start_N: np.ndarray  # N + 1, int64: node n owns intervals start_N[n] .. start_N[n + 1]; the root is node 0
    num_complete_N: np.ndarray  # int64, how many of its first intervals are `COMPLETE`
    first_J: np.ndarray  # columns first_J .. last_J - 1
    last_J: np.ndarray
    symbol_J: np.ndarray  # ascending within a node; COMPLETE comes first
    child_J: np.ndarray  # the node that the interval leads to; COMPLETE where none

    @classmethod
    def of(cls, sorted_bytes: Sequence[bytes]) -> "Trie":
        """Build the trie of tokens in byte order; a token's index is its column."""
        length_T = np.array([len(token) for token in sorted_bytes], dtype=np.int64)
        start_T = np.cumsum(length_T) - length_T
        flat = np.frombuffer(b"".join(sorted_bytes) + b"\0", dtype=np.uint8)
        # Columns and nodes of the tokens with at least `depth` bytes.
        column, node = np.arange(len(length_T)), np.zeros(len(length_T), dtype=np.int64)
        levels, num_nodes, depth = [np.empty((5, 0), dtype=np.int64)], 1, 0
        while len(column):
            ends = length_T[column] == depth
            symbol = np.where(ends, COMPLETE, flat[start_T[column] + depth].astype(np.int64))
            begins = np.append(True, ends[1:] | (symbol[1:] != symbol[:-1]) | (node[1:] != node[:-1]))
            at = np.flatnonzero(begins)
            last = column[np.append(at[1:], len(column)) - 1] + 1
            child = np.where(ends[at], COMPLETE, num_nodes - 1 + np.cumsum(~ends[at]))
            levels.append(np.stack([node[at], column[at], last, symbol[at], child]))
            num_nodes += int((~ends[at]).sum())
            node = child[np.cumsum(begins) - 1][~ends]
            column, depth = column[~ends], depth + 1
        node_J, *columns_J = np.concatenate(levels, axis=1)
        first_J, last_J, symbol_J, child_J = (column_J.astype(np.int32) for column_J in columns_J)
        start_N = np.searchsorted(node_J, np.arange(num_nodes + 1))
        num_complete_N = np.bincount(node_J[symbol_J == COMPLETE], minlength=num_nodes)
        return cls(start_N, num_complete_N, first_J, last_J, symbol_J, child_J)

    def walk(self, text: np.ndarray, at_R: np.ndarray, end_R: np.ndarray) -> Paths:
        """Follow `text` (uint8) from byte `at_R`, before `end_R`, as deep as any token reaches."""
        return Paths(*walk(self.start_N, self.symbol_J, self.child_J, text, at_R, end_R))

    def sizes(self, node_N: np.ndarray) -> np.ndarray:
        """Return the number of intervals of these nodes (N)."""
        return self.start_N[node_N + 1] - self.start_N[node_N]

    def intervals(self, node_N: np.ndarray) -> np.ndarray:
        """Return the numbers of these nodes' intervals (I)."""
        sizes_N = self.sizes(node_N)
        interval_I: np.ndarray = (self.start_N[node_N] - sizes_N.cumsum() + sizes_N).repeat(sizes_N)
        interval_I += np.arange(len(interval_I))
        return interval_I

    def labels(self, node_N: np.ndarray) -> np.ndarray:
        """Return the symbol of each of these nodes' intervals (I, int64); 0 for an exact one."""
        return np.maximum(self.symbol_J[self.intervals(node_N)], 0).astype(np.int64)
