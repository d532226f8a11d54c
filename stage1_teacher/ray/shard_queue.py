"""Which shard an engine of a cluster makes next: one that was lost, a new one, or at the end the oldest that another is still at."""

import operator
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.corpus.documents import Document
from schemas.manifest import ShardPlan
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.dump.shard_writer import Made

_MOST_COPIES = 2  # engines on one shard
_NOTHING = Made(0, 0, 0)
_COUNTED = [name for name in Made._fields if name not in ("committed", "audited")]


class Shard:
    """A shard that has been handed out. `documents` are wherever the cluster keeps them."""

    def __init__(self, plan: ShardPlan, documents: Any) -> None:
        self.plan, self.documents = plan, documents
        self.since = time.monotonic()
        self.copies = self.losses = 0
        self.complete = False
        self.told = _NOTHING  # what the progress has heard of it


class Run:
    """One engine's go at a shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.done = shard, _NOTHING
        shard.copies += 1


class HandOut:
    """Shards with their documents, handed out until all are complete.

    Args:
        shards: in the order of the corpus; taken one at a time, when an engine is free for it.
        keep: puts a shard's documents where every engine reaches them, for as long as what it returns is held.
        attempts: engines that may be lost at one shard before it is taken for the cause.
    """

    def __init__(
        self, shards: Iterator[tuple[ShardPlan, list[Document]]], keep: Callable[[list[Document]], Any], attempts: int
    ) -> None:
        self._new, self._keep, self._attempts = shards, keep, attempts
        self._lost: deque[Shard] = deque()
        self._open: list[Shard] = []  # oldest first
        self._exhausted = False

    @property
    def is_done(self) -> bool:
        """All shards are complete, as far as has been asked."""
        return self._exhausted and not self._open

    def next(self) -> Run | None:
        """A shard for an engine that is idle; None where all that is left has engines enough."""
        if self._lost:
            return Run(self._lost.popleft())
        filled = None if self._exhausted else next(self._new, None)
        if filled is not None:
            plan, documents = filled
            self._open.append(Shard(plan, self._keep(documents)))
            return Run(self._open[-1])
        self._exhausted = True
        slow = [shard for shard in self._open if shard.copies < _MOST_COPIES]
        return Run(min(slow, key=lambda shard: (shard.copies, shard.since))) if slow else None

    def advance(self, run: Run, made: Made) -> Made | None:
        """What a batch adds to the progress of all; None where another engine was first. A copy, or a shard made again, counts from
        where the furthest one had come."""
        shard = run.shard
        if shard.complete:
            return None
        run.done = _each(operator.add, run.done, made)
        furthest = _each(max, run.done, shard.told)
        new = _each(operator.sub, furthest, shard.told)
        shard.told = furthest
        if made.committed is not None:
            shard.complete = True
            self._open.remove(shard)
        return new._replace(committed=made.committed, audited=made.audited)

    def lose(self, run: Run, why: str) -> None:
        """Its engine is gone. Raises EngineError where engines are lost at this shard again and again."""
        shard = run.shard
        shard.copies -= 1
        shard.losses += 1
        if shard.complete:
            return
        if shard.losses >= self._attempts:
            raise EngineError(
                f"shard {shard.plan.index} has cost {shard.losses} engines (placement.engine_attempts), the last one: {why}. Shards that "
                "are complete stay; mend the cause (less memory: lower placement.engine_batch_tokens), then run the same command again."
            )
        if not shard.copies:
            self._lost.append(shard)


def _each(do: Callable[[Any, Any], Any], a: Made, b: Made) -> Made:
    """Of all that is counted of two; not of what they say of a shard that is complete."""
    return Made(**{name: do(getattr(a, name), getattr(b, name)) for name in _COUNTED})
