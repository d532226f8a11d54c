"""`bld teacher`, `bld student`, `bld export`: the stages, and what the second one leaves."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import DryRun, Metrics, Overrides, RecipeArgument, as_begun, ask_for_metrics, load


def teacher(
    recipe: RecipeArgument,
    override: Overrides = None,
    dry_run: DryRun = False,
    worker: Annotated[
        str, typer.Option(metavar="I/N", help="This is worker I of N, counted from 0: it makes every N-th shard.")
    ] = "0/1",
    accept_engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME-VERSION",
            help="Go on with a dump that another engine began, as in vllm-0.33.0; it is recorded.",
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Have the shards made by engines on a Ray cluster (default: by this process).")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The cluster of --ray (default: that of RAY_ADDRESS, or one of this machine, or one started for this dump).",
        ),
    ] = None,
    metrics: Metrics = None,
) -> None:
    """Stage 1: dump the teacher's next-byte distributions, or resume a dump.

    Start it more than once on one dump, and the processes share the shards. Exit codes: 0 done, 1 an error that is
    named, 2 a wrong option, 130 or 143 stopped by SIGINT or SIGTERM: the same command goes on.
    """
    if dry_run:
        from pipeline.planning.dry_run import print_plan

        print_plan(as_begun(load(recipe, override)))
        return
    from pipeline.runtime.metrics import served
    from stage1_teacher.dump.run import run_teacher

    ask_for_metrics(metrics)
    if address is not None and not ray:
        raise ValueError(f"--address {address} is that of a Ray cluster; give --ray too")
    connect = None
    if ray:
        from stage1_teacher.ray.pool import cluster_engines

        connect = partial(cluster_engines, address)
    with served():
        run_teacher(load(recipe, override), parse_worker(worker), accept_engine, connect)


def parse_worker(text: str) -> tuple[int, int]:
    """`I/N` as numbers. Raises ValueError unless 0 <= I < N."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--worker {text}: give I/N with 0 <= I < N, as in 0/4")
    return int(index), int(count)


def student(
    recipe: RecipeArgument, override: Overrides = None, dry_run: DryRun = False, metrics: Metrics = None
) -> None:
    """Stage 2: train the student under the DeepSpeed launcher, or resume; under torchrun or srun, as one of their
    ranks.

    Exit codes: 0 done, 1 an error that is named, 130 or 143 stopped by SIGINT or SIGTERM, with a checkpoint: the same
    command goes on.
    """
    from stage2_student.launch.launch import launch_student

    ask_for_metrics(metrics)
    code = launch_student(load(recipe, override), dry_run)
    if code:
        raise typer.Exit(code)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a student's run (its student.path).")],
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/export).")] = None,
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step (default: the newest).")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint of the fewest bits per byte held out (train.eval_every).")
    ] = False,
) -> None:
    """Write a plain Hugging Face folder from a run's checkpoint."""
    from stage2_student.runs.export import export as export_run

    typer.echo(export_run(run, out, step, best))
