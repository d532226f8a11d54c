"""A dump in progress, and what makes its shards: an engine in this process, or engines elsewhere."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from typing import NamedTuple

from pipeline.config import Recipe
from pipeline.corpus.documents import Document
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.atomic import make_folder
from schemas.storage.locations import Location
from stage1_teacher.coordination.shard_claims import Claims
from stage1_teacher.dump.places import Places
from stage1_teacher.dump.shard_writer import ShardProgress
from stage1_teacher.targets.resolved import ResolvedTeacher

ShardWork = tuple[ShardPlan, list[Document]]  # a planned shard and its documents
ShardMaker = Callable[[Iterator[ShardWork]], Iterator[ShardProgress]]


class Job(NamedTuple):
    """A dump to be made, and this process's share of it."""

    recipe: Recipe
    dump: Location
    manifest: Manifest
    audited: Set[str]
    claims: Claims
    worker: tuple[int, int]
    places: Places

    def missing(self) -> list[ShardPlan]:
        """Return this worker's missing shards, including those that another process is making."""
        index, count = self.worker
        return [shard for shard in self.manifest.missing(self.dump) if shard.index % count == index]

    def claim(self, todo: Sequence[ShardPlan]) -> Iterator[ShardPlan]:
        """Yield the shards that nobody else is making, each claimed just before."""
        for shard in todo:
            if self.claims.take(shard.index):
                path = shard.path(self.dump)
                if not path.exists():  # another process may have completed it since
                    make_folder(path.parent)
                    yield shard
                else:
                    self.claims.give_back(shard.index)


OpenShardMaker = Callable[[Job, ResolvedTeacher], AbstractContextManager[ShardMaker]]
Connect = Callable[[], AbstractContextManager[OpenShardMaker]]  # as to a cluster, before anything else is done
