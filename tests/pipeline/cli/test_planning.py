"""`bld plan` and `bld teacher --dry-run` show what would be done, with an existing dump as it was begun."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.runtime.dtypes import natural_dtype
from schemas.manifest import Manifest

OTHER = {"bfloat16": "float32", "float32": "bfloat16"}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text(json.dumps({"text": "a thing"}), encoding="utf-8")
    Path("my.yaml").write_text(
        "corpus: {source: text.jsonl, field: text}\nteacher: {model: some/model}\ndump: {path: dump}\n",
        encoding="utf-8",
    )
    return "my.yaml"


def teacher_line(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 0, done.output
    return next(line for line in done.stdout.splitlines() if line.startswith("teacher "))


@pytest.mark.parametrize("command", [("plan",), ("teacher", "--dry-run")])
def test_a_plan_shows_the_dtype_that_the_dump_in_the_folder_was_begun_in(recipe: str, command: tuple[str, ...]) -> None:
    here = natural_dtype()
    assert f", {here}, " in teacher_line(*command, recipe)
    identity = {"teacher": {"dtype": OTHER[here]}}
    Path("dump").mkdir()
    Manifest(identity=identity, corpus_counts={}, shards=()).save(Path("dump"))
    assert f", {OTHER[here]}, " in teacher_line(*command, recipe)
    assert f", {here}, " in teacher_line(*command, recipe, "-o", f"teacher.dtype={here}")


def test_a_plan_asks_nothing_of_a_store(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage1_teacher.dump.begun.location", lambda _: pytest.fail("the store was asked"))
    assert natural_dtype() in teacher_line("plan", recipe, "-o", "dump.path=s3://bucket/dump")


@pytest.mark.parametrize("command", [("plan",), ("teacher", "--dry-run")])
def test_a_plan_says_that_a_run_of_an_early_release_leaves_long_records_out(
    recipe: str, command: tuple[str, ...]
) -> None:
    Path("my.yaml").write_text(Path("my.yaml").read_text() + "student: {model: some/other, path: run}\n")

    def told() -> str:
        done = CliRunner().invoke(app, [*command, recipe])
        assert done.exit_code == 0, done.output
        return next(line for line in done.stdout.splitlines() if line.startswith("train.max_tokens "))

    assert "are cut into pieces" in told()
    Path("run/checkpoints/step-000002").mkdir(parents=True)
    Path("run/identity.json").write_text(json.dumps({"data_order": 2, "train": {}, "student": {}}))
    assert "are left out, as when this run was begun" in told() and "cut" not in told()
