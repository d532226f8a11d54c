"""Types of the reduction: its input, its output and the kernel.

Shape legend: R rows, D hidden size, C sorted columns, I intervals of all rows in turn.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from pipeline.covering.covering import Covering
from pipeline.covering.intervals import Intervals


class Rows(NamedTuple):
    """Rows of one document: the byte offset where each row's path ends, and the hidden state for the head."""

    covering: Covering
    offsets: Sequence[int] | np.ndarray
    hidden_RD: Tensor


class Masses(NamedTuple):
    """Masses of reduced rows, flat: probabilities, float64."""

    masses_I: np.ndarray
    end_R: np.ndarray
    token_R: np.ndarray  # of the token in columns_R; nan where that is -1
    row_intervals: np.ndarray  # R + 1: row r owns masses row_intervals[r] .. row_intervals[r + 1]

    @staticmethod
    def empty(intervals: Intervals) -> "Masses":
        bounds = intervals.row_intervals
        return Masses(np.empty(int(bounds[-1])), np.empty(intervals.num_rows), np.empty(intervals.num_rows), bounds)


class Kernel(Protocol):
    """A function that sums the softmax of some consecutive rows over their column ranges."""

    def __call__(self, logits_RC: Tensor, first_row: int, intervals: Intervals, into: Masses) -> None:
        """Fill in the rows `first_row ..`, one for each row of `logits_RC`.

        Raises ValueError if a logit is not finite.
        """


NOT_FINITE = (
    "the teacher's logits are not finite: its weights are damaged, or its activations overflow teacher.dtype "
    "(a model made for bfloat16 may not run in float16)"
)
