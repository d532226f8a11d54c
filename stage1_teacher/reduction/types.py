"""Types of the reduction: its input, its output and the kernel.

Shape legend: R rows, V token ids, I intervals of all rows in turn.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.covering.covering import Covering
from pipeline.covering.intervals import Intervals
from pipeline.covering.trie import Trie


class RowsAlong(NamedTuple):
    """Consecutive rows of one prompt, and the text along which each of them is summed.

    Attributes:
        first: index of the prompt's token after which the first row stands.
        document: the text; a row needs no more of it than the longest token has bytes.
        offsets_R: int64; the byte of `document` from which each row continues.
        columns_R: int64; column of the token whose probability is wanted too; -1 for none.
    """

    first: int
    document: bytes
    offsets_R: np.ndarray
    columns_R: np.ndarray

    @staticmethod
    def canonical(covering: Covering, first: int) -> "RowsAlong":
        """Return the canonical rows of a covering."""
        return RowsAlong(first, covering.document, covering.offsets, covering.canonical.columns_R)

    @staticmethod
    def single(covering: Covering, offset: int, first: int) -> "RowsAlong":
        """Return one row of a covering, canonical or not, with only as much of the text as it needs."""
        ahead = covering.document[offset : offset + covering.vocabulary.longest]
        column_R = covering.intervals([offset]).columns_R
        return RowsAlong(first, ahead, np.zeros(1, dtype=np.int64), column_R)

    @property
    def num_rows(self) -> int:
        return len(self.offsets_R)

    def intervals(self, trie: Trie) -> Intervals:
        """Return the rows' intervals."""
        return Intervals.along(trie, self.document, self.offsets_R, self.columns_R)


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

    def some_rows(self, first: int, last: int) -> "Masses":
        """Return rows `first .. last - 1`, as views."""
        bounds = self.row_intervals[first : last + 1]
        rows = slice(first, last)
        return Masses(self.masses_I[bounds[0] : bounds[-1]], self.end_R[rows], self.token_R[rows], bounds - bounds[0])

    @staticmethod
    def join(parts: Sequence["Masses"]) -> "Masses":
        """Join the masses of rows in order."""
        counts = np.concatenate([[0], *(np.diff(part.row_intervals) for part in parts)])
        masses_I, end_R, token_R = (np.concatenate([part[field] for part in parts]) for field in range(3))
        return Masses(masses_I, end_R, token_R, counts.cumsum(dtype=np.int64))


class DeviceMasses(NamedTuple):
    """Masses of reduced rows on the device that reduced them, flat: probabilities, float32."""

    masses_I: Tensor
    end_R: Tensor
    token_R: Tensor  # of the token in columns_R; nan where that is -1
    row_intervals: np.ndarray  # R + 1

    @staticmethod
    def empty(intervals: Intervals, device: torch.device) -> "DeviceMasses":
        bounds = intervals.row_intervals
        sizes = (int(bounds[-1]), intervals.num_rows, intervals.num_rows)
        masses_I, end_R, token_R = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
        return DeviceMasses(masses_I, end_R, token_R, bounds)

    def some_rows(self, first: int, last: int) -> "DeviceMasses":
        """Return rows `first .. last - 1`, as views."""
        bounds = self.row_intervals[first : last + 1]
        masses_I = self.masses_I[int(bounds[0]) : int(bounds[-1])]
        return DeviceMasses(masses_I, self.end_R[first:last], self.token_R[first:last], bounds - bounds[0])

    @staticmethod
    def join(parts: Sequence["DeviceMasses"]) -> "DeviceMasses":
        """Join the masses of rows in order."""
        counts = np.concatenate([[0], *(np.diff(part.row_intervals) for part in parts)])
        return DeviceMasses(
            torch.cat([part.masses_I for part in parts]),
            torch.cat([part.end_R for part in parts]),
            torch.cat([part.token_R for part in parts]),
            counts.cumsum(dtype=np.int64),
        )

    def on_host(self) -> Masses:
        """Return the masses in the host's memory, in float64."""
        masses_I, end_R, token_R = (
            tensor.double().cpu().numpy() for tensor in (self.masses_I, self.end_R, self.token_R)
        )
        return Masses(masses_I, end_R, token_R, self.row_intervals)


Kept = TypeVar("Kept", Masses, DeviceMasses)


class Kernel(Protocol[Kept]):
    """A function that sums the softmax of some consecutive rows over their column ranges."""

    def empty(self, intervals: Intervals) -> Kept:
        """Return room for the masses of some rows."""

    def check(self) -> None:
        """Raise ValueError if a logit was not finite since the last check, unless the call has raised it."""

    def __call__(self, logits_RV: Tensor, first_row: int, intervals: Intervals, into: Kept) -> None:
        """Fill in the rows `first_row ..`, one for each row of `logits_RV`.

        Args:
            logits_RV: by token id, float32, with contiguous ids.

        Raises ValueError if a row's largest logit is not finite, or a logit is nan.
        """


NOT_FINITE = (
    "the teacher's logits are not finite: its weights are damaged, or its activations overflow teacher.dtype "
    "(a model made for bfloat16 may not run in float16)"
)
