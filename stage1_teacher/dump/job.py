"""A dump in progress, and what an engine is given to make its shards, in this process or elsewhere."""

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pipeline.config import Recipe
from pipeline.corpus.documents import Corpus, DocumentReader
from pipeline.runtime.progress import Progress
from schemas import dump_files
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.locations import location
from stage1_teacher.coordination.shard_job import Job
from stage1_teacher.coordination.shard_work import ShardMaker, ShardProgress, ShardWork, make_all
from stage1_teacher.coordination.shard_writers import open_writers
from stage1_teacher.dump import shard_plan
from stage1_teacher.dump.check_resumed import check_resumed
from stage1_teacher.dump.identity import teacher_identity
from stage1_teacher.dump.places import Places
from stage1_teacher.dump.shard_writer import ShardWriter, fill_shards
from stage1_teacher.engines.registry import engine_name
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import ResolvedTeacher, load_tokenizer


class DumpEngine(NamedTuple):
    """A teacher that makes shards of a dump.

    Attributes:
        audited: ids of the documents to audit.
    """

    writer: ShardWriter
    audited: Set[str]

    def make(self, shards: Iterable[ShardWork]) -> Iterator[ShardProgress]:
        return fill_shards(shards, self.writer, self.audited)

    def flush(self) -> Iterator[ShardProgress]:
        return iter(self.writer.flush())


class DumpTask(NamedTuple):
    """The part of a dump's settings that an engine needs.

    Attributes:
        audited: ids of the documents to audit.
    """

    recipe: Recipe
    identity: dict[str, Any]
    accepted_engines: tuple[str, ...]
    audited: Set[str]

    def check(self, place: str) -> None:
        dump = location(self.recipe.dump.path)
        if not (dump / dump_files.MANIFEST).exists():
            raise ValueError(
                f"{place} cannot find {dump}: dump.path must be a folder that all machines share under the same path, "
                "or an address (s3://bucket/folder)"
            )
        engine = engine_name(self.recipe.teacher, self.recipe.placement)
        ours = teacher_identity(self.recipe, load_tokenizer(self.recipe), engine, self.identity["corpus"]["sha256"])
        shard_plan.require_identity(dump, Manifest.load(dump).identity, ours, self.accepted_engines)

    def open(self, over_machines: bool = False) -> AbstractContextManager[DumpEngine]:
        return self.open_resolved(load_tokenizer(self.recipe), over_machines)

    @contextmanager
    def open_resolved(self, teacher: ResolvedTeacher, over_machines: bool = False) -> Iterator[DumpEngine]:
        """Open the engine of a teacher that has been looked up, and check that it goes on with the dump as begun."""
        dump, branches = location(self.recipe.dump.path), bool(self.audited)
        with open_teacher(self.recipe, *teacher, branches=branches, over_machines=over_machines) as opened:
            check_resumed(dump, Manifest.load(dump), opened)
            with closing(open_writers(self.recipe.placement)) as writers:
                yield DumpEngine(ShardWriter(opened, self.recipe, self.identity, dump, writers), self.audited)


@dataclass(frozen=True)
class DumpJob(Job):
    """A dump to be made, and this process's share of it.

    Attributes:
        audited: ids of the documents to audit.
    """

    manifest: Manifest
    corpus: Corpus
    teacher: ResolvedTeacher
    audited: Set[str]
    places: Places

    def task(self, recipe: Recipe) -> DumpTask:
        return DumpTask(recipe, self.manifest.identity, self.manifest.accepted_engines, self.audited)

    @contextmanager
    def open_here(self) -> Iterator[ShardMaker]:
        with self.task(self.recipe).open_resolved(self.teacher) as engine:
            yield partial(make_all, engine)

    def read(self, shards: Iterator[ShardPlan]) -> Iterator[ShardWork]:
        return read_shards(shards, self.corpus.reader(), self.places)

    def progress(self, todo: Sequence[ShardPlan]) -> Progress:
        return Progress(sum(shard.num_documents for shard in todo), sum(shard.num_bytes for shard in todo))


def read_shards(shards: Iterable[ShardPlan], reader: DocumentReader, places: Places) -> Iterator[ShardWork]:
    """Yield each shard with its documents. Raises ValueError if the corpus has changed."""
    for shard in shards:
        yield shard, shard_plan.shard_documents(shard, reader, places)
