"""A shard before it is written: what its records are made of, and how it is written, in this process or another.

Rounding and compressing take most of what the host does for a token, so a dump on a GPU leaves both to processes of
their own (`Writers`): the engine's process then only hands over arrays.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.config import PlacementConfig
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.runtime.devices import computes_on_gpu
from schemas.columns import MEASURES
from schemas.shard import commit_shard, to_table
from schemas.storage.locations import Location
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.sparse_targets import SparseTargets
from stage1_teacher.targets.assembly import assemble

# A process writes some 100,000 tokens a second; more of them than shards are in progress are of no use.
MAX_WRITERS, CORES_EACH = 4, 4
MAX_PENDING = 2  # shards for each writer, written or waiting, before the engine waits: each is some 100 MB


@dataclass
class Draft:
    """The windows of a shard and their sparse targets, as they come; picklable."""

    token_lengths: np.ndarray  # bytes of each token id
    exact: bool  # every number is stored as float32
    windows: list[tuple[EncodedWindow, list[SparseTargets]]] = field(default_factory=list)

    def write(self, path: Location, identity: Mapping[str, object], extra: Mapping[str, str], zstd_level: int) -> int:
        """Round, compress and commit the shard, unless it exists; returns its size in bytes.

        Args:
            identity: the shard's, see `schemas.manifest.shard_identity`.
            extra: metadata by key.
        """
        records = [assemble(window, spans, self.token_lengths, self.exact) for window, spans in self.windows]
        table = to_table(records, dict(identity))
        added = {key.encode(): value.encode() for key, value in extra.items()}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **added})
        return commit_shard(table, path, zstd_level, first=True)


class Written(NamedTuple):
    """A committed shard: its number and its size in bytes."""

    number: int
    stored_bytes: int


class Writers:
    """Processes that write shards, a bounded number at a time; `num_processes` 0: each is written when it is given.

    A process that dies or fails ends the dump with an error: its shard is not there, and is made again by a resume.
    """

    def __init__(self, num_processes: int) -> None:
        self._pool = _pool(num_processes) if num_processes else None
        self._pending: deque[tuple[int, Future[int]]] = deque()
        self._max_pending = MAX_PENDING * num_processes

    def write(
        self,
        index: int,
        draft: Draft,
        path: Location,
        identity: Mapping[str, object],
        extra: Mapping[str, str],
        zstd_level: int,
    ) -> list[Written]:
        """Write a shard, now or later, and return those that are written, in order.

        Raises OSError if a process has died.
        """
        if self._pool is None:
            return [Written(index, draft.write(path, identity, extra, zstd_level))]
        self._pending.append((index, self._pool.submit(draft.write, path, identity, extra, zstd_level)))
        return self.written(max_pending=self._max_pending)

    def written(self, max_pending: int | None = None) -> list[Written]:
        """Return the shards written since the last call, in order.

        Args:
            max_pending: wait until no more than that are unwritten; None: do not wait.
        """
        done: list[Written] = []
        while self._pending:
            index, future = self._pending[0]
            if not future.done() and (max_pending is None or len(self._pending) <= max_pending):
                break
            try:
                done.append(Written(index, future.result()))
            except BrokenProcessPool as error:
                raise OSError(
                    f"a process that wrote shard {index} was killed, perhaps because memory ran out: run the same "
                    "command again, with a smaller dump.shard_bytes for a new dump, or with placement.writers=0"
                ) from error
            self._pending.popleft()
        return done

    def close(self) -> None:
        """End the processes; what they are writing is left out."""
        if self._pool is not None:
            for process in list(self._pool._processes.values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)


IN_THIS_PROCESS = Writers(0)


def open_writers(placement: PlacementConfig) -> Writers:
    """Start the writers of an engine of this process."""
    if placement.writers is not None:
        return Writers(placement.writers)
    return (
        Writers(min(MAX_WRITERS, max(1, len(os.sched_getaffinity(0)) // CORES_EACH)))
        if computes_on_gpu()
        else IN_THIS_PROCESS
    )


def _pool(num_processes: int) -> ProcessPoolExecutor:
    end_children_with_me()
    # Its parent alone decides what an interrupt means.
    return ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )


class Sums(NamedTuple):
    """Positions, and the probability mass that is dropped there and that lies in tails."""

    positions: int
    dropped: float
    tail: float


def sums(spans: Sequence[SparseTargets]) -> Sums:
    """Sum up some spans."""
    of_dropped = [column.name for column in MEASURES].index("dropped")
    num_positions, dropped, tail = 0, 0.0, 0.0
    for of_span in spans:
        counts_P = of_span.entries.counts_P.astype(np.int64)
        num_positions += len(counts_P)
        dropped += float(of_span.measures_MP[of_dropped].sum(dtype=np.float64))
        if len(counts_P):
            kept_P = np.add.reduceat(of_span.entries.probs_E, counts_P.cumsum() - counts_P)
            tail += float(np.maximum(1.0 - kept_P, 0.0).sum())
    return Sums(num_positions, dropped, tail)
