"""Processes that write shards beside an engine.

Rounding and compressing take most of what the host does for a token, so a dump on a GPU leaves both to processes of
their own (`Writers`): the engine's process then only hands over arrays.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.config import PlacementConfig
from pipeline.runtime import log, metrics
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.runtime.devices import computes_on_gpu
from schemas.storage.atomic import is_left_over
from schemas.storage.locations import Location
from stage1_teacher.coordination.shard_draft import Draft

# A process writes some 100,000 tokens a second; more of them than shards are in progress are of no use.
MAX_WRITERS, CORES_EACH = 4, 4
MAX_PENDING = 2  # shards for each writer, written or waiting, before the engine waits: each is some 100 MB
MAX_DEATHS = 2  # processes that one shard may cost


class Written(NamedTuple):
    """A committed shard: its number and its size in bytes."""

    number: int
    stored_bytes: int


class _Process:
    """A process that writes one shard after another. If it dies, another one takes its place."""

    def __init__(self) -> None:
        self._executor = _executor()

    def submit(self, write: Callable[[], int]) -> Future[int]:
        try:
            return self._executor.submit(write)
        except BrokenProcessPool:  # it was killed while it had nothing to write
            _warn("a process that writes shards was killed while it was idle; another one takes its place")
            self.replace()
            return self._executor.submit(write)

    def replace(self) -> None:
        self._executor.shutdown(wait=True)  # its process is gone, and from here on its id is too
        self._executor = _executor()

    def end(self) -> None:
        for process in list((self._executor._processes or {}).values()):
            process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Unwritten:
    """A shard that a process writes, or will write; kept until it is reported, should the process die."""

    number: int
    path: Location
    write: Callable[[], int]
    by: _Process
    future: Future[int] = field(init=False)
    deaths: int = 0

    def submit(self) -> None:
        self.future = self.by.submit(self.write)

    @property
    def is_lost(self) -> bool:
        return self.future.done() and isinstance(self.future.exception(), BrokenProcessPool)


class Writers:
    """Processes that write shards, a bounded number at a time; `num_processes` 0: each is written when it is given.

    A process that is killed is replaced, and its shard written again. A shard that costs a second process ends the dump
    with an error, as does any other failure: the shard is not there, and is made again by a resume.
    """

    def __init__(self, num_processes: int) -> None:
        self._processes = [_Process() for _ in range(num_processes)]
        self._unwritten: deque[_Unwritten] = deque()
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

        Raises OSError if a shard has cost two processes.
        """
        write = partial(draft.write, path, identity, extra, zstd_level)
        if not self._processes:
            return [Written(index, write())]
        busy = [shard.by for shard in self._unwritten if not shard.future.done()]
        self._unwritten.append(_Unwritten(index, path, write, min(self._processes, key=busy.count)))
        self._unwritten[-1].submit()
        return self.written(max_pending=self._max_pending)

    def written(self, max_pending: int | None = None) -> list[Written]:
        """Return the shards written since the last call, in order.

        Args:
            max_pending: wait until no more than that are unwritten; None: do not wait.
        """
        done: list[Written] = []
        self._replace_lost()
        while self._unwritten:
            shard = self._unwritten[0]
            if not shard.future.done() and (max_pending is None or len(self._unwritten) <= max_pending):
                break
            if isinstance(shard.future.exception(), BrokenProcessPool):
                self._replace_lost()
                continue
            done.append(Written(shard.number, shard.future.result()))
            self._unwritten.popleft()
        return done

    def _replace_lost(self) -> None:
        """Replace the processes that have died, and have their shards written again. Raises OSError, see `write`."""
        while (lost := next((shard for shard in self._unwritten if shard.is_lost), None)) is not None:
            # A process writes in order: it was at the first of them, and had not begun the others.
            lost.deaths += 1
            if lost.deaths == MAX_DEATHS:
                raise OSError(
                    f"a process that wrote shard {lost.number} was killed, perhaps because memory ran out: run the "
                    "same command again, with a smaller dump.shard_bytes for a new dump, or with placement.writers=0"
                ) from lost.future.exception()
            _warn(
                f"a process that wrote shard {lost.number} was killed, perhaps because memory ran out; another one "
                "writes it again"
            )
            lost.by.replace()
            _remove_partials(lost.path)
            for shard in self._unwritten:
                if shard.by is lost.by and shard.is_lost:
                    shard.submit()

    def close(self) -> None:
        """End the processes; what they are writing is left out."""
        for process in self._processes:
            process.end()


IN_THIS_PROCESS = Writers(0)


def open_writers(placement: PlacementConfig) -> Writers:
    """Start the writers of an engine of this process."""
    if placement.writers is not None:
        return Writers(placement.writers)
    return Writers(num_writers(len(os.sched_getaffinity(0)))) if computes_on_gpu() else IN_THIS_PROCESS


def num_writers(cores: int) -> int:
    """Return how many processes write beside an engine on a GPU that has so many cores to itself."""
    return min(MAX_WRITERS, max(1, cores // CORES_EACH))


def _executor() -> ProcessPoolExecutor:
    end_children_with_me()
    # Its parent alone decides what an interrupt means.
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))


def _remove_partials(shard: Location) -> None:
    """Remove what a killed process had written of a shard; a store keeps nothing of that kind."""
    if isinstance(shard, Path):
        for partial_file in shard.parent.glob(f"{shard.stem}.*.partial"):
            if is_left_over(partial_file):
                partial_file.unlink(missing_ok=True)


def _warn(message: str) -> None:
    metrics.count_failure("writer")
    log.warning(message)
