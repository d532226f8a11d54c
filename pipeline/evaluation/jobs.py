"""Which models `bld eval` measures on which text and tasks, and the table of what it finds on text."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from pipeline.config import CorpusConfig, Recipe, StudentConfig, TasksConfig, corpora_of
from pipeline.config.evaluated import EvaluatedModel
from pipeline.runtime.log import say
from pipeline.runtime.model_source import ModelSource
from schemas.manifest import read_json


def custom_corpus(source: str | None, field: str | None, limit: int | None) -> dict[str, CorpusConfig]:
    """The corpus of the command line, by name; empty where it names none.

    Args:
        field: None is `text`.
    Raises:
        ValueError: a field or a limit of no corpus.
    """
    if source is None:
        of_none = [f"--{name} {value}" for name, value in (("field", field), ("limit", limit)) if value is not None]
        if of_none:
            raise ValueError(
                f"{', '.join(of_none)}: this belongs to --corpus; of a recipe's text it is eval.field and eval.limit (-o eval.limit=100)"
            )
        return {}
    name = Path(source).name
    # The figures on a dump are called `dump`.
    return {"text" if name in ("", "dump") else name: CorpusConfig(source=source, field=field or "text", limit=limit)}


def custom_tasks(names: str | None, options: Mapping[str, Any], start: str | None) -> dict[str, TasksConfig]:
    """The tasks of the command line as one group; empty where it names none.

    Args:
        names: with commas between them.
        options: keys of a group; None is its default. Raises ValueError for one that is given without names.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if names is None:
        if given:
            raise ValueError(
                f"{', '.join(given)}: these belong to --tasks; a recipe has them in its groups of eval.tasks"
            )
        return {}
    return {"tasks": TasksConfig(names=tuple(name.strip() for name in names.split(",")), start=start, **given)}


class Wanted(NamedTuple):
    """What is to be measured of each model: text by name, and groups of tasks; one of them may be empty."""

    corpora: dict[str, CorpusConfig]
    tasks: dict[str, TasksConfig]
    published: dict[str, dict[str, float]]

    @property
    def metrics(self) -> dict[str, str]:
        """Which figure stands for a task."""
        return {task: metric for group in self.tasks.values() for task, metric in group.metrics.items()}


def wanted(
    recipe: Recipe | None, corpora: dict[str, CorpusConfig], tasks: dict[str, TasksConfig], dump: str | None
) -> Wanted:
    """What the command line names, else what the recipe's eval section does. Raises ValueError for nothing at all."""
    if recipe is not None and recipe.eval is not None:
        return Wanted(corpora or corpora_of(recipe), tasks or recipe.eval.tasks, recipe.eval.published)
    if not (corpora or tasks or dump):
        raise ValueError(
            "no text to evaluate on: give --corpus SOURCE, --tasks NAMES or --dump DUMP, or a recipe with an eval section "
            "(eval: {source: ...})"
        )
    return Wanted(corpora, tasks, {})


def jobs_of_recipe(recipe: Recipe) -> list[EvaluatedModel]:
    """The student's start, the trained student and the teacher, unless a server has it. Raises ValueError before the student is trained."""
    student, teacher = _student(recipe), recipe.teacher
    folder = Path(student.path)
    if not (folder / "export").exists():
        raise ValueError(f"{folder / 'export'} does not exist: run `bld student` first, or `bld export {folder}`")
    own = [("start", folder / "start"), ("student", folder / "export")]
    trust = student.trust_remote_code
    jobs = [
        EvaluatedModel(name, ModelSource(str(path), None, trust), student.start, student.end)
        for name, path in own
        if path.exists()
    ]
    if teacher.engine_spec.served:
        say(f"teacher: {teacher.name_at_server} is on a server and cannot be loaded here; it is not measured")
        return jobs
    return [*jobs, EvaluatedModel("teacher", teacher.source, teacher.start, teacher.end or None)]


def result_path(recipe: Recipe, custom: Mapping[str, CorpusConfig] | None = None) -> Path:
    """Return where a recipe's figures are kept: eval.json in its run, for its own text; beside it, for the `custom_corpus` of a command line."""
    run = Path(_student(recipe).path)
    if not custom:
        return run / "eval.json"
    [(name, corpus)] = custom.items()
    # Two files of one name are two texts; as many documents of it as were asked for replace each other.
    which = hashlib.sha256(json.dumps([corpus.source, corpus.field]).encode()).hexdigest()[:6]
    return run / f"eval-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{which}.json"


def read_results(run: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all figures on text that `result_path` has kept in a run, by model and corpus; empty where there are none.

    A corpus of a command line whose name another has already is called as its file is.
    """
    own = run / "eval.json"
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in [*([own] if own.exists() else []), *sorted(run.glob("eval-*.json"))]:
        remedy = "Delete it, and run `bld eval` again"
        read = read_json(path, remedy=remedy)
        if not all(isinstance(corpora, dict) for corpora in read.values()):
            raise ValueError(f"{path} is damaged: it holds no figures by model and corpus. {remedy}")
        taken = {corpus for corpora in found.values() for corpus in corpora}
        for model, corpora in read.items():
            for corpus, figures in corpora.items():
                name = f"{corpus} ({path.stem.removeprefix('eval-')})" if corpus in taken else corpus
                found.setdefault(model, {})[name] = figures
    return found


def _student(recipe: Recipe) -> StudentConfig:
    if recipe.student is None:
        raise ValueError("the recipe has no student section; give a model instead: bld eval MODEL --recipe RECIPE")
    return recipe.student


_UNSHOWN = ("nats", "num_tokens", "num_windows", "text_sha256")  # in the JSON


def print_results(results: Mapping[str, Mapping[str, Mapping[str, Any]]], console: Console | None = None) -> None:
    """A table with a row per model and corpus, a column per figure."""
    rows = [(model, corpus, figures) for model, corpora in results.items() for corpus, figures in corpora.items()]
    # What is empty everywhere, and what follows from the other columns, only makes the table too wide to read.
    names = dict.fromkeys(name for _, _, figures in rows for name, value in figures.items() if value != {})
    names = {name: None for name in names if name not in _UNSHOWN}
    table = Table("model", "corpus", *[name.replace("_", " ") for name in names])
    for model, corpus, figures in rows:
        table.add_row(model, corpus, *[format_figure(figures.get(name)) for name in names])
    (console or Console()).print(table)


def format_figure(value: object) -> str:
    """A figure for reading: four decimals (four digits below 0.01), or thousands marked; a dash where there is none."""
    if isinstance(value, float):
        return f"{value:.4g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else ("-" if value is None else str(value))
