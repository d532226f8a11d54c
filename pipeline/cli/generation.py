"""`bld generate`: text by the teacher or the student, as a corpus."""

from typing import Annotated

import typer

from pipeline.cli.options import DryRun, Metrics, Overrides, RecipeArgument, ask_for_metrics, load
from pipeline.cli.train import parse_worker


def generate(
    recipe: RecipeArgument,
    override: Overrides = None,
    dry_run: DryRun = False,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Run as worker I of N, counted from 0: write every N-th shard (default: all shards)."
        ),
    ] = None,
    metrics: Metrics = None,
) -> None:
    """Write text: the teacher or the student (generate.writer) continues prompts, as a corpus; or resume it.

    `bld teacher` dumps the corpus (corpus.source: its folder); what the model wrote is supervised, prompts are not.
    Several processes started on one corpus share its shards. Exit codes: 0 done, 1 an error, which is named, 2 a wrong
    option, 130 or 143 stopped by SIGINT or SIGTERM; the same command resumes.
    """
    if dry_run:
        from stage1_teacher.generation.dry_run import print_plan

        print_plan(load(recipe, override))
        return
    from pipeline.runtime.metrics import served
    from stage1_teacher.generation.run import run_generate

    ask_for_metrics(metrics)
    with served():
        run_generate(load(recipe, override), parse_worker(worker or "0/1"))
