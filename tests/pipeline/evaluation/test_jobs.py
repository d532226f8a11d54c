"""What `bld eval` measures: what the command line names, else what the recipe's eval section does."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import evaluation as scoring
from pipeline.config import CorpusConfig, EvalConfig, Recipe, TasksConfig
from pipeline.config.evaluated import EvaluatedModel
from pipeline.evaluation.jobs import Wanted, custom_corpus, custom_tasks, jobs_of_recipe, wanted
from pipeline.runtime.model_source import ModelSource

PIQA = {"chat": {"names": ["piqa"], "apply_chat_template": True, "metrics": {"piqa": "acc"}}}
PUBLISHED = {"BLD": {"piqa": 75.68}}


def recipe(**values: Any) -> Recipe:
    sections = {"corpus": {"source": "a.txt"}, "teacher": {"model": "some/model"}, "dump": {"path": "dump"}}
    return Recipe.model_validate(sections | values)


def test_a_recipe_names_text_tasks_and_what_others_have_published() -> None:
    section = {"source": "b.txt", "limit": 3, "tasks": PIQA, "published": PUBLISHED}
    found = wanted(recipe(eval=section), {}, {}, None)
    assert found.corpora == {"held_out": CorpusConfig(source="b.txt", limit=3)}
    assert found.tasks["chat"].names == ("piqa",) and found.tasks["chat"].apply_chat_template
    assert found.metrics == {"piqa": "acc"} and found.published == PUBLISHED


def test_the_command_line_stands_in_for_the_recipes_own() -> None:
    text, tasks = custom_corpus("c.txt", "text", 2), custom_tasks("boolq, mmlu", {"limit": 5, "seed": None}, "<s>")
    found = wanted(recipe(eval={"source": "b.txt", "tasks": PIQA}), text, tasks, None)
    assert found.corpora == {"c.txt": CorpusConfig(source="c.txt", limit=2)}
    assert found.tasks == {"tasks": TasksConfig(names=("boolq", "mmlu"), limit=5, start="<s>")}


def test_tasks_or_a_dump_need_no_text_but_something_has_to_be_asked() -> None:
    tasks = custom_tasks("boolq", {}, None)
    assert wanted(None, {}, tasks, None) == Wanted({}, tasks, {})
    assert wanted(recipe(), {}, {}, "dump") == Wanted({}, {}, {})
    for nothing in (None, recipe()):
        with pytest.raises(ValueError, match="no text to evaluate on"):
            wanted(nothing, {}, {}, None)


def test_a_groups_name_is_a_files_name() -> None:
    with pytest.raises(ValueError, match="should match pattern"):
        EvalConfig.model_validate({"source": "b.txt", "tasks": {"../up": {"names": ["piqa"]}}})


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "find_spec", lambda _: None)
    found = wanted(None, {}, custom_tasks("piqa", {}, None), None)
    with pytest.raises(ValueError, match=r"byte-level-distillation\[eval\]"):
        scoring._run_tasks([EvaluatedModel("m", ModelSource("some/model"))], found, {"m": Path("out")}, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": "demo", "limit": 3}, "--limit 3: this belongs to --corpus"),
        ({"target": "some/model", "dump": "dump", "field": "body"}, "--field body: this belongs to --corpus"),
        ({"target": "demo", "start": "<s>"}, "--start and --end belong to a MODEL"),
        ({"target": "demo", "end": "</s>"}, "--start and --end belong to a MODEL"),
        (
            {"target": "some/model", "corpus": "a.txt", "override": ["eval.limit=3"]},
            "eval.limit=3 replaces a value of a recipe",
        ),
    ],
)
def test_an_option_that_would_be_without_effect_is_refused(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.jobs.jobs_of_recipe", lambda _: [])
    monkeypatch.setattr(scoring, "_run_text", lambda *_: None)
    monkeypatch.setattr(scoring, "_run_tasks", lambda *_: None)
    with pytest.raises(ValueError, match=said):
        scoring.evaluate(**given)


def test_text_of_a_folder_named_dump_does_not_take_the_place_of_the_figures_on_a_dump() -> None:
    assert list(custom_corpus("texts/dump", None, None)) == list(custom_corpus(".", None, None)) == ["text"]


def test_all_tokens_that_mean_end_to_the_teacher_mean_it_in_its_evaluation(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    student = {"path": str(tmp_path), "model": "other/model", "end": "</s>"}
    found = jobs_of_recipe(recipe(student=student, teacher={"model": "some/model", "end": ["<a>", "<b>"]}))
    assert [(job.name, job.end) for job in found] == [("student", "</s>"), ("teacher", ("<a>", "<b>"))]
    assert jobs_of_recipe(recipe(student=student))[-1].end is None
