"""`bld`: the operator's commands. A stage is imported only inside the command that runs it: `--help` is fast."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.interrupt import Terminated

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig, Recipe

app = typer.Typer(
    help="Offline distillation between language models with different tokenizers, through bytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RECIPE_SUFFIXES = (".yaml", ".yml")
INTERRUPTED, TERMINATED = 130, 143  # a shell's exit codes for SIGINT and SIGTERM

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or the name of one in pipeline/recipes.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="SECTION.KEY=VALUE", help="Replace one value of the recipe; repeatable."),
]
DumpArgument = Annotated[
    str, typer.Argument(metavar="DUMP", help="Folder of a dump, or its address (s3://, gs:// or hf://).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe and print what would be done; load no weights.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from pipeline.recipe import load_recipe

    return load_recipe(recipe, overrides or [])


def version_text() -> str:
    """`bld 0.1.0`, with the git revision where the package lies in a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        text = f"bld {package_version('byte-level-distillation')}"
    except PackageNotFoundError:
        text = "bld, not installed: run from its folder"
    if not (root / ".git").exists():
        return text
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git itself is not installed
        return text
    return f"{text} ({found.stdout.strip()})" if found.returncode == 0 else text


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_text())
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print version and git revision.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (default: one line).")] = False,
) -> None:
    """Options before the command. `--debug` is read in `main`, which catches what commands raise."""


@app.command()
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
) -> None:
    """Stage 1: dump the teacher's next-byte distributions, or resume a dump.

    Start it more than once on one dump, and the processes share the shards. Exit codes: 0 done, 1 an error that is named, 2 a wrong
    option, 130 or 143 stopped by SIGINT or SIGTERM: the same command goes on.
    """
    from stage1_teacher.dump import run_teacher

    run_teacher(_load(recipe, override), dry_run, parse_worker(worker), accept_engine, ray, address)


def parse_worker(text: str) -> tuple[int, int]:
    """`I/N` as numbers. Raises ValueError unless 0 <= I < N."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--worker {text}: give I/N with 0 <= I < N, as in 0/4")
    return int(index), int(count)


@app.command()
def student(recipe: RecipeArgument, override: Overrides = None, dry_run: DryRun = False) -> None:
    """Stage 2: train the student under the DeepSpeed launcher, or resume; under torchrun or srun, as one of their ranks.

    Exit codes: 0 done, 1 an error that is named, 130 or 143 stopped by SIGINT or SIGTERM, with a checkpoint: the same command goes on.
    """
    from stage2_student.launch import launch_student

    code = launch_student(_load(recipe, override), dry_run)
    if code:
        raise typer.Exit(code)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a student's run (its student.path).")],
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/export).")] = None,
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step (default: the newest).")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint of the fewest bits per byte held out (train.eval_every).")
    ] = False,
) -> None:
    """Write a plain Hugging Face folder from a run's checkpoint."""
    from stage2_student.export import export as export_run

    typer.echo(export_run(run, out, step, best))


@app.command()
def inspect(
    dump: DumpArgument,
    doc: Annotated[
        str | None, typer.Option(metavar="ID", help="Show this document's positions (default: a summary).")
    ] = None,
    worst: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show the N documents and the N positions of highest surprise, bits."),
    ] = None,
    find: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help=r"Show where this text stands, with its distributions; \n, \t, \xHH work."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the document of --doc (default: the first) as one self-contained page."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=256, help="Symbols shown per position.")] = 5,
    json: AsJson = False,
) -> None:
    """Look into a dump: a summary, a document's positions with their top symbols, or what surprised the teacher."""
    from pipeline import inspect as looking
    from schemas.store import location

    given = [name for name, value in (("--doc", doc), ("--worst", worst), ("--find", find)) if value is not None]
    if len(given) > 1 or (html is not None and (json or given not in ([], ["--doc"]))):
        asked = given + ["--html"] * (html is not None) + ["--json"] * json
        raise ValueError(f"{' and '.join(asked)} do not go together: give one at a time (--html takes --doc)")
    looking.show(location(dump), doc, top, json, worst, find, html)


