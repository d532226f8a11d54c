"""A request of `bld eval`: which models are measured on which text and tasks, and where the figures are written."""

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
    """What a command line asks for, of whichever models.

    Attributes:
        corpora: the `custom_corpus`; empty: the recipe's own text.
        tasks: the `custom_tasks`; empty: the recipe's own.
        dump: folder or address of a dump that the byte divergence is measured to.
        max_tokens: of a window; None: the recipe's, else what `window_size` chooses.
        json_file: where the figures on text are written too.
        tasks_folder: where the harness' JSON is written; None: of a recipe in its run, of a model nowhere.
        log_samples: that JSON holds every answer.
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
    """What is measured of which models, and where it is written.

    Attributes:
        models: by their order in the tables.
        corpora, tasks: of each model, by name; one of them may be empty.
        published: figures of others, by name and task, shown beside those of tasks.
        dump, max_tokens, log_samples: as in `EvaluationOptions`.
        files: each is written with all figures on text.
        task_folders: where a model's answers to tasks are written, by its name; a model that is not in it has none.
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
        """Ask about a recipe's start, student and teacher; the figures are kept in its run.

        Raises ValueError before the student is trained, and where nothing is asked for.
        """
        models, run = models_of_recipe(recipe), Path(_student(recipe).path)
        tasks_folder = options.tasks_folder or run / "tasks"
        folders = {model.name: tasks_folder / model.name for model in models}
        return cls._made(models, recipe, options, [result_path(run, options.corpora)], folders)

    @classmethod
    def of_model(cls, model: EvaluatedModel, recipe: Recipe | None, options: EvaluationOptions) -> "EvaluationRequest":
        """Ask about one model, on a recipe's text and tasks where the options name none.

        Raises ValueError where nothing is asked for.
        """
        folders = {} if options.tasks_folder is None else {model.name: options.tasks_folder}
        return cls._made([model], recipe, options, [], folders)

    @classmethod
    def _made(
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
                f"--json {options.json_file} takes figures on text, and none is asked for; tasks write to --out FOLDER"
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
        """Return which figure stands for a task."""
        return {task: metric for group in self.tasks.values() for task, metric in group.metrics.items()}


def custom_corpus(source: str | None, field: str | None, limit: int | None) -> dict[str, CorpusConfig]:
    """Return the corpus of the command line, by name; empty where it names none.

    Args:
        field: None is `text`.
    Raises:
        ValueError: a field or a limit of no corpus.
    """
    if source is None:
        of_none = [f"--{name} {value}" for name, value in (("field", field), ("limit", limit)) if value is not None]
        if of_none:
            raise ValueError(
                f"{', '.join(of_none)}: this belongs to --corpus; of a recipe's text it is eval.field and eval.limit "
                "(-o eval.limit=100)"
            )
        return {}
    name = Path(source).name
    # The figures on a dump are called `dump`.
    return {"text" if name in ("", "dump") else name: CorpusConfig(source=source, field=field or "text", limit=limit)}


def custom_tasks(names: str | None, options: Mapping[str, Any], start: str | None) -> dict[str, TasksConfig]:
    """Return the tasks of the command line as one group; empty where it names none.

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


def models_of_recipe(recipe: Recipe) -> list[EvaluatedModel]:
    """Return the student's start, the trained student and the teacher, unless a server has it.

    Raises ValueError before the student is trained.
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
