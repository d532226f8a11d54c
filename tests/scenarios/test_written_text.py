"""Sequence-level distillation by one recipe: the teacher writes, its text is dumped, a student learns it and writes."""

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.loading import load_recipe
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.generation.run import run_generate
from stage2_student.launch.launch import launch_student
from tests.stage1_teacher.generation.test_run import rows_of, texts, write_recipe
from tests.support.ascii_models import ascii_model
from tests.support.tiny import END_OF_TEXT, tiny_tokenizer

PROMPTS = [f"the thing {i} and é" for i in range(12)]


def test_a_student_learns_the_text_that_its_teacher_wrote_and_writes_itself(tmp_path: Path) -> None:
    teacher = ascii_model(tmp_path / "teacher", tiny_tokenizer(), END_OF_TEXT)
    path = write_recipe(tmp_path, teacher, texts(PROMPTS), completions=2)
    values = yaml.safe_load(path.read_text())
    student = ascii_model(tmp_path / "student", tiny_tokenizer(["t h"]), END_OF_TEXT, seed=1)
    values["student"] = {"model": str(student), "path": str(tmp_path / "run")}
    values["train"] = {
        "steps": 2, "batch_tokens": 200, "micro_batch_tokens": 200, "dtype": "float32", "num_processes": 1,
        "objectives": {"ce": 1.0, "byte_ce": 0.0, "kl": 1.0, "alm": 0.0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(path)
    run_generate(recipe)
    run_teacher(recipe)
    assert launch_student(recipe, False) == 0

    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "loss" in line]
    assert len(steps) == 2
    written = sum(sum(row["segment_lengths"]) for row in rows_of(tmp_path / "text"))
    assert 0 < json.loads((tmp_path / "dump" / "summary.json").read_text())["bytes"] == written
    assert steps[-1]["epoch"] == 0
    assert 0 < steps[-1]["supervised_bytes"] <= written

    shown = CliRunner().invoke(app, ["eval", str(path), "--generate", "-o", "generate.completions=1"])
    assert shown.exit_code == 0, shown.exception
    for name in ("start", "student", "teacher"):
        assert name in shown.stdout
        counted = json.loads((tmp_path / "run" / "written" / name / "summary.json").read_text())
        assert sum(number for _, number in counted["segmentation"].values()) > 12

    out, longer = tmp_path / "code", ["-o", "generate.max_prompt_tokens=490", "-o", "generate.max_new_tokens=8"]
    arguments = ["eval", str(teacher), "--recipe", str(path), "--generate", "--python", "3", "--out", str(out), *longer]
    shown = CliRunner().invoke(app, [*arguments, "--start", END_OF_TEXT, "--end", END_OF_TEXT])
    assert shown.exit_code == 0, shown.exception
    [summary_path] = out.glob("python-*-3/teacher/summary.json")
    assert json.loads(summary_path.read_text())["prompts"] == 3

    own = load_recipe(
        path, ["generate.writer=student", f"generate.path={tmp_path / 'own'}", "generate.unfinished=keep"]
    )
    run_generate(own)
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert summary["completions"] == 24
    assert summary["kept"] + sum(c["number"] for c in summary["left_out_completions"].values()) == 24
    identity = json.loads((tmp_path / "own" / "corpus.json").read_text())["identity"]
    assert identity["writer"]["model"] == "student"
    assert (
        identity["writer"]["weights_sha256"]
        != json.loads((tmp_path / "text" / "corpus.json").read_text())["identity"]["writer"]["weights_sha256"]
    )
