"""Column ranges that a teacher's rows are summed over, in flat arrays for all rows of some documents.

Shape legend: R rows, N nodes of all rows in order, a row's deepest first, I intervals of all nodes in order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.covering.trie import Trie


class Intervals(NamedTuple):
    """Intervals of the trie's nodes along the documents, over which some rows are summed; all int64.

    A row's deepest node comes first and the root last, and each node's range is one interval of the next.
    """

    trie: Trie
    nodes_N: np.ndarray
    row_nodes: np.ndarray  # R + 1: row r owns nodes row_nodes[r] .. row_nodes[r + 1]
    positions_N: np.ndarray  # position of a node's symbols in the document
    offsets_R: np.ndarray
    columns_R: np.ndarray  # column of the canonical token that follows; -1 if none does

    @staticmethod
    def along(trie: Trie, document: bytes, offsets_R: np.ndarray, columns_R: np.ndarray) -> "Intervals":
        """Return the intervals of rows whose paths end at `offsets_R`, int64.

        Each row goes as deep as any token continues like the document.
        """
        text = np.frombuffer(document, dtype=np.uint8)
        num_nodes_R, node_N = trie.walk(text, offsets_R, np.full(len(offsets_R), len(text)))
        row_nodes = np.append(0, num_nodes_R.cumsum())
        heights_N = row_nodes[1:].repeat(num_nodes_R) - 1 - np.arange(len(node_N))
        deepest_first_N = node_N[row_nodes[:-1].repeat(num_nodes_R) + heights_N]
        return Intervals(
            trie, deepest_first_N, row_nodes, offsets_R.repeat(num_nodes_R) + heights_N, offsets_R, columns_R
        )

    @property
    def num_rows(self) -> int:
        return len(self.offsets_R)

    @property
    def node_sizes(self) -> np.ndarray:
        """Return the number of intervals of each node (N)."""
        return self.trie.sizes(self.nodes_N)

    @property
    def node_complete(self) -> np.ndarray:
        """Return how many of each node's first intervals (N) hold one token that ends there."""
        return self.trie.num_complete_N[self.nodes_N]

    @property
    def row_intervals(self) -> np.ndarray:
        """Return R + 1 bounds: row r owns intervals row_intervals[r] .. row_intervals[r + 1]."""
        return np.concatenate([[0], self.node_sizes.cumsum()])[self.row_nodes]

    def column_ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first column of each interval and the one after its last."""
        interval_I = self.trie.intervals(self.nodes_N)
        return self.trie.first_J[interval_I], self.trie.last_J[interval_I]

    def some_rows(self, first: int, last: int) -> "Intervals":
        """Return the intervals of rows `first .. last - 1`."""
        nodes = slice(int(self.row_nodes[first]), int(self.row_nodes[last]))
        return Intervals(
            self.trie,
            self.nodes_N[nodes],
            self.row_nodes[first : last + 1] - self.row_nodes[first],
            self.positions_N[nodes],
            self.offsets_R[first:last],
            self.columns_R[first:last],
        )

    @staticmethod
    def join(parts: Sequence["Intervals"]) -> "Intervals":
        """Join the intervals of several documents in order; all have one vocabulary."""
        joined = [np.concatenate([part[field] for part in parts]) for field in range(1, len(Intervals._fields))]
        counts = np.concatenate([[0], *(np.diff(part.row_nodes) for part in parts)])
        return Intervals(parts[0].trie, *joined)._replace(row_nodes=counts.cumsum(dtype=np.int64))


def complete_intervals(intervals: Intervals) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes (of N) and numbers (of I) of the intervals that hold one complete token."""
    sizes_N, num_complete_N = intervals.node_sizes, intervals.node_complete
    first_N = sizes_N.cumsum() - sizes_N
    before_N = num_complete_N.cumsum() - num_complete_N
    complete_I: np.ndarray = (first_N - before_N).repeat(num_complete_N)
    complete_I += np.arange(len(complete_I))
    return np.arange(len(num_complete_N)).repeat(num_complete_N), complete_I
