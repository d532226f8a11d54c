"""`bld teacher`, `bld start`, `bld student` and `bld export`: the two stages, a student's start and its export."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.engines import OnRay, RayAddress, Worker, engines_elsewhere, parse_worker
from pipeline.cli.options import AsJson, DryRun, Metrics, Overrides, RecipeArgument, as_begun, ask_for_metrics, load
from pipeline.cli.planning import cuts_records


def teacher(
    recipe: RecipeArgument,
    override: Overrides = None,
    dry_run: DryRun = False,
    worker: Worker = None,
    accept_engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME-VERSION",
            help="Continue a dump begun with this other engine, e.g. vllm-0.33.0; it is recorded.",
        ),
    ] = None,
    ray: OnRay = False,
    address: RayAddress = None,
    metrics: Metrics = None,
) -> None:
    """Stage 1: dump the teacher's next-byte distributions, or resume a dump.

    Without --worker, --ray or several tasks of SLURM, engines run on all GPUs of this machine (placement.engines).
    Several processes started on one dump share its shards. Exit codes: 0 done, 1 an error, which is named, 2 a wrong
    option, 130 or 143 stopped by SIGINT or SIGTERM; the same command resumes.
    """
    if dry_run:
        from pipeline.planning.dry_run import print_plan

        planned = as_begun(load(recipe, override))
        print_plan(planned, cuts_records(planned))
        return
    from pipeline.runtime.metrics import served
    from stage1_teacher.dump.run import run_teacher

    ask_for_metrics(metrics)
    connect = engines_elsewhere(worker, ray, address)
    with served():
        run_teacher(load(recipe, override), parse_worker(worker), accept_engine, connect)


def initial_student(
    recipe: RecipeArgument,
    override: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each text (default: the recipe's).")] = None,
    json: AsJson = False,
) -> None:
    """Make the student as it starts, and measure it on the eval text: is this pair of tokenizers worth a run?

    `bld student` then trains from it. Bits are per byte of the whole text, beside those of the same model before its
    tokenizer changed: on tokens whose rows were made, on the two tokens after one, and on all others.
    """
    from pipeline.evaluation.start_table import print_start
    from stage2_student.runs.start import make_start

    figures = make_start(load(recipe, override), limit)
    if json:
        typer.echo(dumps(figures))
    else:
        print_start(figures)


def student(
    recipe: RecipeArgument, override: Overrides = None, dry_run: DryRun = False, metrics: Metrics = None
) -> None:
    """Stage 2: train the student, or resume, under the DeepSpeed launcher; under torchrun or srun, run as one rank.

    Exit codes: 0 done, 1 an error, which is named, 130 or 143 stopped by SIGINT or SIGTERM, with a checkpoint; the same
    command resumes.
    """
    from stage2_student.launch.launch import launch_student

    ask_for_metrics(metrics)
    code = launch_student(load(recipe, override), dry_run)
    if code:
        raise typer.Exit(code)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a student's run (its student.path).")],
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/export).")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of this step (default: the newest).")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Checkpoint with the lowest held-out bits per byte (train.eval_every).")
    ] = False,
) -> None:
    """Export a run's checkpoint as a plain Hugging Face folder, with a model card."""
    from pipeline.reports.student_card import write_student_card
    from stage2_student.runs.export import export as export_run

    exported = export_run(run, out, step, best)
    write_student_card(run, exported)
    typer.echo(exported)
