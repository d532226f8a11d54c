"""The demo recipe, cut to seconds, through the command line.

Real weights, vLLM, DeepSpeed, two students from one dump.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.manifest import Manifest
from schemas.shard import read_shard

CUT = [
    *("corpus.limit=4", "dump.shard_bytes=1500B", "teacher.max_tokens=256", "teacher.overlap_tokens=64"),
    *("train.steps=2", "train.batch_tokens=256", "train.micro_batch_tokens=256", "train.save_every=1"),
    *("eval.limit=2", "eval.out_of_domain.limit=1"),
]


KEYS = dict.fromkeys(
    ("BLD_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"), "geheim-4711"
)


def bld(folder: Path, *arguments: str) -> str:
    """Run one command; return its output."""
    environment = {**os.environ, **KEYS, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "geheim" not in done.stdout + done.stderr
    return done.stdout


def overrides(*more: str) -> list[str]:
    return [part for value in (*CUT, *more) for part in ("-o", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the demo, dump and student; return its folder."""
    folder = tmp_path_factory.mktemp("eine übung")
    bld(folder, "teacher", "demo", *overrides())
    bld(folder, "student", "demo", *overrides())
    return folder


def test_the_dump_holds_every_document_and_no_fault(folder: Path) -> None:
    dump = folder / "runs/demo/dump"
    assert "no faults" in bld(folder, "verify", str(dump))
    records = [record for shard in Manifest.load(dump).shards for record in read_shard(shard.path(dump))]
    assert len(records) == 4
    assert json.loads((dump / "summary.json").read_text(encoding="utf-8"))["documents"] == 4


def test_inspect_shows_a_document_as_it_was_read(folder: Path) -> None:
    dump = folder / "runs/demo/dump"
    record = next(iter(read_shard(Manifest.load(dump).shards[0].path(dump))))
    shown = bld(folder, "inspect", str(dump), "--doc", record.doc_id)
    assert "\x1b[" not in shown and len(shown.splitlines()) > record.num_positions
    assert json.loads(bld(folder, "inspect", str(dump), "--json"))


def test_the_export_evaluates_and_reports(folder: Path) -> None:
    bld(folder, "eval", "demo", *overrides())
    figures = json.loads((folder / "runs/demo/student/eval.json").read_text(encoding="utf-8"))
    assert set(figures) == {"start", "student", "teacher"}
    for name in figures:
        assert 0.5 < figures[name]["held_out"]["bits_per_byte"] < 3
    bld(folder, "report", "demo", *overrides())
    page = (folder / "runs/demo/student/report.html").read_text(encoding="utf-8")
    assert "data:image" in page or "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


def test_no_key_of_the_environment_is_in_anything_that_a_dump_and_a_run_leave(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b"geheim" in path.read_bytes()]


def test_a_second_student_with_another_tokenizer_trains_from_the_same_dump(folder: Path) -> None:
    means = "student.transfer={input: mean, output: mean}"  # quicker
    bld(folder, "student", "demo_mistral", *overrides("train.steps=1", means))
    assert (folder / "runs/demo_mistral/student/export/model.safetensors").exists()
