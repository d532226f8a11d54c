"""What a newcomer sees: our lines alone, of each command, also where the folder has packages named as ours."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = """
corpus: {source: text.jsonl, field: text, limit: 6}
teacher: {model: teacher, engine: transformers, max_tokens: 128, overlap_tokens: 16}
dump: {path: dump, shard_bytes: 200B}
student: {model: student, path: run}
train: {steps: 2, batch_tokens: 64, micro_batch_tokens: 64, save_every: 1}
eval: {source: text.jsonl, field: text, limit: 2}
"""
OURS = re.compile(r"\d\d:\d\d:\d\d bld \w+: .*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    tiny_model(folder / "teacher")
    tiny_model(folder / "student", seed=1, merges=["t h", "a n"])
    lines = (json.dumps({"text": f"the cat and the dog number {i} are in the garden and sing"}) for i in range(6))
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "my.yaml").write_text(RECIPE, encoding="utf-8")
    for name in ("pipeline", "schemas"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('the operator has a package of that name')\n")
    return folder


def test_each_command_says_our_lines_alone_and_none_imports_what_the_folder_holds(folder: Path) -> None:
    known = {
        name: value for name, value in os.environ.items() if not name.startswith(("BLD_", "TQDM_", "HF_HUB_", "VLLM_"))
    }
    environment = known | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-P", "-c", "from pipeline.cli import main; main()"]  # as `bld` does
    foreign: dict[str, list[str]] = {}
    for command in (
        ("teacher", "my.yaml"),
        ("student", "my.yaml"),
        ("export", "run", "--out", "out"),
        ("eval", "my.yaml"),
    ):
        done = subprocess.run(
            [*start, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr
        foreign[command[0]] = [line for line in done.stderr.splitlines() if not OURS.fullmatch(line)]
    assert not any(foreign.values()), foreign
