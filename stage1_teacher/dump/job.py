"""A dump that is being made, and what makes its shards: an engine of this process, or engines elsewhere."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from typing import NamedTuple

from pipeline.config import Recipe
from pipeline.corpus.documents import Document
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.locations import Location
from stage1_teacher.coordination.shard_claims import Claims
from stage1_teacher.dump.shard_writer import Made
from stage1_teacher.targets.resolved import ResolvedTeacher

Filled = tuple[ShardPlan, list[Document]]  # a planned shard with its documents
Maker = Callable[[Iterator[Filled]], Iterator[Made]]


class Job(NamedTuple):
    """A dump to be made, and this process's part in it."""

    recipe: Recipe
    dump: Location
    manifest: Manifest
    audited: Set[str]
    claims: Claims
    worker: tuple[int, int]

    def missing(self) -> list[ShardPlan]:
        """This worker's shards that are not there; who makes them may be another process."""
        index, count = self.worker
        return [shard for shard in self.manifest.missing(self.dump) if shard.index % count == index]

    def claim(self, todo: Sequence[ShardPlan]) -> Iterator[ShardPlan]:
        """Those that nobody else is making, each claimed as it is handed out."""
        for shard in todo:
            if self.claims.take(shard.index):
                if not shard.path(self.dump).exists():  # it may have been made since
                    yield shard
                else:
                    self.claims.give_back(shard.index)


Engines = Callable[[Job, ResolvedTeacher], AbstractContextManager[Maker]]
Connect = Callable[[], AbstractContextManager[Engines]]  # to where they are, before anything else is done
