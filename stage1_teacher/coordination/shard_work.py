"""Shards as work: what an engine is given, where it may run, and what it reports."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from pipeline.corpus.documents import Document
from schemas.manifest import ShardPlan


class ShardProgress(NamedTuple):
    """Work done since the last report, for the progress bar and the metrics."""

    documents: int
    text_bytes: int
    tokens: int
    stored_bytes: int = 0  # size of the shard completed by this batch
    committed: int | None = None  # index of that shard
    audited: int = 0  # audited documents in that shard
    left_out: int = 0  # documents left out of that shard
    positions: int = 0
    dropped: float = 0.0  # probability mass, summed over `positions`; so is `tail`
    tail: float = 0.0


ShardWork = tuple[ShardPlan, list[Document]]  # a planned shard and its documents
ShardMaker = Callable[[Iterator[ShardWork]], Iterator[ShardProgress]]  # makes shards and commits all of them


class ShardEngine(Protocol):
    """An open engine that makes shards and commits them."""

    def make(self, shards: Iterable[ShardWork]) -> Iterator[ShardProgress]:
        """Make shards, and yield what each batch added, and the shards committed in the meantime.

        The last ones may be committed at any time later.
        """

    def flush(self) -> Iterator[ShardProgress]:
        """Wait until every shard that it has made is committed, and yield those."""


class Task(Protocol):
    """The part of a job that the process of an engine needs; picklable."""

    def check(self, place: str) -> None:
        """Raise ValueError unless this machine has the folder and the model of the job.

        Args:
            place: the name of this process, for messages.
        """

    def open(self, over_machines: bool = False) -> AbstractContextManager[ShardEngine]:
        """Open the engine; it is closed with the context.

        Args:
            over_machines: its GPUs may be on several machines; see `EngineRequest`.
        """


def make_all(engine: ShardEngine, shards: Iterable[ShardWork]) -> Iterator[ShardProgress]:
    """Make shards and commit all of them; yields the progress of each batch."""
    yield from engine.make(shards)
    yield from engine.flush()
