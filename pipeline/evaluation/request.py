"""Request of `bld eval`: the models, the text and tasks they are measured on, and where figures are written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import CorpusConfig, Recipe, StudentConfig, TasksConfig, corpora_of
from pipeline.config.evaluated import EvaluatedModel
from pipeline.evaluation.results import result_path
from pipeline.runtime import log
from pipeline.runtime.model_source import ModelSource


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of a command line, for any models.

    Attributes:
        corpora: the `custom_corpus`; empty: the recipe's own text.
        tasks: the `custom_tasks`; empty: the recipe's own.
        dump: folder or address of a dump to which the byte divergence is measured.
        max_tokens: tokens per window; None: the recipe's, else what `window_size` chooses.
        json_file: an additional file for the figures on text.
        tasks_folder: folder for the harness' JSON; None: a recipe's run, or nowhere for a model.
        log_samples: whether every answer is written too.
    """

    corpora: Mapping[str, CorpusConfig] = field(default_factory=dict)
    tasks: Mapping[str, TasksConfig] = field(default_factory=dict)
    dump: str | None = None
    max_tokens: int | None = None
    json_file: Path | None = None
    tasks_folder: Path | None = None
    log_samples: bool = False


@dataclass(frozen=True)
class EvaluationRequest:
    """The models to measure, what to measure, and where to write it.

    Attributes:
        models: in the order of the tables.
        corpora, tasks: by name, the same for every model; one of them may be empty.
        published: figures of others, by name and task, shown beside those of tasks.
        dump, max_tokens, log_samples: as in `EvaluationOptions`.
        files: files for the figures on text; each gets all of them.
        task_folders: folders for the answers to tasks, by model name; the answers of other models are not written.
    """

    models: list[EvaluatedModel]
    corpora: Mapping[str, CorpusConfig]
    tasks: Mapping[str, TasksConfig]
    published: Mapping[str, Mapping[str, float]]
    dump: str | None
    max_tokens: int | None
    files: list[Path]
    task_folders: Mapping[str, Path]
    log_samples: bool

    @classmethod
    def of_recipe(cls, recipe: Recipe, options: EvaluationOptions) -> "EvaluationRequest":
        """Make a request for a recipe's start, student and teacher; the figures are stored in its run.

        Raises ValueError if the student is not trained yet, or if nothing is requested.
        """
        models, run = models_of_recipe(recipe), Path(_student(recipe).path)
        tasks_folder = options.tasks_folder or run / "tasks"
        folders = {model.name: tasks_folder / model.name for model in models}
        return cls._build(models, recipe, options, [result_path(run, options.corpora)], folders)

    @classmethod
    def of_model(cls, model: EvaluatedModel, recipe: Recipe | None, options: EvaluationOptions) -> "EvaluationRequest":
        """Make a request for one model, on a recipe's text and tasks if the options name none.

        Raises ValueError if nothing is requested.
        """
        folders = {} if options.tasks_folder is None else {model.name: options.tasks_folder}
        return cls._build([model], recipe, options, [], folders)

    @classmethod
    def _build(
        cls,
        models: list[EvaluatedModel],
        recipe: Recipe | None,
        options: EvaluationOptions,
        files: list[Path],
        task_folders: dict[str, Path],
    ) -> "EvaluationRequest":
        section = None if recipe is None else recipe.eval
        corpora, tasks, dump = options.corpora, options.tasks, options.dump
        if section is None and not (corpora or tasks or dump):
            raise ValueError(
                "no text to evaluate on: give --corpus SOURCE, --tasks NAMES or --dump DUMP, or a recipe with an eval "
                "section (eval: {source: ...})"
            )
        if recipe is not None and section is not None:
            corpora, tasks = corpora or corpora_of(recipe), tasks or section.tasks
        if options.json_file is not None and not (corpora or dump):
            raise ValueError(
                f"--json {options.json_file} is for figures on text, and none are requested; tasks write to --out"
            )
        return cls(
            models=models,
            corpora=corpora,
            tasks=tasks,
            published={} if section is None else section.published,
            dump=dump,
            max_tokens=section.max_tokens if options.max_tokens is None and section is not None else options.max_tokens,
            files=files if options.json_file is None else [*files, options.json_file],
            task_folders=task_folders,
            log_samples=options.log_samples,
        )

    @property
    def metrics(self) -> dict[str, str]:
        """Return the metric to show for each task."""
        return {task: metric for group in self.tasks.values() for task, metric in group.metrics.items()}


def custom_corpus(source: str | None, field: str | None, limit: int | None) -> dict[str, CorpusConfig]:
    """Return the corpus of the command line, by name; empty if it names none.

    Args:
        field: None means `text`.
    Raises:
        ValueError: a field or a limit without a corpus.
    """
    if source is None:
        unused = [f"--{name} {value}" for name, value in (("field", field), ("limit", limit)) if value is not None]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: needs --corpus; for a recipe's text set eval.field and eval.limit "
                "(-o eval.limit=100)"
            )
        return {}
    name = Path(source).name
    # `dump` is the name of the figures on a dump.
    return {"text" if name in ("", "dump") else name: CorpusConfig(source=source, field=field or "text", limit=limit)}


_OPTIONS = {"limit": "task-limit"}  # keys of a group of tasks whose option has another name


def custom_tasks(names: str | None, options: Mapping[str, Any], start: str | None) -> dict[str, TasksConfig]:
    """Return the tasks of the command line as one group; empty if it names none.

    Args:
        names: comma-separated.
        options: keys of a group; None means the default.
    Raises:
        ValueError: an option is given without names.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if names is None:
        if given:
            options_given = ", ".join(f"--{_OPTIONS.get(key, key.replace('_', '-'))}" for key in given)
            raise ValueError(f"{options_given}: these need --tasks; a recipe has them in its groups of eval.tasks")
        return {}
    return {"tasks": TasksConfig(names=tuple(name.strip() for name in names.split(",")), start=start, **given)}


def models_of_recipe(recipe: Recipe) -> list[EvaluatedModel]:
    """Return the student's start, the trained student, and the teacher unless it is on a server.

    Raises ValueError if the student is not trained yet.
    """
    student, teacher = _student(recipe), recipe.teacher
    folder = Path(student.path)
    if not (folder / "export").exists():
        raise ValueError(f"{folder / 'export'} does not exist: run `bld student` first, or `bld export {folder}`")
    own = [("start", folder / "start"), ("student", folder / "export")]
    trust = student.trust_remote_code
    models = [
        EvaluatedModel(name, ModelSource(str(path), None, trust), student.start, student.end)
        for name, path in own
        if path.exists()
    ]
    if teacher.engine_spec.served:
        log.info(f"teacher: {teacher.name_at_server} is on a server and cannot be loaded here; it is not measured")
        return models
    return [*models, EvaluatedModel("teacher", teacher.source, teacher.start, teacher.end or None)]


def _student(recipe: Recipe) -> StudentConfig:
    if recipe.student is None:
        raise ValueError("the recipe has no student section; give a model instead: bld eval MODEL --recipe RECIPE")
    return recipe.student
