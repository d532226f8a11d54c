"""Reduction of a model's own logits to sums over column ranges, a chunk of rows at a time.

Logits of a chunk are summed as soon as they exist, so that no more than a chunk of them is ever held. A row is
specified by the text that may follow it, whichever path led there: canonical and other rows cost the same.

Shape legend: R rows, T tokens, D hidden size, V token ids, I intervals of all rows in turn.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.intervals import Intervals
from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.reduction.types import NOT_FINITE, DeviceMasses, Kernel, Masses, RowsAlong

# Rows whose logits are held at once; a product with the head reads all of its weights. With 49,152 columns, chunks of
# 128 took a tenth longer per row on a CPU than of 256, and of 512 a twentieth less. Not measured on a GPU.
CHUNK_CPU, CHUNK_GPU = 256, 1024


class CpuKernel:
    """A kernel that distributes rows over one thread per core; `stage1_teacher.reduction.cpu_kernel` does the work.

    Args:
        cores: those to use; default: all that this thread may run on. vLLM binds the thread that starts it to one core,
            and new threads would inherit that.
        in_byte_order: logits come by column of the vocabulary, not by token id.
    """

    def __init__(self, vocabulary: Vocabulary, cores: set[int] | None = None, in_byte_order: bool = False) -> None:
        self._vocabulary, self._in_byte_order = vocabulary, in_byte_order
        self._order_C = vocabulary.order.astype(np.int32)
        cores = cores or os.sched_getaffinity(0)
        self._threads = ThreadPoolExecutor(len(cores), "reduce", os.sched_setaffinity, (0, cores))
        self._num_threads = len(cores)

    @cached_property
    def _reduce_range(self) -> Callable[..., bool]:
        from stage1_teacher.reduction.cpu_kernel import reduce_range

        return reduce_range  # compiled when first called, in about two seconds

    def empty(self, intervals: Intervals, num_top: int = 0) -> Masses:
        return Masses.empty(intervals, num_top)

    def check(self) -> None:
        pass

    def __call__(self, logits_RV: Tensor, first_row: int, intervals: Intervals, into: Masses) -> None:
        bounds = np.linspace(0, len(logits_RV), min(self._num_threads, len(logits_RV)) + 1).astype(int).tolist()
        logits = logits_RV.numpy()
        vocabulary = self._vocabulary
        shares = [
            self._threads.submit(
                self._reduce_range,
                logits[first:last],
                self._order_C,
                self._in_byte_order,
                first_row + first,
                int(into.row_intervals[first_row + first]),
                intervals,
                vocabulary.num_text_tokens,
                vocabulary.num_end,
                into.masses_I,
                into.end_R,
                into.token_R,
                into.top_ids_RK,
                into.top_logprobs_RK,
            )
            for first, last in pairwise(bounds)
        ]
        is_finite = [share.result() for share in shares]
        if not all(is_finite):
            raise ValueError(NOT_FINITE)


class PromptRows:
    """Rows of one prompt that are being reduced, in the order in which an engine computes them.

    An engine that starts a prompt again after an interruption starts again at its first row.
    """

    def __init__(self, requests: Sequence[RowsAlong], intervals: Sequence[Intervals]) -> None:
        self._num_rows = [request.num_rows for request in requests]
        self.num_top = max((request.num_top for request in requests), default=0)
        self.index_R = np.concatenate([r.first + np.arange(r.num_rows) for r in requests])  # of each row's token
        if np.any(np.diff(self.index_R) < 0):
            raise ValueError("the rows of a prompt must be requested in order")
        self.intervals = Intervals.join(intervals)
        self._done: list[Masses] | list[DeviceMasses] = []

    @staticmethod
    def along(requests: Sequence[RowsAlong], vocabulary: Vocabulary) -> "PromptRows":
        """Return the rows of some requests, none of them reduced yet."""
        return PromptRows(requests, [request.intervals(vocabulary.trie) for request in requests])

    @staticmethod
    def canonical(coverings: Sequence[Covering], firsts: Sequence[int], num_top: int = 0) -> "PromptRows":
        """Return the canonical rows of some coverings, of which the first stands after token `firsts` of the prompt."""
        requests = [RowsAlong.canonical(*of_one, num_top) for of_one in zip(coverings, firsts, strict=True)]
        return PromptRows(requests, [covering.canonical for covering in coverings])

    def between(self, first: int, last: int) -> tuple[int, int]:
        """Return the range of the rows that stand after tokens `first .. last - 1` of the prompt."""
        start, stop = np.searchsorted(self.index_R, (first, last)).tolist()
        return start, stop

    def take(self, start: int, masses: Masses | DeviceMasses) -> None:
        """Take the masses of rows `start ..`. Raises RuntimeError if rows before them are missing."""
        if start == 0:
            self._done.clear()
        if start != self.num_done:
            raise RuntimeError(f"row {start} of a prompt was computed after row {self.num_done - 1}")
        self._done.append(masses)  # type: ignore[arg-type]

    @property
    def num_done(self) -> int:
        return sum(len(masses.end_R) for masses in self._done)

    def masses(self) -> Masses | DeviceMasses:
        """Return the masses of all rows, where they are. Raises RuntimeError if some were not computed."""
        if self.num_done < len(self.index_R):
            raise RuntimeError(
                f"the engine computed {self.num_done} of the {len(self.index_R)} rows requested of a prompt"
            )
        if not self._done:
            return Masses.empty(self.intervals, self.num_top)
        return self._done[0] if len(self._done) == 1 else type(self._done[0]).join(self._done)  # type: ignore[arg-type]

    def masses_on_host(self) -> Masses:
        """Return the masses of all rows in the host's memory."""
        masses = self.masses()
        return masses.on_host() if isinstance(masses, DeviceMasses) else masses

    def rows(self) -> list[list[ReducedRow]]:
        """Return the reduced rows of each request."""
        rows = as_rows(self.intervals, self.masses_on_host())
        bounds = np.cumsum([0, *self._num_rows]).tolist()
        return [rows[first:last] for first, last in pairwise(bounds)]


