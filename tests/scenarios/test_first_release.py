"""What the first release made and began goes on under this one: its files, and what it would have computed itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.config.loading import load_recipe
from pipeline.reports.page import write_report
from schemas.manifest import Manifest
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.verification.verify import verify_dump
from stage2_student.launch.launch import launch_student
from stage2_student.runs.export import export
from tests.support.first_release import KEPT, NUM_FIRST, TEXTS, write_texts

LOSSES = ("loss", "ce", "kl", "lr", "grad_norm")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy what the release left into the current folder."""
    folder = Path(shutil.copytree(KEPT, tmp_path / "kept"))
    monkeypatch.chdir(folder)
    return folder


def bld_teacher() -> Manifest:
    """Go on with the dump; another transformers than the one it was begun with is accepted, as an operator would."""
    begun = Manifest.load(Path("dump")).identity["teacher"]["engine"]
    accepted = None if begun == f"transformers-{transformers.__version__}" else begun
    run_teacher(load_recipe("recipe.yaml"), accept_engine=accepted)
    return Manifest.load(Path("dump"))


def steps_of(path: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_its_files_are_small() -> None:
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) < 200_000


def test_its_dump_is_read_resumed_and_extended(folder: Path) -> None:
    dump = folder / "dump"
    before = Manifest.load(dump)
    shards = {path.name: path.read_bytes() for path in (dump / "shards").iterdir()}
    assert verify_dump(dump) == [] and verify_dump(dump, against_teacher=NUM_FIRST) == []
    lost = before.shards[-1].path(dump)
    stored = list(read_shard(lost))
    for path in (lost, dump / "summary.json", dump / "audit.json"):  # as a kill leaves it
        path.unlink()
    assert bld_teacher() == before
    for again, first in zip(read_shard(lost), stored, strict=True):
        assert (again.doc_id, again.document) == (first.doc_id, first.document)
        assert again.teacher_token_lengths.tolist() == first.teacher_token_lengths.tolist()
    assert verify_dump(dump, against_teacher=NUM_FIRST) == []
    write_texts(folder, len(TEXTS))
    grown = bld_teacher()
    assert len(grown.shards) > len(before.shards)
    assert {k: v for k, v in grown.identity.items() if k != "corpus"} == {
        k: v for k, v in before.identity.items() if k != "corpus"
    }
    kept = {plan.path(dump).name: plan.path(dump).read_bytes() for plan in before.shards[:-1]}
    assert kept == {name: shards[name] for name in kept}
    assert verify_dump(dump, against_teacher=len(TEXTS)) == []
    documents = [record.document.decode() for plan in grown.shards for record in read_shard(plan.path(dump))]
    assert documents == TEXTS


def test_its_run_ends_as_it_would_have_and_is_trained_on_with_the_extended_dump(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    metrics, expected = run / "metrics.jsonl", steps_of(KEPT / "run/metrics.jsonl")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    started = load_file(run / "start/model.safetensors")
    assert launch_student(load_recipe("recipe.yaml")) == 0
    found = steps_of(metrics)
    assert list(found) == [1, 2, 3, 4]
    for step in (3, 4):  # the same text, weights, moments and rate
        assert found[step]["supervised_bytes"] == expected[step]["supervised_bytes"]
        for key in LOSSES:
            assert found[step][key] == pytest.approx(expected[step][key], rel=1e-3), (step, key)
    assert all((load_file(run / "start/model.safetensors")[name] == value).all() for name, value in started.items())
    identity = json.loads((run / "identity.json").read_text())
    kept = json.loads((KEPT / "run/identity.json").read_text())
    assert {key: identity[key] for key in kept} == kept
    write_texts(folder, len(TEXTS))
    bld_teacher()
    assert launch_student(load_recipe("recipe.yaml", ["train.steps=6"])) == 1
    assert "train.change=[dump]" in capfd.readouterr().err
    assert launch_student(load_recipe("recipe.yaml", ["train.steps=6", "train.change=[dump]"])) == 0
    assert list(steps_of(metrics)) == [1, 2, 3, 4, 5, 6]
    export(run, folder / "model")
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size
    write_report([run], folder / "report.html")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["steps"] == 6
