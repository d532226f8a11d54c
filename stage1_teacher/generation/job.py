"""A written corpus in progress."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from pipeline.config import Recipe
from pipeline.corpus.documents import Corpus
from pipeline.runtime.progress import Progress
from schemas.manifest import ShardPlan
from schemas.text_corpus import TextManifest
from stage1_teacher.coordination.shard_job import Job
from stage1_teacher.coordination.shard_work import ShardMaker, ShardWork, make_all
from stage1_teacher.dump.places import Places
from stage1_teacher.generation.plan import read_prompts
from stage1_teacher.generation.text_writer import TextTask
from stage1_teacher.generation.writer import Writer


@dataclass(frozen=True)
class TextJob(Job):
    """A corpus to be written, and this process's share of it."""

    manifest: TextManifest
    corpus: Corpus
    writer: Writer
    places: Places

    def task(self, recipe: Recipe) -> TextTask:
        return TextTask(recipe, self.manifest.identity)

    @contextmanager
    def open_here(self) -> Iterator[ShardMaker]:
        with self.task(self.recipe).open_resolved(self.writer) as engine:
            yield partial(make_all, engine)

    def read(self, shards: Iterator[ShardPlan]) -> Iterator[ShardWork]:
        return read_prompts(shards, self.corpus.reader(), self.places)

    def progress(self, todo: Sequence[ShardPlan]) -> Progress:
        num_prompts, num_bytes = sum(shard.num_documents for shard in todo), sum(shard.num_bytes for shard in todo)
        return Progress(num_prompts, num_bytes, unit="prompts")
