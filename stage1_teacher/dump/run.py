"""The dump: plan, make the missing shards, finish. Running it again resumes it; a second process joins it."""

import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from itertools import chain
from typing import Any

from pipeline.config import Recipe
from pipeline.corpus.documents import Corpus, DocumentReader
from pipeline.dumps.card import write_card
from pipeline.dumps.licence import describe, with_licence
from pipeline.runtime import log, metrics
from pipeline.runtime.format import are, count_of
from pipeline.runtime.progress import Progress
from pipeline.runtime.termination import Terminated, terminable
from schemas import dump_files
from schemas.manifest import ShardPlan, read_json, write_json
from schemas.storage.atomic import make_folder, remove
from schemas.storage.locations import Location, location
from stage1_teacher.coordination.shard_claims import open_claims, require_place
from stage1_teacher.coordination.shard_writers import open_writers
from stage1_teacher.dump import audit, shard_plan
from stage1_teacher.dump.begun import as_begun
from stage1_teacher.dump.check_resumed import check_resumed
from stage1_teacher.dump.input_files import are_as_noted, inputs_sha256, is_done, is_summed_up, note_inputs
from stage1_teacher.dump.job import Connect, Job, OpenShardMaker, ShardMaker, ShardWork
from stage1_teacher.dump.places import Places
from stage1_teacher.dump.planning import plan_dump
from stage1_teacher.dump.shard_writer import ShardProgress, make_shards
from stage1_teacher.dump.summary import summarise, summary_text
from stage1_teacher.inputs.fit_windows import with_fitting_windows
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import ResolvedTeacher, load_tokenizer


def run_teacher(
    recipe: Recipe,
    worker: tuple[int, int] = (0, 1),
    accept_engine: str | None = None,
    connect: Connect | None = None,
) -> None:
    """Make or resume a dump: make every missing shard that no other process is making.

    Args:
        worker: (i, n): make only every n-th shard, starting at the i-th.
        accept_engine: see `shard_plan.create_or_check_manifest`.
        connect: connects to engines elsewhere, as `stage1_teacher.ray.pool.cluster_engines` does; None: an engine in
            this process.
    Raises:
        ValueError: the folder holds another dump, the corpus has changed since it was planned, or `connect` found no
            cluster.
        OSError: the folder cannot be written, or the engine failed too often.
    """
    require_place(location(recipe.dump.path))
    recipe = as_begun(recipe)
    if accept_engine is None and is_done(recipe):
        log.info(
            f"{recipe.dump.path}: complete, and its inputs are unchanged (sizes and times of files); nothing to do"
        )
        say_next(location(recipe.dump.path))
        return
    with terminable(), ExitStack() as connected:
        # First, so that a missing cluster is found before the corpus is read.
        engines = connected.enter_context(connect()) if connect else this_process
        _run(recipe, worker, accept_engine, engines)


def _run(recipe: Recipe, worker: tuple[int, int], accept_engine: str | None, engines: OpenShardMaker) -> None:
    dump = location(recipe.dump.path)
    at_start = inputs_sha256(recipe)
    named = recipe
    teacher = load_tokenizer(recipe)
    recipe = with_fitting_windows(recipe, teacher.model)
    for remark in teacher.tokenizer.remarks():
        log.info(f"{dump}: the teacher's tokenizer {remark}")
    recipe = with_licence(recipe, teacher.model)
    log.info(f"{dump}: {describe(recipe.teacher.license)}")
    make_folder(dump / dump_files.SHARDS)
    with open_claims(dump) as claims:  # first, so that a read-only place fails before the corpus is read
        corpus = Corpus(recipe.corpus, recipe.dump.arithmetic_used)
        job = plan_dump(recipe, corpus, teacher, claims, accept_engine)._replace(worker=worker)
        manifest = job.manifest
        try:
            make_missing(job, corpus, lambda: engines(job, teacher))
        except (KeyboardInterrupt, Terminated):
            done = len(manifest.shards) - len(manifest.missing(dump))
            log.info(
                f"{dump}: stopped; {done} of {count_of(len(manifest.shards), 'shard')} {are(done)} complete and kept"
            )
            raise
        finish(job)
        if is_summed_up(dump, manifest):
            with claims.writing_json():
                note_inputs(dump, named, at_start)


@contextmanager
def this_process(job: Job, teacher: ResolvedTeacher) -> Iterator[ShardMaker]:
    """Open an engine in this process, and yield what makes shards with it."""
    with open_teacher(job.recipe, *teacher, branches=bool(job.audited)) as opened:
        check_resumed(job.dump, job.manifest, opened)
        with closing(open_writers(job.recipe.placement)) as writers:
            to = (opened, job.recipe, job.manifest.identity, job.dump, job.audited, writers)
            yield lambda shards: make_shards(shards, *to)


