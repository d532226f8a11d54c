"""`bld eval` and `bld report`: figures of models and runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import Overrides, is_recipe, load

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|RECIPE", help="A model's source, or a recipe: its start, student, teacher.")
    ],
    override: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose eval section says which text (with a MODEL).")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text to evaluate on (default: the recipe's).")
    ] = None,
    field: Annotated[str, typer.Option(help="Column of --corpus that holds the text.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of --corpus (default: all).")] = None,
    dump: Annotated[
        str | None, typer.Option(metavar="DUMP", help="Also measure the byte divergence to this dump, nats.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Token put before a document (default: the tokenizer's own).")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Token that ends a document (default: the tokenizer's own).")] = None,
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write the figures here.")] = None,
) -> None:
    """Bits per byte on held-out text, and byte divergence to a dump."""
    from pipeline import evaluation

    chosen = evaluation.custom_corpus(corpus, field, limit)
    if is_recipe(target):
        if recipe is not None:
            raise ValueError(f"{target} is a recipe already; leave out --recipe {recipe}")
        loaded = load(target, override)
        jobs = evaluation.jobs_of_recipe(loaded)
        corpora, dump_used = chosen or evaluation.corpora_of(loaded), dump
        out = evaluation.result_path(loaded)
    else:
        corpora, dump_used = chosen or _corpora_of_recipe(recipe, override), dump
        jobs, out = [evaluation.Job(target, target, start, end)], None
    _run_jobs(jobs, corpora, dump_used, [path for path in (out, json) if path is not None])


def _corpora_of_recipe(recipe: str | None, override: list[str] | None) -> "dict[str, CorpusConfig]":
    from pipeline import evaluation

    if recipe is None:
        raise ValueError("no text to evaluate on: give --corpus SOURCE, or --recipe RECIPE with an eval section")
    return evaluation.corpora_of(load(recipe, override))


def _run_jobs(jobs: list[Any], corpora: "dict[str, CorpusConfig]", dump: str | None, outs: list[Path]) -> None:
    from pipeline import evaluation
    from schemas.manifest import write_json
    from schemas.store import location
    from stage2_student.evaluate import run_eval

    where = None if dump is None else location(dump)
    results = {job.name: run_eval(job.model, corpora, where, job.start, job.end, None) for job in jobs}
    for out in outs:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, results)
    evaluation.print_results(results)
    for out in outs:
        typer.echo(f"written: {out}")


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or recipes (their student.path).")
    ],
    override: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write (default: report.html in the first run).")
    ] = None,
) -> None:
    """One self-contained HTML page that compares runs: curves, final figures, recipe differences, the dumps' audit.

    Runs may be unfinished, or not evaluated yet; a dump that is not on this machine is left out.
    """
    from pipeline.report import write_report

    folders = [run_folder(run, override) if is_recipe(run) else Path(run) for run in runs]
    typer.echo(write_report(folders, out or folders[0] / "report.html"))


def run_folder(recipe: str, override: list[str] | None) -> Path:
    """A recipe's student.path. Raises ValueError where it has no student."""
    section = load(recipe, override).student
    if section is None:
        raise ValueError(f"{recipe} has no student section, so there is no run to report on")
    return Path(section.path)
