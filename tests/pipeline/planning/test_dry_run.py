"""Lines of `bld plan`."""

from pathlib import Path

import pytest

from pipeline.config import Recipe
from pipeline.planning.dry_run import plan
from tests.support.tiny import tiny_model


def test_one_step_process_and_checkpoint_are_told_in_the_singular(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text('{"text": "the"}\n')
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    recipe = Recipe.model_validate(
        {
            "corpus": {"source": "text.jsonl"},
            "teacher": {"model": "model", "engine": "transformers"},
            "dump": {"path": "dump"},
            "student": {"model": "model", "path": "run"},
            "train": {"steps": 1, "eval_every": 1, "eval_documents": 1},
            "eval": {"source": "text.jsonl", "tasks": {"group": {"names": ["piqa"], "limit": 1, "num_fewshot": 1}}},
        }
    )
    lines = dict(plan(recipe))
    assert lines["train"].startswith("1 step of 16384 tokens")
    assert lines["train.deepspeed"] == "ZeRO stage 0, 1 process"
    assert lines["train.eval_every"].startswith("every 1 step on 1 document of eval")
    assert lines["eval.tasks.group"] == "piqa; 1 example before each question, 1 question per task"
    assert lines["student.path"] == "run, 1 checkpoint; training resumes"
    two = recipe.train.model_copy(update={"num_processes": 2})
    assert dict(plan(recipe.with_values(train=two)))["train.deepspeed"] == "ZeRO stage 0, 2 processes"


@pytest.mark.parametrize(
    ("engine", "threshold", "said"),
    [
        ("vllm", 0.05, "branch rows above 0.05 of the mass: some 1.3 times"),
        ("transformers", 0.05, "branch rows above 0.05 of the mass: some 1.3 times"),
        ("vllm", 0.2, "branch rows above 0.2 of the mass: some 1.2 times"),
        ("vllm", 0.001, "branch rows above 0.001 of the mass: more than some 1.7 times"),
    ],
)
def test_the_cost_of_branches_is_told_before_it_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, threshold: float, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text('{"text": "the"}\n')
    values = {
        "corpus": {"source": "text.jsonl"},
        "teacher": {"model": "model", "engine": engine},
        "dump": {"path": "dump", "covering": {"beam_width": 4, "branch_threshold": threshold}},
    }
    assert dict(plan(Recipe.model_validate(values)))["dump.covering"].startswith(said)
    values["dump"] = {"path": "dump"}
    assert "dump.covering" not in dict(plan(Recipe.model_validate(values)))
