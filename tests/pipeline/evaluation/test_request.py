"""Requests of `bld eval`: models, texts and files from the command line, else from the recipe's eval section."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import evaluation
from pipeline.config import CorpusConfig, EvalConfig, Recipe, TasksConfig
from pipeline.config.evaluated import EvaluatedModel
from pipeline.evaluation.request import (
    EvaluationOptions,
    EvaluationRequest,
    custom_corpus,
    custom_tasks,
    models_of_recipe,
)
from pipeline.evaluation.results import result_path
from pipeline.runtime.model_source import ModelSource

PIQA = {"chat": {"names": ["piqa"], "apply_chat_template": True, "metrics": {"piqa": "acc"}}}
PUBLISHED = {"BLD": {"piqa": 75.68}}


def recipe(**values: Any) -> Recipe:
    sections = {"corpus": {"source": "a.txt"}, "teacher": {"model": "some/model"}, "dump": {"path": "dump"}}
    return Recipe.model_validate(sections | values)


MODEL = EvaluatedModel("m", ModelSource("some/model"))


def test_a_recipe_names_text_tasks_and_what_others_have_published() -> None:
    section = {"source": "b.txt", "limit": 3, "tasks": PIQA, "published": PUBLISHED}
    found = EvaluationRequest.of_model(MODEL, recipe(eval=section), EvaluationOptions())
    assert found.corpora == {"held_out": CorpusConfig(source="b.txt", limit=3)}
    assert found.tasks["chat"].names == ("piqa",) and found.tasks["chat"].apply_chat_template
    assert found.metrics == {"piqa": "acc"} and found.published == PUBLISHED


def test_the_command_line_stands_in_for_the_recipes_own() -> None:
    text, tasks = custom_corpus("c.txt", "text", 2), custom_tasks("boolq, mmlu", {"limit": 5, "seed": None}, "<s>")
    asked = EvaluationOptions(text, tasks, max_tokens=64)
    found = EvaluationRequest.of_model(MODEL, recipe(eval={"source": "b.txt", "tasks": PIQA, "max_tokens": 32}), asked)
    assert found.corpora == {"c.txt": CorpusConfig(source="c.txt", limit=2)}
    assert found.tasks == {"tasks": TasksConfig(names=("boolq", "mmlu"), limit=5, start="<s>")}
    assert found.max_tokens == 64


def test_tasks_or_a_dump_need_no_text_but_something_has_to_be_asked() -> None:
    tasks = custom_tasks("boolq", {}, None)
    found = EvaluationRequest.of_model(MODEL, None, EvaluationOptions(tasks=tasks))
    assert (found.corpora, found.tasks, found.dump, found.published) == ({}, tasks, None, {})
    found = EvaluationRequest.of_model(MODEL, recipe(), EvaluationOptions(dump="dump"))
    assert (found.corpora, found.tasks, found.dump, found.published) == ({}, {}, "dump", {})
    for nothing in (None, recipe()):
        with pytest.raises(ValueError, match="no text to evaluate on"):
            EvaluationRequest.of_model(MODEL, nothing, EvaluationOptions())


def test_a_models_figures_are_written_only_where_the_command_line_says(tmp_path: Path) -> None:
    known = recipe(eval={"source": "b.txt", "max_tokens": 32})
    found = EvaluationRequest.of_model(MODEL, known, EvaluationOptions())
    assert (found.models, found.files, found.task_folders, found.max_tokens) == ([MODEL], [], {}, 32)
    asked = EvaluationOptions(json_file=tmp_path / "m.json", tasks_folder=tmp_path / "tasks", log_samples=True)
    found = EvaluationRequest.of_model(MODEL, known, asked)
    assert (found.files, found.task_folders) == ([tmp_path / "m.json"], {"m": tmp_path / "tasks"})
    assert found.log_samples


def test_a_recipes_figures_are_kept_in_its_run_and_those_of_another_text_beside_them(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    own = recipe(student={"path": str(tmp_path), "model": "other/model"}, eval={"source": "b.txt"})
    found = EvaluationRequest.of_recipe(own, EvaluationOptions(json_file=tmp_path / "m.json"))
    assert found.files == [tmp_path / "eval.json", tmp_path / "m.json"]
    assert found.task_folders == {name: tmp_path / "tasks" / name for name in ("student", "teacher")}
    text = custom_corpus("c.txt", None, None)
    found = EvaluationRequest.of_recipe(own, EvaluationOptions(text, tasks_folder=Path("elsewhere")))
    assert found.files == [result_path(tmp_path, text)] and found.files[0].name.startswith("eval-c.txt-")
    assert found.task_folders["teacher"] == Path("elsewhere/teacher")


def test_a_file_for_figures_on_text_is_refused_where_there_are_none() -> None:
    asked = EvaluationOptions(tasks=custom_tasks("boolq", {}, None), json_file=Path("m.json"))
    with pytest.raises(ValueError, match=r"--json m\.json is for figures on text"):
        EvaluationRequest.of_model(MODEL, None, asked)


def test_a_groups_name_is_a_files_name() -> None:
    with pytest.raises(ValueError, match="should match pattern"):
        EvalConfig.model_validate({"source": "b.txt", "tasks": {"../up": {"names": ["piqa"]}}})


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    asked = EvaluationOptions(tasks=custom_tasks("piqa", {}, None), tasks_folder=Path("out"))
    with pytest.raises(ValueError, match=r"byte-level-distillation\[eval\]"):
        evaluation._run_tasks(EvaluationRequest.of_model(MODEL, None, asked))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": "demo", "limit": 3}, "--limit 3: needs --corpus"),
        ({"target": "some/model", "dump": "dump", "field": "body"}, "--field body: needs --corpus"),
        ({"target": "demo", "start": "<s>"}, "--start and --end are for a MODEL"),
        ({"target": "demo", "end": "</s>"}, "--start and --end are for a MODEL"),
        (
            {"target": "some/model", "corpus": "a.txt", "override": ["eval.limit=3"]},
            "eval.limit=3 replaces a value of a recipe",
        ),
    ],
)
def test_an_option_that_would_be_without_effect_is_refused(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.request.models_of_recipe", lambda _: [])
    monkeypatch.setattr(evaluation, "_run_text", lambda *_: None)
    monkeypatch.setattr(evaluation, "_run_tasks", lambda *_: None)
    with pytest.raises(ValueError, match=said):
        evaluation.evaluate(**given)


def test_text_of_a_folder_named_dump_does_not_take_the_place_of_the_figures_on_a_dump() -> None:
    assert list(custom_corpus("texts/dump", None, None)) == list(custom_corpus(".", None, None)) == ["text"]


def test_all_tokens_that_mean_end_to_the_teacher_mean_it_in_its_evaluation(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    student = {"path": str(tmp_path), "model": "other/model", "end": "</s>"}
    found = models_of_recipe(recipe(student=student, teacher={"model": "some/model", "end": ["<a>", "<b>"]}))
    assert [(job.name, job.end) for job in found] == [("student", "</s>"), ("teacher", ("<a>", "<b>"))]
    assert models_of_recipe(recipe(student=student))[-1].end is None
