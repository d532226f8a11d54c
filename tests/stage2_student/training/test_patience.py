"""When a run ends early, and what its recipe must say for that."""

from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.config.loading import parse_recipe
from stage2_student.runs.retention import Evaluation
from stage2_student.training.patience import Progress, is_exhausted
from stage2_student.training.state import State

YAML = """
corpus: {source: c}
teacher: {model: m}
dump: {path: d}
student: {model: m, path: p}
eval: {source: e.jsonl, skip: 10, limit: 20}
train: {%s}
"""


def recipe(train: str) -> Recipe:
    return parse_recipe(YAML % train, "r")


@pytest.mark.parametrize(
    ("figures", "ends"),
    [([3.0, 2.0, 2.0, 2.5], 4), ([3.0, 3.1, 2.9, 3.0, 2.8, 2.81, 2.9], 7), ([3.0, 2.0, 1.0], None), ([1.0], None)],
)
def test_a_run_ends_after_as_many_evaluations_without_a_new_lowest(figures: list[float], ends: int | None) -> None:
    state, ended = State(), None
    for number, figure in enumerate(figures, 1):
        state = State.from_dict(state.after_evaluation(Evaluation(figure, "a")).as_dict())  # as a resume reads it
        if is_exhausted(state.progress, 2) and ended is None:
            ended = number
    assert ended == ends and not is_exhausted(state.progress, 0)


def test_another_text_begins_anew_and_a_checkpoint_of_an_earlier_release_has_no_progress() -> None:
    before = Progress(1.0, "a", 5)
    assert Progress.after(before, Evaluation(2.0, "b")) == Progress(2.0, "b", 0)
    values = State(step=3).as_dict()
    del values["progress"]
    assert State.from_dict(values).progress is None and not is_exhausted(None, 1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("patience: 2", "there is no train.eval_every"),
        ("patience: 2, eval_every: 5", "there is no train.validation: early stopping chooses a checkpoint by text of"),
        ("eval_every: 5, validation: {source: e.jsonl}", "that `bld eval` reports as held_out"),
        ("eval_every: 5, validation: {source: e.jsonl, skip: 29}", "that `bld eval` reports as held_out"),
        ("ema: 0.9, deepspeed: {zero_stage: 3}", "train.ema needs whole weights on each rank"),
        ("samples: {prompts: [a]}, deepspeed: {zero_stage: 3}", "train.samples needs whole weights"),
        ("ema: 1.0", "less than 1"),
    ],
)
def test_what_cannot_be_is_refused(train: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(train)


@pytest.mark.parametrize(
    "validation", ["{source: v.jsonl}", "{source: e.jsonl, limit: 10}", "{source: e.jsonl, skip: 30}"]
)
def test_validation_is_another_text_or_other_documents_of_the_same(validation: str) -> None:
    made: Any = recipe(f"patience: 2, eval_every: 5, validation: {validation}").train
    assert made.patience == 2 and made.validation is not None
