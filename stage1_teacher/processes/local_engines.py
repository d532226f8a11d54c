"""Engines of this machine, a process each, with shards assigned to whichever is free.

This process plans, claims shards, reads the corpus and hands out shards with their documents, as on a cluster; it holds
no engine itself. An engine's process commits its shards to the folder; only counts come back. A lost engine's
shards are assigned again, to any other.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path

from pipeline.config import Recipe
from pipeline.planning.engine_shares import Share, describe_shares, engine_shares
from pipeline.runtime import log, metrics
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.runtime.devices import num_cores
from pipeline.runtime.format import count_of
from schemas import dump_files
from schemas.storage.atomic import is_left_over
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.coordination.shard_job import Job, OpenShardMaker
from stage1_teacher.coordination.shard_work import ShardMaker, ShardProgress, ShardWork
from stage1_teacher.coordination.shard_writers import num_writers
from stage1_teacher.processes.child import EngineChild
from stage1_teacher.processes.messages import Ask, Failed, Made, Message, Ready
from stage1_teacher.processes.shard_queue import ShardQueue

_POLL_SECONDS = 0.5  # the longest wait for a message before the processes are looked at
_GRACE_SECONDS = 15.0  # for engines to free what they hold, before they are killed
_NOTHING = ShardProgress(0, 0, 0)


@contextmanager
def machine_engines() -> Iterator[OpenShardMaker]:
    """Yield what opens the engines of this machine: several in processes of their own, a single one in this process."""
    yield _open_engines


@contextmanager
def _open_engines(job: Job) -> Iterator[ShardMaker]:
    shares = engine_shares(job.recipe)
    if shares[0] or len(shares) > 1:
        log.info(f"{job.folder}: {describe_shares(job.recipe, shares)}", engines=len(shares))
    num_missing = len(job.missing())
    if 1 < num_missing < len(shares):
        log.info(
            f"{job.folder}: {count_of(num_missing, 'shard')} to make, so {count_of(num_missing, 'engine')} will do"
        )
    if min(len(shares), num_missing) == 1:
        with job.open_here() as make:
            yield make
        return
    engines = LocalEngines(job, shares[:num_missing])
    try:
        engines.wait_for_one()
        yield engines.make
    finally:
        engines.close()


def _with_writers(recipe: Recipe, shares: Sequence[Share]) -> Recipe:
    """Return the recipe with a number of writers for each engine; by itself it would count all cores as its own."""
    placement = recipe.placement
    if placement.writers is not None or not shares[0]:
        return recipe
    writers = num_writers(num_cores() // len(shares))
    return recipe.with_values(placement=placement.model_copy(update={"writers": writers}))


class LocalEngines:
    """Engines in processes of their own.

    An engine that fails to start is given up, and so is one whose failures were retried in its process. One that was
    killed starts again, up to `placement.max_engine_failures` times in a row without a shard made.
    """

    def __init__(self, job: Job, shares: Sequence[Share]) -> None:
        self._job, self._num_engines = job, len(shares)
        self._max_failures = job.recipe.placement.max_engine_failures
        self._task = job.task(_with_writers(job.recipe, shares))
        self._losses = [0] * len(shares)  # in a row, by engine
        self._lost_shards: set[int] = set()
        self._idle: list[EngineChild] = []
        self._children: list[EngineChild] = []
        end_children_with_me()
        try:
            for number, share in enumerate(shares, 1):
                self._start(number, share)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, share: Share) -> None:
        self._children.append(EngineChild(number, share, self._num_engines, self._task))

    def wait_for_one(self) -> None:
        """Wait until an engine can work.

        Raises ValueError for an error that every engine would meet, EngineError if all fail to start.
        """
        while not any(child.ready for child in self._children):
            for _ in self._collect(None):
                pass

    def make(self, shards: Iterator[ShardWork]) -> Iterator[ShardProgress]:
        """Have the shards made, each read when an engine asks for it, and yield progress."""
        queue = ShardQueue(shards, lambda documents: documents, self._max_failures)
        while not queue.is_done:
            while self._idle and (attempt := queue.next()):
                self._idle.pop(0).give(attempt)
            if not queue.is_done:
                yield from self._collect(queue)

    def _collect(self, queue: ShardQueue | None) -> Iterator[ShardProgress]:
        """Wait for messages, and yield the progress, after a while an empty one."""
        if not wait([stream for child in self._children for stream in child.streams()], _POLL_SECONDS):
            yield _NOTHING
        for child in list(self._children):
            has_ended = child.has_ended  # before its last messages are read
            child.relay_lines()
            for message in child.messages():
                yield from self._take(child, message, queue)
            if has_ended:
                self._lose(child, queue)

    def _take(self, child: EngineChild, message: Message, queue: ShardQueue | None) -> Iterator[ShardProgress]:
        match message:
            case Ready():
                child.ready = True
                log.info(f"{self._job.folder}: {child.name} is ready")
            case Ask(is_idle=True):
                self._idle.append(child)
            case Ask():
                child.give(None if queue is None else queue.next(is_idle=False))
            case Failed(error, ends_all=True):
                raise ValueError(error)
            case Made(progress, failures):
                for kind, number in failures.items():
                    metrics.figures().failures.labels(kind).inc(number)
                yield from self._count(child, progress, queue)

    def _count(self, child: EngineChild, progress: ShardProgress, queue: ShardQueue | None) -> Iterator[ShardProgress]:
        attempt = child.attempts.of(progress)
        if progress.committed is not None:
            self._losses[child.number - 1] = 0
        # Without a queue it is a second copy, of a shard of an earlier pass.
        if queue is not None and (new := queue.advance(attempt, progress)) is not None:
            yield new

    def _lose(self, child: EngineChild, queue: ShardQueue | None) -> None:
        """Assign a lost engine's shards again, and start it again if it was killed after it had worked.

        Raises EngineError if no engine is left, or a shard has cost too many.
        """
        child.kill()  # it has ended; its files and pipes have not
        self._children.remove(child)
        self._idle = [other for other in self._idle if other is not child]
        metrics.count_failure("engine")
        self._lost_shards.update(attempt.shard.plan.index for attempt in child.attempts)
        why = child.describe_end()
        losses = self._losses[child.number - 1] = self._losses[child.number - 1] + 1
        again = child.ready and child.failed is None and losses < self._max_failures
        if again:
            self._start(child.number, child.share)
        what = f"{child.name} {'is lost' if child.ready else 'failed to start'}: {why}"
        then = "it is started again" if again else f"{count_of(len(self._children), 'engine')} left"
        printed = "" if child.failed or not child.last_lines else "; its last lines:\n" + "\n".join(child.last_lines)
        log.warning(f"{self._job.folder}: {what}; {then}{printed}", engine=child.number)
        if queue is not None:
            for attempt in child.attempts:
                queue.fail(attempt, why)
        if not self._children:
            raise EngineError(
                f"no engine is left; the last error: {what}. Completed shards are kept; fix the cause (if it is "
                "memory, lower placement.gpu_memory or placement.engines) and rerun the same command."
            )

    def _remove_partials(self) -> None:
        """Remove what killed engines had begun to write. Only they wrote those shards, which this process claimed."""
        if self._lost_shards and isinstance(self._job.folder, Path):
            for path in chain.from_iterable(map(self._job.folder.glob, dump_files.PARTIAL_FILES)):
                if dump_files.part_index(path.name) in self._lost_shards and is_left_over(path):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """End all engines; those that do not end in time are killed. Whole shards are kept."""
        try:
            for child in self._children:
                child.stop(at_once=child not in self._idle)
            until = time.monotonic() + _GRACE_SECONDS
            while not all(child.has_ended for child in self._children) and time.monotonic() < until:
                for child in self._children:
                    child.relay_lines()
                time.sleep(0.05)
        finally:
            for child in self._children:
                child.kill()
                self._lost_shards.update(attempt.shard.plan.index for attempt in child.attempts)
            self._remove_partials()
