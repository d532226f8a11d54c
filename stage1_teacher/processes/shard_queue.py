"""The work queue of engines elsewhere: failed shards first, then new ones, then second copies of the oldest."""

import operator
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.corpus.documents import Document
from pipeline.runtime.format import count_of
from schemas.manifest import ShardPlan
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.coordination.shard_work import ShardProgress

_MAX_COPIES = 2  # engines working on one shard
_NOTHING = ShardProgress(0, 0, 0)
_COUNTED = [name for name in ShardProgress._fields if name not in ("committed", "audited")]


class Shard:
    """A shard in progress. `documents` are its documents, or a reference to wherever a cluster keeps them."""

    def __init__(self, plan: ShardPlan, documents: Any) -> None:
        self.plan, self.documents = plan, documents
        self.since = time.monotonic()
        self.copies = self.failures = 0
        self.complete = False
        self.reported = _NOTHING  # progress that the caller has been given


class Attempt:
    """One engine's attempt at a shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.done = shard, _NOTHING
        shard.copies += 1


class Attempts:
    """Attempts of one engine at shards that it has not committed, in the order in which it was given them.

    It reports the batches of a shard before those of the next, and a shard's commit at any time after its batches.
    """

    def __init__(self) -> None:
        self._uncommitted: deque[Attempt] = deque()
        self._unmade: deque[Attempt] = deque()  # of these, the shards whose batches it has not all reported

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self._uncommitted)

    def __len__(self) -> int:
        return len(self._uncommitted)

    def add(self, attempt: Attempt) -> None:
        """Note that the engine is given a shard."""
        self._uncommitted.append(attempt)
        self._unmade.append(attempt)

    def of(self, progress: ShardProgress) -> Attempt:
        """Return the attempt that the engine's next report is about: a batch, or a shard that has been committed."""
        if progress.committed is not None:
            attempt = next(one for one in self._uncommitted if one.shard.plan.index == progress.committed)
            self._uncommitted.remove(attempt)
            if attempt in self._unmade:
                self._unmade.remove(attempt)
            return attempt
        attempt = self._unmade[0] if self._unmade else self._uncommitted[-1]
        if attempt.done.documents + progress.documents >= attempt.shard.plan.num_documents and self._unmade:
            self._unmade.popleft()
        return attempt


class ShardQueue:
    """Shards with their documents, assigned to engines until all are complete.

    Args:
        shards: in corpus order; read one at a time, as engines become free.
        store: puts a shard's documents where every engine can read them, for as long as the returned reference is held.
        max_failures: engines lost on one shard at which that shard is taken to be the cause.
    """

    def __init__(
        self,
        shards: Iterator[tuple[ShardPlan, list[Document]]],
        store: Callable[[list[Document]], Any],
        max_failures: int,
    ) -> None:
        self._new, self._store, self._max_failures = shards, store, max_failures
        self._failed: deque[Shard] = deque()
        self._open: list[Shard] = []  # oldest first
        self._exhausted = False

    @property
    def is_done(self) -> bool:
        """True if every shard read so far is complete and there are no more."""
        return self._exhausted and not self._open

    def next(self, is_idle: bool = True) -> Attempt | None:
        """Return an attempt for an engine, or None if every remaining shard has as many engines as it may have.

        Args:
            is_idle: it has nothing else to do, and may make a second copy of a shard.
        """
        if self._failed:
            return Attempt(self._failed.popleft())
        new = None if self._exhausted else next(self._new, None)
        if new is not None:
            plan, documents = new
            self._open.append(Shard(plan, self._store(documents)))
            return Attempt(self._open[-1])
        self._exhausted = True
        if not is_idle:
            return None
        slow = [shard for shard in self._open if shard.copies < _MAX_COPIES]
        return Attempt(min(slow, key=lambda shard: (shard.copies, shard.since))) if slow else None

    def advance(self, attempt: Attempt, made: ShardProgress) -> ShardProgress | None:
        """Return what a batch adds to the overall progress, or None if another engine completed the shard first.

        A second copy, or a new attempt at a failed shard, counts only from where the furthest attempt had come.
        """
        shard = attempt.shard
        if shard.complete:
            return None
        attempt.done = _each(operator.add, attempt.done, made)
        furthest = _each(max, attempt.done, shard.reported)
        new = _each(operator.sub, furthest, shard.reported)
        shard.reported = furthest
        if made.committed is not None:
            shard.complete = True
            self._open.remove(shard)
        return new._replace(committed=made.committed, audited=made.audited)

    def fail(self, attempt: Attempt, why: str) -> None:
        """Record that an attempt's engine is lost. Raises EngineError at the shard's `max_failures`-th lost engine."""
        shard = attempt.shard
        shard.copies -= 1
        shard.failures += 1
        if shard.complete:
            return
        if shard.failures >= self._max_failures:
            engines = count_of(shard.failures, "engine")
            raise EngineError(
                f"shard {shard.plan.index} failed on {engines} (placement.max_engine_failures); last "
                f"error: {why}. Completed shards are kept; fix the cause (if it is memory, lower "
                "placement.engine_batch_tokens) and rerun the same command."
            )
        if not shard.copies:
            self._failed.append(shard)


def _each(combine: Callable[[Any, Any], Any], a: ShardProgress, b: ShardProgress) -> ShardProgress:
    """Combine the counts of two, field by field; leaves out what describes a complete shard."""
    return ShardProgress(**{name: combine(getattr(a, name), getattr(b, name)) for name in _COUNTED})
