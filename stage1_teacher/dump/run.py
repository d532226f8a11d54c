"""The dump: plan, make the missing shards, finish. Running it again resumes it; a second process joins it."""

import shlex
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pipeline.config import Recipe
from pipeline.corpus.documents import Corpus
from pipeline.dumps.card import write_card
from pipeline.dumps.licence import describe, with_licence
from pipeline.runtime import log, metrics
from pipeline.runtime.format import are, count_of
from pipeline.runtime.termination import Terminated, terminable
from schemas import dump_files
from schemas.manifest import read_json, write_json
from schemas.storage.atomic import make_folder
from schemas.storage.locations import Location, location
from stage1_teacher.coordination import shard_job
from stage1_teacher.coordination.shard_claims import open_claims, require_place
from stage1_teacher.coordination.shard_job import Connect, OpenShardMaker, open_here
from stage1_teacher.coordination.shard_work import ShardProgress
from stage1_teacher.dump import audit
from stage1_teacher.dump.begun import as_begun
from stage1_teacher.dump.input_files import are_as_noted, inputs_sha256, is_done, is_summed_up, note_inputs
from stage1_teacher.dump.job import DumpJob
from stage1_teacher.dump.planning import plan_dump
from stage1_teacher.dump.summary import summarise, summary_text
from stage1_teacher.inputs.fit_windows import with_fitting_windows
from stage1_teacher.targets.resolved import load_tokenizer


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
        engines = connected.enter_context(connect()) if connect else open_here
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
        job = replace(plan_dump(recipe, corpus, teacher, claims, accept_engine), worker=worker)
        try:
            make_missing(job, engines)
        except (KeyboardInterrupt, Terminated):
            log.info(f"{dump}: stopped; {job.describe_done()} complete and kept")
            raise
        finish(job)
        if is_summed_up(dump, job.manifest):
            with claims.writing_json():
                note_inputs(dump, named, at_start)


def make_missing(job: DumpJob, open_it: OpenShardMaker) -> None:
    """Make every shard that is missing and unclaimed; see `stage1_teacher.coordination.shard_job.make_missing`."""

    def take(done: ShardProgress) -> None:
        count_missing(done)
        if done.audited:
            write_audit(job)

    counts = describe_counts(job.manifest.corpus_counts)
    shards = count_of(len(job.manifest.shards), "shard")
    log.info(f"{job.folder}: {shards} planned, {len(job.missing())} to make; corpus: {counts}")
    shard_job.make_missing(job, open_it, take)


def count_missing(done: ShardProgress) -> None:
    """Count the probability mass that the targets lack, for `--metrics`."""
    figures = metrics.figures()
    figures.positions.inc(done.positions)
    figures.missing.labels("dropped").inc(done.dropped)
    figures.missing.labels("tail").inc(done.tail)
    figures.failures.labels("document").inc(done.left_out)


def finish(job: DumpJob) -> None:
    """Write the summary of a complete dump, whoever made its last shard; otherwise report what is missing."""
    dump, manifest = job.folder, job.manifest
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


def write_audit(job: DumpJob) -> dict[str, Any]:
    """Gather the audit from the shards into `audit.json`, and return it."""
    with job.claims.writing_json():
        gathered = audit.gather(job.folder, job.manifest)
        write_json(job.folder / dump_files.AUDIT, gathered)
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
