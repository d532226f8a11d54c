"""A row's nodes one by one, for what looks at each: the covering holds those of all rows flat."""

from typing import NamedTuple

import numpy as np

from pipeline.covering.covering import Covering


class RowNode(NamedTuple):
    """`cuts`: columns, one more than intervals; `labels`: of each interval, 0 for the exact ones, which come first."""

    cuts: np.ndarray
    labels: np.ndarray
    num_exact: int


def row_nodes(covering: Covering, offset: int) -> list[RowNode]:
    """Of a row that ends at `offset`, the deepest first, the root last."""
    found = covering.intervals([offset])
    cuts = np.split(found.cuts_K, found.node_cuts[1:-1])
    labels = np.split(covering.labels([offset]), (np.diff(found.node_cuts) - 1).cumsum()[:-1])
    return [RowNode(*node) for node in zip(cuts, labels, found.num_exact_N.tolist(), strict=True)]
