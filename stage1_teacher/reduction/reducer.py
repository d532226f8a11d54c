"""Reduction of hidden states to rows: the head, its softmax and the sums over column ranges, a chunk at a time.

A row is specified by the byte offset where its path ends, whichever path that is: canonical and other rows cost the
same. Rows of several documents share a product with the head, which reads all of its weights each time.

Shape legend: R rows, D hidden size, C sorted columns, I intervals of all rows in turn.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pipeline.covering.covering import ReducedRow
from pipeline.covering.intervals import Intervals
from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.reduction.head import Head
from stage1_teacher.reduction.types import NOT_FINITE, Kernel, Masses, Rows


class CpuKernel:
    """A kernel that distributes rows over one thread per core; `stage1_teacher.reduction.cpu_kernel` does the work."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        cores = os.sched_getaffinity(0)
        # vLLM binds the thread that starts it to one core, and new threads would inherit that.
        self._threads = ThreadPoolExecutor(len(cores), "reduce", os.sched_setaffinity, (0, cores))
        self._num_threads = len(cores)

    @cached_property
    def _reduce_range(self) -> Callable[..., bool]:
        from stage1_teacher.reduction.cpu_kernel import reduce_range

        return reduce_range  # compiled when first called, in about two seconds

    def __call__(self, logits_RC: Tensor, first_row: int, intervals: Intervals, into: Masses) -> None:
        bounds = np.linspace(0, len(logits_RC), min(self._num_threads, len(logits_RC)) + 1).astype(int).tolist()
        logits = logits_RC.numpy()
        vocabulary = self._vocabulary
        shares = [
            self._threads.submit(
                self._reduce_range,
                logits[first:last],
                first_row + first,
                int(into.row_intervals[first_row + first]),
                intervals,
                vocabulary.num_text_tokens,
                vocabulary.num_end,
                into.masses_I,
                into.end_R,
                into.token_R,
            )
            for first, last in pairwise(bounds)
        ]
        is_finite = [share.result() for share in shares]
        if not all(is_finite):
            raise ValueError(NOT_FINITE)


class Reducer:
    """A head with the kernel for its device.

    Args:
        chunk: rows whose logits are held at once; a product with the head reads all of its weights. None: 256 on a CPU
            (with 49,152 columns, chunks of 128 took a tenth longer per row, and of 512 a twentieth less), 1024 on a GPU
            (not measured).
    """

    def __init__(self, head: Head, vocabulary: Vocabulary, chunk: int | None = None) -> None:
        self.head, self.vocabulary = head, vocabulary
        self.chunk = chunk or (1024 if head.weight_CD.is_cuda else 256)
        self.kernel = open_kernel(head, vocabulary)
        self._turn = threading.Lock()  # one buffer for logits; the audit and the dump's other thread both reduce

    def reduce(self, parts: Sequence[Rows]) -> list[list[ReducedRow]]:
        """Reduce the rows of each part, in order. Raises ValueError for hidden states or logits that are not finite."""
        if not parts:
            return []
        intervals = Intervals.join([part.covering.intervals(part.offsets) for part in parts])
        hidden_RD = torch.cat([part.hidden_RD for part in parts])
        if not bool(torch.isfinite(hidden_RD).all()):
            raise ValueError(NOT_FINITE)
        masses = Masses.empty(intervals)
        with self._turn:
            for first, last in pairwise(even_bounds(len(hidden_RD), self.chunk)):
                self.kernel(self.head.logits(hidden_RD[first:last]), first, intervals, masses)
        rows = as_rows(intervals, masses)
        bounds = np.cumsum([0, *(len(part.offsets) for part in parts)]).tolist()
        return [rows[first:last] for first, last in pairwise(bounds)]


def open_kernel(head: Head, vocabulary: Vocabulary) -> Kernel:
    """Return the kernel for the head's device."""
    if head.weight_CD.is_cuda:
        from stage1_teacher.reduction.triton_kernel import TritonKernel  # CUDA builds of torch bring Triton along

        return TritonKernel(vocabulary)
    return CpuKernel(vocabulary)


def even_bounds(count: int, max_size: int) -> list[int]:
    """Return the bounds of the fewest chunks of at most `max_size`, all of similar length.

    A short last chunk would cost as much as a long one.
    """
    num_chunks = -(-count // max_size)
    return [count * i // num_chunks for i in range(num_chunks + 1)] if count else []


def as_rows(intervals: Intervals, masses: Masses) -> list[ReducedRow]:
    """Split masses into rows, as views; nothing is copied."""
    bounds = masses.row_intervals.tolist()
    return [
        ReducedRow(offset, masses.masses_I[first:last], end, token)
        for offset, (first, last), end, token in zip(
            intervals.offsets_R.tolist(), pairwise(bounds), masses.end_R.tolist(), masses.token_R.tolist(), strict=True
        )
    ]
