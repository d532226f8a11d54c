"""Types of the reduction: its input, its output and the kernel.

Shape legend: R rows, V token ids, I intervals of all rows in turn, K most probable tokens of each row.
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
        num_top: number of most probable tokens that are wanted of each row, too.
    """

    first: int
    document: bytes
    offsets_R: np.ndarray
    columns_R: np.ndarray
    num_top: int = 0

    @staticmethod
    def canonical(covering: Covering, first: int, num_top: int = 0) -> "RowsAlong":
        """Return the canonical rows of a covering."""
        return RowsAlong(first, covering.document, covering.offsets, covering.canonical.columns_R, num_top)

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
    top_ids_RK: np.ndarray  # int32, in descending probability, ties by ascending id
    top_logprobs_RK: np.ndarray  # float32
    row_intervals: np.ndarray  # R + 1: row r owns masses row_intervals[r] .. row_intervals[r + 1]

    @staticmethod
    def empty(intervals: Intervals, num_top: int = 0) -> "Masses":
        bounds, num_rows = intervals.row_intervals, intervals.num_rows
        return Masses(
            np.empty(int(bounds[-1])),
            np.empty(num_rows),
            np.empty(num_rows),
            np.empty((num_rows, num_top), dtype=np.int32),
            np.empty((num_rows, num_top), dtype=np.float32),
            bounds,
        )

    def some_rows(self, first: int, last: int, num_top: int = 0) -> "Masses":
        """Return rows `first .. last - 1` with some of their most probable tokens, as views."""
        bounds = self.row_intervals[first : last + 1]
        return Masses(
            self.masses_I[bounds[0] : bounds[-1]],
            self.end_R[first:last],
            self.token_R[first:last],
            self.top_ids_RK[first:last, :num_top],
            self.top_logprobs_RK[first:last, :num_top],
            bounds - bounds[0],
        )

    @staticmethod
    def join(parts: Sequence["Masses"]) -> "Masses":
        """Join the masses of rows in order."""
        return Masses(
            np.concatenate([part.masses_I for part in parts]),
            np.concatenate([part.end_R for part in parts]),
            np.concatenate([part.token_R for part in parts]),
            np.concatenate([part.top_ids_RK for part in parts]),
            np.concatenate([part.top_logprobs_RK for part in parts]),
            _joined_bounds(parts),
        )


class DeviceMasses(NamedTuple):
    """Masses of reduced rows on the device that reduced them, flat: probabilities, float32."""

    masses_I: Tensor
    end_R: Tensor
    token_R: Tensor  # of the token in columns_R; nan where that is -1
    top_ids_RK: Tensor  # int32, in descending probability, ties by ascending id
    top_logprobs_RK: Tensor
    row_intervals: np.ndarray  # R + 1

    @staticmethod
    def empty(intervals: Intervals, num_top: int, device: torch.device) -> "DeviceMasses":
        bounds, num_rows = intervals.row_intervals, intervals.num_rows
        sizes = ((int(bounds[-1]),), (num_rows,), (num_rows,))
        masses_I, end_R, token_R = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
        top_ids_RK = torch.empty((num_rows, num_top), dtype=torch.int32, device=device)
        top_logprobs_RK = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
        return DeviceMasses(masses_I, end_R, token_R, top_ids_RK, top_logprobs_RK, bounds)

    def some_rows(self, first: int, last: int, num_top: int = 0) -> "DeviceMasses":
        """Return rows `first .. last - 1` with some of their most probable tokens, as views."""
        bounds = self.row_intervals[first : last + 1]
        return DeviceMasses(
            self.masses_I[int(bounds[0]) : int(bounds[-1])],
            self.end_R[first:last],
            self.token_R[first:last],
            self.top_ids_RK[first:last, :num_top],
            self.top_logprobs_RK[first:last, :num_top],
            bounds - bounds[0],
        )

    @staticmethod
    def join(parts: Sequence["DeviceMasses"]) -> "DeviceMasses":
        """Join the masses of rows in order."""
        return DeviceMasses(
            torch.cat([part.masses_I for part in parts]),
            torch.cat([part.end_R for part in parts]),
            torch.cat([part.token_R for part in parts]),
            torch.cat([part.top_ids_RK for part in parts]),
            torch.cat([part.top_logprobs_RK for part in parts]),
            _joined_bounds(parts),
        )

    def on_host(self) -> Masses:
        """Return the masses in the host's memory, in float64."""
        masses_I, end_R, token_R = (
            tensor.double().cpu().numpy() for tensor in (self.masses_I, self.end_R, self.token_R)
        )
        top_ids_RK, top_logprobs_RK = self.top_ids_RK.cpu().numpy(), self.top_logprobs_RK.cpu().numpy()
        return Masses(masses_I, end_R, token_R, top_ids_RK, top_logprobs_RK, self.row_intervals)


def _joined_bounds(parts: Sequence[Masses] | Sequence[DeviceMasses]) -> np.ndarray:
    counts = np.concatenate([[0], *(np.diff(part.row_intervals) for part in parts)])
    return counts.cumsum(dtype=np.int64)


Kept = TypeVar("Kept", Masses, DeviceMasses)


class Kernel(Protocol[Kept]):
    """A function that sums the softmax of some consecutive rows over their column ranges."""

    def empty(self, intervals: Intervals, num_top: int = 0) -> Kept:
        """Return room for the masses of some rows, and for so many of each one's most probable tokens."""

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