class ComputedRows(NamedTuple):
    """Some rows of a prompt, from `start` on, and what the model's head is applied to: R x D."""

    rows: PromptRows
    start: int
    states_RD: Tensor


class Reducer:
    """The reduction for a vocabulary on a device.

    Args:
        chunk: rows whose logits are held at once; None: `CHUNK_CPU` or `CHUNK_GPU`.
        cores, in_byte_order: see `CpuKernel`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        device: torch.device,
        chunk: int | None = None,
        cores: set[int] | None = None,
        in_byte_order: bool = False,
    ) -> None:
        self.vocabulary, self.chunk = vocabulary, default_chunk(device) if chunk is None else chunk
        self.kernel = _open_kernel(vocabulary, device, cores, in_byte_order)

    def reduce(self, computed: Sequence[ComputedRows], logits_of: Callable[[Tensor], Tensor | None]) -> None:
        """Reduce rows of several prompts together, and give each prompt its own.

        Args:
            logits_of: the model's own logits of some rows' states, R x V; None in a process that reduces nothing, as
                under tensor parallelism. It is called equally often in each process.
        Raises:
            ValueError: a logit is not finite. The head was applied to all chunks nevertheless, and the prompts have
                taken the rows, which are of no use, so that those of a next step can follow.
        """
        computed = [part for part in computed if len(part.states_RD)]
        if not computed:
            return
        parts = [part.rows.intervals.some_rows(part.start, part.start + len(part.states_RD)) for part in computed]
        intervals = Intervals.join(parts)
        states_RD = torch.cat([part.states_RD for part in computed])
        num_top = min(max(part.rows.num_top for part in computed), len(self.vocabulary.order))
        masses, is_here = self.kernel.empty(intervals, num_top), True
        fault: ValueError | None = None
        for first, last in pairwise(even_bounds(len(states_RD), self.chunk)):
            logits_RV = logits_of(states_RD[first:last])
            if logits_RV is None:
                is_here = False
                continue
            try:
                self._sum(logits_RV, first, intervals, masses)
            except ValueError as error:  # raised below: the other processes apply the head to the remaining chunks
                fault = fault or error
        try:
            self.kernel.check()
        except ValueError as error:
            fault = fault or error
        at = 0
        for part in computed if is_here else ():
            of_part = masses.some_rows(at, at + len(part.states_RD), part.rows.num_top)
            part.rows.take(part.start, of_part)
            at += len(part.states_RD)
        if fault is not None:
            raise fault

    def _sum(self, logits_RV: Tensor, first: int, intervals: Intervals, masses: Any) -> None:
        if logits_RV.shape[1] != len(self.vocabulary.order):
            raise ValueError(f"the model has logits of {logits_RV.shape[1]} ids, not {len(self.vocabulary.order)}")
        self.kernel(logits_RV.float(), first, intervals, masses)


def default_chunk(device: torch.device) -> int:
    """Return how many rows' logits are held at once on a device."""
    return CHUNK_GPU if device.type == "cuda" else CHUNK_CPU


def _open_kernel(
    vocabulary: Vocabulary, device: torch.device, cores: set[int] | None, in_byte_order: bool
) -> Kernel[Any]:
    if device.type == "cuda":
        assert not in_byte_order
        from stage1_teacher.reduction.triton_kernel import TritonKernel  # CUDA builds of torch bring Triton along

        return TritonKernel(vocabulary, device)
    return CpuKernel(vocabulary, cores, in_byte_order)


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
        ReducedRow(offset, masses.masses_I[first:last], end, token, top_ids_K, top_logprobs_K)
        for offset, (first, last), end, token, top_ids_K, top_logprobs_K in zip(
            intervals.offsets_R.tolist(),
            pairwise(bounds),
            masses.end_R.tolist(),
            masses.token_R.tolist(),
            masses.top_ids_RK,
            masses.top_logprobs_RK,
            strict=True,
        )
    ]