def make_missing(job: Job, corpus: Corpus, open_it: Callable[[], AbstractContextManager[ShardMaker]]) -> None:
    """Make every shard that is missing and unclaimed, until there are none: another process may die and leave some.

    Args:
        open_it: opens what makes the shards; called only if there are any.
    """
    todo = job.missing()
    counts = describe_counts(job.manifest.corpus_counts)
    log.info(
        f"{job.dump}: {count_of(len(job.manifest.shards), 'shard')} planned, {len(todo)} to make; corpus: {counts}"
    )
    rounds = free_shards(job)
    first = next(rounds, None)
    if first is None:
        return
    reader = corpus.reader()
    remove(job.dump / dump_files.SUMMARY)  # out of date, if a shard was lost after it was written
    with ExitStack() as opened:
        make = opened.enter_context(open_it())
        started, num_made = time.monotonic(), 0
        progress = opened.enter_context(Progress(sum(s.num_documents for s in todo), sum(s.num_bytes for s in todo)))
        for shards in chain([first], rounds):
            for done in make(read_shards(shards, reader, job.places)):
                progress.update(done.documents, done.text_bytes, done.tokens, done.stored_bytes)
                count_missing(done)
                job.claims.renew()
                if done.committed is not None:
                    num_made += 1
                    log.debug(f"{job.dump}: shard {done.committed}, {done.stored_bytes:,} bytes", shard=done.committed)
                    job.claims.give_back(done.committed)
                if done.audited:
                    write_audit(job)
    log.info(f"{job.dump}: {count_of(num_made, 'shard')} in {time.monotonic() - started:.1f} s")


def count_missing(done: ShardProgress) -> None:
    """Count the probability mass that the targets lack, for `--metrics`."""
    figures = metrics.figures()
    figures.positions.inc(done.positions)
    figures.missing.labels("dropped").inc(done.dropped)
    figures.missing.labels("tail").inc(done.tail)
    figures.failures.labels("document").inc(done.left_out)


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


def read_shards(shards: Iterable[ShardPlan], reader: DocumentReader, places: Places) -> Iterator[ShardWork]:
    """Yield each shard with its documents. Raises ValueError if the corpus has changed."""
    for shard in shards:
        yield shard, shard_plan.shard_documents(shard, reader, places)


def finish(job: Job) -> None:
    """Write the summary of a complete dump, whoever made its last shard; otherwise report what is missing."""
    dump, manifest = job.dump, job.manifest
    num_missing = len(manifest.missing(dump))
    if num_missing:
        shards = f"{count_of(num_missing, 'shard')} {are(num_missing)}"
        log.info(f"{dump}: {shards} missing; other processes make the rest, or run the same command again")
        return
    with job.claims.writing_json():
        # Written before by this process or another; making a shard removes it. A shard modified since is read again.
        is_current = is_summed_up(dump, manifest) and are_as_noted(dump)
        summary = read_json(dump / dump_files.SUMMARY) if is_current else summarise(dump, manifest)
        if not is_current:
            write_json(dump / dump_files.SUMMARY, summary)
    if not (is_current and (dump / dump_files.AUDIT).exists()):
        warn_not_own(dump, write_audit(job)["models_own_tokens"])
    write_card(dump)
    log.info(f"{dump}: complete; {summary_text(summary)}")
    say_next(dump)


def say_next(dump: Location) -> None:
    """Print the commands that use a complete dump."""
    named = shlex.quote(str(dump))
    log.info(
        f"{dump}: view it with `bld inspect {named}`, check it with `bld verify {named}`, train on it with "
        "`bld student RECIPE`"
    )


def write_audit(job: Job) -> dict[str, Any]:
    """Gather the audit from the shards into `audit.json`, and return it."""
    with job.claims.writing_json():
        gathered = audit.gather(job.dump, job.manifest)
        write_json(job.dump / dump_files.AUDIT, gathered)
    return gathered


def warn_not_own(dump: Location, own: dict[str, Any]) -> None:
    """Warn if stored log-probabilities are not the model's own; `own` is the audit's `models_own_tokens`."""
    if own["tokens"] and not own["half_mean_square_nats"] <= own["limit_nats"]:
        log.warning(
            f"{dump}: the stored log-probabilities of {own['tokens']} audited tokens differ by "
            f"{own['half_mean_square_nats']:.3g} nats (half the mean square; limit {own['limit_nats']}) from the "
            f"model's own: `bld verify {shlex.quote(str(dump))} --against-teacher 8` names the documents"
        )


def describe_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in counts.items()) or "no counts"
