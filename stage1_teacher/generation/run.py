"""`bld generate`: plan, write the missing shards, finish. Running it again resumes it; a second process joins it."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from pipeline.config import GenerateConfig, Recipe, generate_config
from pipeline.config.loading import save_recipe
from pipeline.corpus.documents import Corpus, Document
from pipeline.corpus.left_out import tell_left_out
from pipeline.dumps.licence import describe
from pipeline.dumps.text_card import write_text_card
from pipeline.runtime import log
from pipeline.runtime.dtypes import slow_dtype
from pipeline.runtime.format import are, count_of
from pipeline.runtime.progress import Progress
from pipeline.runtime.termination import Terminated, terminable
from schemas import dump_files
from schemas.manifest import ShardPlan, write_json
from schemas.storage.atomic import committed, make_folder, remove
from schemas.storage.locations import Location, location
from schemas.text_corpus import TextManifest
from stage1_teacher.coordination.shard_claims import Claims, open_claims, require_place
from stage1_teacher.generation.plan import create_or_check, plan_text, shards_of
from stage1_teacher.generation.registry import OpenGenerator
from stage1_teacher.generation.segmentation import describe as describe_own
from stage1_teacher.generation.summary import summarise
from stage1_teacher.generation.text_writer import TextWriter
from stage1_teacher.generation.writer import Writer, generator_request, resolve_writer


def run_generate(recipe: Recipe, worker: tuple[int, int] = (0, 1)) -> None:
    """Write a corpus of text, or resume it: every missing shard that no other process is writing.

    Args:
        worker: (i, n): write only every n-th shard, starting at the i-th.
    Raises:
        ValueError: the folder holds other text, the writer cannot be run as the recipe says, or no prompt is usable.
        OSError: the folder cannot be written, or the engine failed too often.
    """
    config = generate_config(recipe)
    folder = location(config.path)
    require_place(folder)
    with terminable():
        writer = resolve_writer(recipe)
        log.info(f"{folder}: {describe(writer.licence).replace('the teacher', 'the writer')}")
        make_folder(folder / dump_files.SHARDS)
        with open_claims(folder) as claims:
            corpus = Corpus(config.prompts)
            with claims.planning():
                planned = plan_text(recipe, config, writer, corpus)
                tell_left_out(planned.prompt_counts, corpus.first_places)
                with claims.writing_json():
                    manifest = create_or_check(folder, planned)
                    with committed(folder / dump_files.RECIPE) as path:
                        save_recipe(recipe, path)
            claims.remove_dead_partials()
            try:
                _write_missing(_Job(recipe, config, writer, folder, manifest, claims, worker), corpus)
            except (KeyboardInterrupt, Terminated):
                done = len(manifest.shards) - len(manifest.missing(folder))
                shards = count_of(len(manifest.shards), "shard")
                log.info(f"{folder}: stopped; {done} of {shards} {are(done)} complete and kept")
                raise
            _finish(folder, manifest, writer, claims)


class _Job(NamedTuple):
    """A corpus to be written, and this process's share of it."""

    recipe: Recipe
    config: GenerateConfig
    writer: Writer
    folder: Location
    manifest: TextManifest
    claims: Claims
    worker: tuple[int, int]

    def missing(self) -> list[ShardPlan]:
        """Return this worker's missing shards."""
        index, count = self.worker
        return [shard for shard in self.manifest.missing(self.folder) if shard.index % count == index]

    def claimed(self, corpus: Corpus) -> Iterator[tuple[ShardPlan, list[Document]]]:
        """Yield the missing shards that nobody else is writing, each claimed just before, with their prompts."""
        todo = {shard.index: shard for shard in self.missing()}
        if not todo:
            return
        for index, documents in enumerate(shards_of(corpus, self.config.shard_prompts)):
            shard = todo.get(index)
            if shard is None or not self.claims.take(index):
                continue
            if not shard.path(self.folder).exists():  # another process may have completed it since
                make_folder(shard.path(self.folder).parent)
                yield shard, documents
            self.claims.give_back(index)
            if index == max(todo):
                return  # the rest is not read


