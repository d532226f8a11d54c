"""Making of the missing shards of a folder that several processes share: a dump, or a corpus that a model writes."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from pipeline.config import Recipe
from pipeline.runtime import log
from pipeline.runtime.format import are, count_of
from pipeline.runtime.progress import Progress
from schemas import dump_files
from schemas.manifest import ShardPlan
from schemas.storage.atomic import make_folder, remove
from schemas.storage.locations import Location
from stage1_teacher.coordination.shard_claims import Claims
from stage1_teacher.coordination.shard_work import ShardMaker, ShardProgress, ShardWork, Task


class Plan(Protocol):
    """The manifest of the folder."""

    @property
    def shards(self) -> tuple[ShardPlan, ...]: ...

    def missing(self, folder: Location, /) -> list[ShardPlan]:
        """Return the planned shards whose file does not exist."""


@dataclass(frozen=True)
class Job(ABC):
    """Planned shards, and this process's part of them.

    Attributes:
        recipe: its teacher section is the model that runs, its placement says where.
        worker: (i, n): this process's are every n-th shard, starting at the i-th.
    """

    recipe: Recipe
    folder: Location
    manifest: Plan
    claims: Claims
    worker: tuple[int, int]

    @abstractmethod
    def task(self, recipe: Recipe) -> Task:
        """Return what an engine in another process is given.

        Args:
            recipe: this job's, with a placement for that engine.
        """

    @abstractmethod
    def open_here(self) -> AbstractContextManager[ShardMaker]:
        """Open an engine in this process, and yield what makes shards with it."""

    @abstractmethod
    def read(self, shards: Iterator[ShardPlan]) -> Iterator[ShardWork]:
        """Yield each shard with its documents. Raises ValueError if the corpus has changed since it was planned."""

    @abstractmethod
    def progress(self, todo: Sequence[ShardPlan]) -> Progress:
        """Return what displays the progress over some shards."""

    def missing(self) -> list[ShardPlan]:
        """Return this worker's missing shards, including those that another process is making."""
        index, count = self.worker
        return [shard for shard in self.manifest.missing(self.folder) if shard.index % count == index]

    def claim(self, todo: Sequence[ShardPlan]) -> Iterator[ShardPlan]:
        """Yield the shards that nobody else is making, each claimed just before."""
        for shard in todo:
            if self.claims.take(shard.index):
                path = shard.path(self.folder)
                if not path.exists():  # another process may have completed it since
                    make_folder(path.parent)
                    yield shard
                else:
                    self.claims.give_back(shard.index)

    def describe_done(self) -> str:
        """Return how many shards of the whole plan there are: `3 of 7 shards are`."""
        done = len(self.manifest.shards) - len(self.manifest.missing(self.folder))
        return f"{done} of {count_of(len(self.manifest.shards), 'shard')} {are(done)}"


OpenShardMaker = Callable[[Job], AbstractContextManager[ShardMaker]]
Connect = Callable[[], AbstractContextManager[OpenShardMaker]]  # as to a cluster, before anything else is done


def open_here(job: Job) -> AbstractContextManager[ShardMaker]:
    """Open an engine in this process."""
    return job.open_here()


def make_missing(job: Job, open_it: OpenShardMaker, take: Callable[[ShardProgress], None]) -> None:
    """Make every shard that is missing and unclaimed, until there are none: another process may die and leave some.

    Args:
        open_it: opens what makes the shards; called only if there are any.
        take: called with each report, after the shard that it commits has been given back.
    """
    todo = job.missing()
    rounds = free_shards(job)
    first = next(rounds, None)
    if first is None:
        return
    remove(job.folder / dump_files.SUMMARY)  # out of date, if a shard was lost after it was written
    with ExitStack() as opened:
        make = opened.enter_context(open_it(job))
        started, num_made = time.monotonic(), 0
        progress = opened.enter_context(job.progress(todo))
        for shards in chain([first], rounds):
            for done in make(job.read(shards)):
                progress.update(done.documents, done.text_bytes, done.tokens, done.stored_bytes)
                job.claims.renew()
                if done.committed is not None:
                    num_made += 1
                    log.debug(
                        f"{job.folder}: shard {done.committed}, {done.stored_bytes:,} bytes", shard=done.committed
                    )
                    job.claims.give_back(done.committed)
                take(done)
    log.info(f"{job.folder}: {count_of(num_made, 'shard')} in {time.monotonic() - started:.1f} s")


def free_shards(job: Job) -> Iterator[Iterator[ShardPlan]]:
    """Yield passes over the missing shards, in corpus order, until this process can make no more.

    In a store, where a dead process is not noticed at once, it waits for shards that others have claimed.
    """
    while todo := job.missing():
        free = job.claim(todo)
        first = next(free, None)
        if first is not None:
            yield chain([first], free)
        elif not job.claims.wait():
            return