@app.command()
def verify(
    dump: DumpArgument,
    against_teacher: Annotated[
        int, typer.Option(min=0, metavar="N", help="Documents to recompute with the teacher and compare.")
    ] = 0,
) -> None:
    """Check a dump: every byte's checksum, schema, sums, spans, counts.

    Exit codes: 0 no fault found, 1 something is wrong (each fault on a line of its own), 2 a wrong option.
    """
    from schemas.store import location
    from stage1_teacher.verify import verify_dump

    faults = verify_dump(location(dump), against_teacher)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{dump}: no faults")


@app.command("eval")
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
        loaded = _load(target, override)
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
    return evaluation.corpora_of(_load(recipe, override))


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


def is_recipe(target: str) -> bool:
    """Whether a command's target is a recipe: a YAML file, or the name of one that comes with the package."""
    named = Path(__file__).parent / "recipes" / f"{target}.yaml"
    return target.endswith(RECIPE_SUFFIXES) or ("/" not in target and not Path(target).exists() and named.exists())


@app.command()
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
    section = _load(recipe, override).student
    if section is None:
        raise ValueError(f"{recipe} has no student section, so there is no run to report on")
    return Path(section.path)


@app.command("plan")
def show_plan(recipe: RecipeArgument, override: Overrides = None) -> None:
    """Check a recipe and print what it would fetch, make and write; needs no network and loads no weights."""
    from pipeline.plan import print_plan

    print_plan(_load(recipe, override))


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new dump.")],
    dumps: Annotated[list[Path], typer.Argument(metavar="DUMP...", help="Complete dumps that differ in corpus only.")],
) -> None:
    """Join dumps of one identity; shards are linked, or copied to another file system."""
    from stage1_teacher.merge import merge_dumps

    summary = merge_dumps(out, dumps)
    typer.echo(f"{out}: {summary['documents']} documents in {len(summary['shards'])} shards")


@app.command()
def push(
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="Folder of a complete dump.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Data set on a hub, OWNER/NAME; made where there is none.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new data set public: the text goes with it (default: private).")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to (default: the main one).")] = None,
) -> None:
    """Upload a dump to a hub as a data set, or resume; a dump that is not complete is refused."""
    from pipeline.hub import push as push_dump

    typer.echo(push_dump(dump, repo, public=public, revision=revision))


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Data set on a hub, OWNER/NAME.")],
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="Folder to put the dump in.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit (default: the main branch).")] = None,
) -> None:
    """Download a dump from a hub, or resume, and check it against its checksums."""
    from pipeline.hub import pull as pull_dump

    typer.echo(pull_dump(repo, dump, revision=revision))


@app.command()
def clean(
    dumps: Annotated[
        list[Path] | None, typer.Argument(metavar="DUMP...", help="Dumps to look for half-written files in.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Also the cache of downloads and conversions.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed (default: only list it).")] = False,
) -> None:
    """List half-written files and the cache, with sizes; --yes removes them."""
    from pipeline.clean import clean as clean_up

    if not dumps and not cache:
        raise ValueError("nothing to look at: give DUMP..., or --cache")
    clean_up(dumps or [], cache, yes)


@app.command()
def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also import torch, vLLM and DeepSpeed, each in its own process.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Is this machine ready: versions, devices, disk, memory, known traps."""
    from pipeline.doctor import diagnose

    if not diagnose(deep, json):
        raise typer.Exit(1)


def main() -> None:
    """Run a command. What a user can cause is one line and exit code 1; an interrupt says how to go on, code 130 or 143."""
    try:
        # Not standalone: we say ourselves how to resume. typer gives an interrupt back as code 130.
        code = app(standalone_mode=False) or 0
    except BrokenPipeError:  # `bld inspect ... | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes
        raise SystemExit(141) from None
    except Terminated:
        code = TERMINATED
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        _complain(str(error))
        raise SystemExit(1) from None
    except Exception as error:
        _exit_for_usage_error(error)
        raise
    if code in (INTERRUPTED, TERMINATED):
        _complain("interrupted; what is written stays. Run the same command again to resume.")
    raise SystemExit(code)


def _exit_for_usage_error(error: Exception) -> None:
    """Exit as typer would for its own errors, such as an unknown option. Returns for any other error."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        raise SystemExit(code)


def _complain(text: str) -> None:
    typer.secho(f"bld: {text}", fg=typer.colors.RED if sys.stderr.isatty() else None, err=True)


if __name__ == "__main__":
    main()