def _write_missing(job: _Job, corpus: Corpus) -> None:
    """Write every shard that is missing and unclaimed, until there are none: another process may die and leave some."""
    todo = job.missing()
    shards = count_of(len(job.manifest.shards), "shard")
    counts = ", ".join(f"{key} {value}" for key, value in job.manifest.prompt_counts.items())
    log.info(f"{job.folder}: {shards} planned, {len(todo)} to write; prompts: {counts}")
    first = next(rounds := _rounds(job, corpus), None)
    if first is None:
        return
    remove(job.folder / dump_files.SUMMARY)  # out of date, if a shard was lost after it was written
    section = job.writer.section
    if not section.engine_spec.served and (slow := slow_dtype("teacher.dtype", section.dtype)):
        log.warning(slow)
    started, num_written = time.monotonic(), 0
    with (
        closing(OpenGenerator(generator_request(job.writer, job.recipe, job.config))) as generator,
        Progress(sum(s.num_documents for s in todo), sum(s.num_bytes for s in todo)) as progress,
    ):
        writer = TextWriter(job.recipe, job.config, job.writer, generator, job.folder)

        def report(prompts: int, num_bytes: int, tokens: int) -> None:
            progress.update(prompts, num_bytes, tokens)
            job.claims.renew()

        for shard, documents in _chained(first, rounds):
            stored = writer.write(shard, documents, job.manifest, report)
            num_written += 1
            log.debug(f"{job.folder}: shard {shard.index}, {stored:,} bytes", shard=shard.index)
    log.info(f"{job.folder}: {count_of(num_written, 'shard')} in {time.monotonic() - started:.1f} s")


Work = tuple[ShardPlan, list[Document]]


def _rounds(job: _Job, corpus: Corpus) -> Iterator[tuple[Work, Iterator[Work]]]:
    """Yield passes over the missing shards, each as its first shard and the others, until there are none to write."""
    while job.missing():
        work = job.claimed(corpus)
        first = next(work, None)
        if first is not None:
            yield first, work
        elif not job.claims.wait():
            return


def _chained(first: tuple[Work, Iterator[Work]], rounds: Iterator[tuple[Work, Iterator[Work]]]) -> Iterator[Work]:
    yield first[0]
    yield from first[1]
    for shard, others in rounds:
        yield shard
        yield from others


def _finish(folder: Location, manifest: TextManifest, writer: Writer, claims: Claims) -> None:
    """Write the summary and the card of a complete corpus, whoever wrote its last shard."""
    num_missing = len(manifest.missing(folder))
    if num_missing:
        shards = f"{count_of(num_missing, 'shard')} {are(num_missing)}"
        log.info(f"{folder}: {shards} missing; other processes write the rest, or run the same command again")
        return
    with claims.writing_json():
        summary = summarise(folder, manifest)
        write_json(folder / dump_files.SUMMARY, summary)
        write_text_card(folder, manifest, summary, writer.licence)
    for what in ("prompts", "completions"):
        for reason, counted in summary[f"left_out_{what}"].items():
            log.warning(
                f"{count_of(counted['number'], what[:-1])} left out: {reason}; the first: {counted['first']}",
                reason=reason,
                number=counted["number"],
                first=counted["first"],
            )
    if not summary["kept"]:
        log.warning(f"{folder}: nothing is kept; a dump of it would have no document")
    figures = "; ".join(f"{key} {value}" for key, value in summary.items() if isinstance(value, int | float))
    log.info(f"{folder}: complete; {figures}")
    log.info(
        f"{folder}: tokens that are the tokenizer's own encoding of the text: {describe_own(summary['segmentation'])}"
    )
    field = ", with corpus.field: messages" if manifest.has_chats else ""
    log.info(f"{folder}: dump it with `bld teacher RECIPE`, where corpus.source is this folder{field}")
