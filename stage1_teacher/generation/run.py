"""`bld generate`: plan, write the missing shards, finish. Running it again resumes it; a second process joins it."""

from contextlib import ExitStack
from dataclasses import replace

from pipeline.config import Recipe, generate_config
from pipeline.config.loading import save_recipe
from pipeline.corpus.documents import Corpus
from pipeline.corpus.left_out import tell_left_out
from pipeline.dumps.licence import describe
from pipeline.dumps.text_card import write_text_card
from pipeline.runtime import log, metrics
from pipeline.runtime.format import are, count_of
from pipeline.runtime.termination import Terminated, terminable
from schemas import dump_files
from schemas.manifest import write_json
from schemas.storage.atomic import committed, make_folder
from schemas.storage.locations import Location, location
from stage1_teacher.coordination.shard_claims import Claims, open_claims, require_place
from stage1_teacher.coordination.shard_job import Connect, make_missing, open_here
from stage1_teacher.coordination.shard_work import ShardProgress
from stage1_teacher.generation.job import TextJob
from stage1_teacher.generation.plan import create_or_check, plan_text
from stage1_teacher.generation.segmentation import describe as describe_own
from stage1_teacher.generation.summary import summarise
from stage1_teacher.generation.writer import Writer, resolve_writer


def run_generate(recipe: Recipe, worker: tuple[int, int] = (0, 1), connect: Connect | None = None) -> None:
    """Write a corpus of text, or resume it: every missing shard that no other process is writing.

    Args:
        worker: (i, n): write only every n-th shard, starting at the i-th.
        connect: connects to engines elsewhere, as for `stage1_teacher.dump.run.run_teacher`; None: an engine in this
            process.
    Raises:
        ValueError: the folder holds other text, the writer cannot be run as the recipe says, no prompt is usable, or
            `connect` found no cluster.
        OSError: the folder cannot be written, or the engine failed too often.
    """
    folder = location(generate_config(recipe).path)
    require_place(folder, "generate.path")
    with terminable(), ExitStack() as connected:
        # First, so that a missing cluster is found before the prompts are read.
        engines = connected.enter_context(connect()) if connect else open_here
        writer = resolve_writer(recipe)
        log.info(f"{folder}: {describe(writer.licence).replace('the teacher', 'the writer')}")
        make_folder(folder / dump_files.SHARDS)
        with open_claims(folder, "generate.path") as claims:
            job = replace(_plan(recipe, folder, writer, claims), worker=worker)
            counts = ", ".join(f"{key} {value}" for key, value in job.manifest.prompt_counts.items())
            shards = count_of(len(job.manifest.shards), "shard")
            log.info(f"{folder}: {shards} planned, {len(job.missing())} to write; prompts: {counts}")
            try:
                make_missing(job, engines, _count_left_out)
            except (KeyboardInterrupt, Terminated):
                log.info(f"{folder}: stopped; {job.describe_done()} complete and kept")
                raise
            _finish(job)


def _plan(recipe: Recipe, folder: Location, writer: Writer, claims: Claims) -> TextJob:
    """Plan the corpus, create its folder or check that it holds this text, and return all of it as a job."""
    corpus = Corpus(generate_config(recipe).prompts)
    with claims.planning():
        planned, places = plan_text(recipe, writer, corpus, claims.renew)
        tell_left_out(planned.prompt_counts, corpus.first_places)
        with claims.writing_json():
            manifest = create_or_check(folder, planned)
            with committed(folder / dump_files.RECIPE) as path:
                save_recipe(recipe, path)
    claims.remove_dead_partials()
    # Said here, because their defaults depend on the machine, and engines may be on another.
    dtypes = {key: getattr(writer.section, key) for key in ("dtype", "head_dtype")}
    return TextJob(
        recipe=recipe.with_values(teacher=writer.section.model_copy(update=dtypes)),
        folder=folder,
        manifest=manifest,
        claims=claims,
        worker=(0, 1),
        corpus=corpus,
        writer=writer,
        places=places,
    )


def _count_left_out(done: ShardProgress) -> None:
    metrics.figures().failures.labels("document").inc(done.left_out)


def _finish(job: TextJob) -> None:
    """Write the summary and the card of a complete corpus, whoever wrote its last shard."""
    folder, manifest = job.folder, job.manifest
    num_missing = len(manifest.missing(folder))
    if num_missing:
        shards = f"{count_of(num_missing, 'shard')} {are(num_missing)}"
        log.info(f"{folder}: {shards} missing; other processes write the rest, or run the same command again")
        return
    with job.claims.writing_json():
        summary = summarise(folder, manifest)
        write_json(folder / dump_files.SUMMARY, summary)
        write_text_card(folder, manifest, summary, job.writer.licence)
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
    log.info(f"{folder}: dump it with `bld teacher RECIPE`, where corpus.source is {folder}{field}")
