"""`bld eval` and `bld report`: figures of models and runs."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import Overrides, is_recipe, load

if TYPE_CHECKING:
    from pipeline.config import Recipe
    from pipeline.config.evaluated import EvaluatedModel
    from pipeline.evaluation.request import EvaluationRequest


def evaluate(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL|RECIPE", help="A model's source, or a recipe: its start, student and teacher."),
    ],
    override: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose eval section gives the text (with a MODEL).")] = None,
    corpus: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text to evaluate on (default: the recipe's).")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Column of --corpus that holds the text, or `messages` (default: text).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of --corpus (default: all).")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--max_tokens",
            min=8,
            help="Tokens per window; longer documents are read in several (default: the recipe's eval.max_tokens, "
            "else 2048, or as many as the model has positions for).",
        ),
    ] = None,
    dump: Annotated[
        str | None, typer.Option(metavar="DUMP", help="Also measure the byte divergence to this dump, nats.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Token put before a document (default: the tokenizer's own).")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Token that ends a document (default: the tokenizer's own).")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a MODEL on a hub (default: its main branch).")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", "--trust_remote_code", help="Run Python code that comes with the MODEL."),
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Also write the figures on text to this file.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, comma-separated (default: the recipe's); without a hub: "
            "bld_piqa, bld_siqa, bld_openbookqa, bld_boolq, bld_mmlu_sample.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", "--num_fewshot", min=0, help="Examples before each question of --tasks."),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", "--apply_chat_template", help="Ask --tasks in the model's chat template."
        ),
    ] = False,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Questions per task of --tasks (default: all).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of --tasks (default: that of the harness).")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Arithmetic of --tasks: auto (as the weights are saved; float32 on a CPU without bfloat16 "
            "instructions), float32, bfloat16 or float16."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests of --tasks per forward pass (default: what fits on a GPU; on a CPU, 2,048 tokens)."
        ),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Your own task files; Python that they name is run.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the harness' JSON (default: `tasks` in the recipe's run)."),
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", "--log_samples", help="Also write every question's answer, as JSONL.")
    ] = False,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            help="Let the models write on the prompts of the recipe's generate section instead, and count which of "
            "the tokens are their tokenizers' own; the text is kept in `written` of the recipe's run.",
        ),
    ] = False,
    python: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --generate: the prompts are N functions of Python's standard library, and those that parse are "
            "counted.",
        ),
    ] = None,
) -> None:
    """Measure bits per byte on held-out text, byte divergence to a dump, and tasks of lm-evaluation-harness."""
    from pipeline.config.evaluated import EvaluatedModel
    from pipeline.evaluation.request import EvaluationOptions, EvaluationRequest, custom_corpus, custom_tasks
    from pipeline.runtime.model_source import ModelSource

    target_is_recipe = is_recipe(target)
    if target_is_recipe and recipe is not None:
        raise ValueError(f"{target} is already a recipe; leave out --recipe {recipe}")
    loaded = load(target, override) if target_is_recipe else (None if recipe is None else load(recipe, override))
    if target_is_recipe and (revision is not None or trust_remote_code):
        raise ValueError(
            "--revision and --trust-remote-code are for a MODEL; a recipe has them as teacher.revision, "
            "student.trust_remote_code and so on"
        )
    if target_is_recipe and (start is not None or end is not None):
        raise ValueError(
            "--start and --end are for a MODEL; a recipe has them as student.start, student.end, teacher.start "
            "and teacher.end"
        )
    if loaded is None and override:
        raise ValueError(f"-o {override[0]} replaces a value of a recipe, but none is given; add --recipe RECIPE")
    if generate:
        if loaded is None:
            raise ValueError("--generate needs a recipe with a generate section: add --recipe RECIPE")
        only = EvaluatedModel(target, ModelSource(target, revision, trust_remote_code), start, end)
        _run_writing(loaded, None if target_is_recipe else only, out, python)
        return
    if python is not None:
        raise ValueError(f"--python {python} is for the prompts of --generate: add it")
    task_options = {
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template or None,
        "limit": task_limit,
        "seed": seed,
        "dtype": dtype,
        "batch_size": batch_size,
        "include_path": include_path,
    }
    options = EvaluationOptions(
        corpora=custom_corpus(corpus, field, limit),
        tasks=custom_tasks(tasks, task_options, start),
        dump=dump,
        max_tokens=max_tokens,
        json_file=json,
        tasks_folder=out,
        log_samples=log_samples,
    )
    if target_is_recipe:
        assert loaded is not None
        request = EvaluationRequest.of_recipe(loaded, options)
    else:
        model = EvaluatedModel(target, ModelSource(target, revision, trust_remote_code), start, end)
        request = EvaluationRequest.of_model(model, loaded, options)
    _run_text(request)
    _run_tasks(request)


def _run_writing(recipe: "Recipe", model: "EvaluatedModel | None", out: Path | None, python: int | None) -> None:
    """Let the models of a recipe, or one other, write on its prompts, one after the other."""
    from pipeline.config import student_config
    from pipeline.evaluation.python_functions import count_parsed
    from pipeline.evaluation.request import models_of_recipe
    from pipeline.evaluation.written import print_written, with_functions, writing_recipe
    from schemas import dump_files
    from schemas.manifest import read_json
    from stage1_teacher.generation.run import run_generate

    if model is not None and out is None:
        raise ValueError("--generate writes text: give --out FOLDER for that of a MODEL")
    models = models_of_recipe(recipe) if model is None else [model._replace(name=Path(model.name).name)]
    folder = out or Path(student_config(recipe).path) / "written"
    if python is not None:
        recipe, folder = with_functions(recipe, folder, python)
    summaries = {}
    for one in models:
        run_generate(writing_recipe(recipe, one, folder))
        summaries[one.name] = read_json(folder / one.name / dump_files.SUMMARY)
    print_written(summaries, {} if python is None else {name: count_parsed(folder / name) for name in summaries})


def _run_text(request: "EvaluationRequest") -> None:
    from pipeline.evaluation.results import print_results
    from schemas.manifest import write_json
    from schemas.storage.locations import location
    from stage2_student.evaluation.bits_per_byte import run_eval

    if not request.corpora and request.dump is None:
        return
    dump = None if request.dump is None else location(request.dump)
    results = run_eval(request.models, request.corpora, dump, max_tokens=request.max_tokens)
    for file in request.files:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, results)
    print_results(results)
    for file in request.files:
        typer.echo(f"written: {file}")


def _run_tasks(request: "EvaluationRequest") -> None:
    """Run the tasks on each model; a model's answers are on disk before the next one starts."""
    from pipeline.evaluation.task_table import print_tasks, save_tasks

    if not request.tasks:
        return
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks need lm-evaluation-harness: {sys.executable} -m pip install 'byte-level-distillation[eval]'"
        )
    from stage2_student.evaluation.lm_eval_tasks import run_tasks

    results = {}
    folders = request.task_folders
    for model in request.models:
        results[model.name] = run_tasks(model.source, request.tasks, request.log_samples)
        for path in save_tasks(results[model.name], folders[model.name]) if model.name in folders else []:
            typer.echo(f"written: {path}")
    print_tasks(results, request.metrics, request.published)


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or recipes (their student.path).")
    ],
    override: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write (default: report.html in the first run).")
    ] = None,
) -> None:
    """Write one self-contained HTML page comparing runs: curves, final figures, recipe differences, dump audits.

    Prints its path and, on stderr, what the students have achieved. Several runs measured on the same text are also
    drawn by method: those that differ in steps are one line, in seeds one point with its 95 % interval.

    Runs may be unfinished or not yet evaluated; a dump that is not on this machine is left out.
    """
    from pipeline.reports.achieved import achieved
    from pipeline.reports.page import write_report
    from pipeline.runtime import log

    folders = [run_folder(run, override) if is_recipe(run) else Path(run) for run in runs]
    file = out or folders[0] / "report.html"
    found = write_report(folders, file)
    typer.echo(file)
    for sentence in achieved(found, file):
        log.info(sentence)


def run_folder(recipe: str, override: list[str] | None) -> Path:
    """Return a recipe's student.path. Raises ValueError if it has no student."""
    section = load(recipe, override).student
    if section is None:
        raise ValueError(f"{recipe} has no student section, so there is no run to report on")
    return Path(section.path)
