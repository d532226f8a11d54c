"""The column ranges that rows of a teacher are summed over, flat, for all rows of some documents.

Shape legend: R rows, N nodes of all rows in turn, the deepest of a row first, K cuts of all nodes in turn, I intervals of all nodes
in turn (a node's cuts less one).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Intervals(NamedTuple):
    """The column ranges that some rows are summed over, flat; all int64, made before the teacher runs.

    Node n owns cuts `node_cuts[n] .. node_cuts[n + 1]`; its intervals lie between consecutive ones. In a row the deepest node
    comes first and the root last, and the range of each is one interval of the next.
    """

    cuts_K: np.ndarray
    node_cuts: np.ndarray  # N + 1
    row_nodes: np.ndarray  # R + 1: row r owns nodes row_nodes[r] .. row_nodes[r + 1]
    positions_N: np.ndarray  # where a node's symbols lie in the document
    num_exact_N: np.ndarray  # how many of its first intervals hold a token each that ends there
    offsets_R: np.ndarray
    columns_R: np.ndarray  # of the canonical token that follows; -1 where none does

    @property
    def num_rows(self) -> int:
        return len(self.offsets_R)

    @property
    def row_intervals(self) -> np.ndarray:
        """R + 1: row r owns intervals row_intervals[r] .. row_intervals[r + 1]."""
        return self.node_cuts[self.row_nodes] - self.row_nodes

    @staticmethod
    def join(parts: Sequence["Intervals"]) -> "Intervals":
        """The rows of several documents in turn."""
        joined = [np.concatenate([part[field] for part in parts]) for field in range(len(Intervals._fields))]
        return Intervals(*joined)._replace(
            node_cuts=_starts([np.diff(part.node_cuts) for part in parts]),
            row_nodes=_starts([np.diff(part.row_nodes) for part in parts]),
        )


def _starts(sizes: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], *sizes]).cumsum(dtype=np.int64)


def exact_intervals(intervals: Intervals) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and numbers of the intervals that hold one token that ends."""
    num_exact_N = intervals.num_exact_N
    first_N = intervals.node_cuts[:-1] - np.arange(len(num_exact_N))
    before_N = num_exact_N.cumsum() - num_exact_N
    exact_I: np.ndarray = (first_N - before_N).repeat(num_exact_N)
    exact_I += np.arange(len(exact_I))
    return np.arange(len(num_exact_N)).repeat(num_exact_N), exact_I
