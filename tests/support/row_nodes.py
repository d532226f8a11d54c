"""Nodes of a row one by one, for code that looks at each.

The covering holds those of all rows flat.
"""

from typing import NamedTuple

import numpy as np

from pipeline.covering.covering import Covering


class RowNode(NamedTuple):
    """A node; `cuts`: columns, one more than intervals; `labels`: per interval, 0 for exact ones, which come first."""

    cuts: np.ndarray
    labels: np.ndarray
    num_complete: int


def row_nodes(covering: Covering, offset: int) -> list[RowNode]:
    """Return the nodes of a row that ends at `offset`, the deepest first, the root last."""
    found = covering.intervals([offset])
    first_I, last_I = found.column_ranges()
    bounds = found.node_sizes.cumsum()[:-1]
    cuts = [
        np.append(first, last[-1])
        for first, last in zip(*(np.split(x, bounds) for x in (first_I, last_I)), strict=True)
    ]
    labels = np.split(found.trie.labels(found.nodes_N), bounds)
    return [RowNode(*node) for node in zip(cuts, labels, found.node_complete.tolist(), strict=True)]
