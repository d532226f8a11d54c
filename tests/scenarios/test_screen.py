"""The screen: our lines alone for each command, and one bar on a terminal.

Also if the folder has packages named as ours.
"""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = """
corpus: {source: text.jsonl, field: text, limit: 6}
teacher: {model: teacher, engine: vllm, max_tokens: 128, overlap_tokens: 16}
dump: {path: dump, shard_bytes: 200B}
student: {model: student, path: run}
train: {steps: 2, batch_tokens: 64, micro_batch_tokens: 64, save_every: 1}
eval: {source: text.jsonl, field: text, limit: 2}
"""
START = [sys.executable, "-P", "-c", "from pipeline.cli import main; main()"]  # as `bld` does
OTHERS = ("BLD_", "TQDM_", "HF_HUB_", "VLLM_", "TORCH_CPP_")  # what would say for this test what other packages may say
OURS = re.compile(r"\d\d:\d\d:\d\d bld \w+: .*")
BAR = re.compile(r"(starting|step|\d+/\d+ documents, .*) [━╸╺ ]+ .*")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of a terminal: colours, and where the cursor goes


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


def environment() -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    return known | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "400"}


def said_in_a_log(folder: Path, *command: str) -> list[str]:
    """Return the lines of stderr, which is a pipe."""
    done = subprocess.run(
        [*START, *command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def said_on_a_terminal(folder: Path, *command: str) -> list[str]:
    """Return lines that stand, or stood, on the terminal that stderr is."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*START, *command], cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    late = threading.Timer(400, process.kill)
    late.start()
    said = b""
    with suppress(OSError):  # the last process that had it has ended
        while part := os.read(ours, 1 << 16):
            said += part
    os.close(ours)
    late.cancel()
    text = said.decode()
    assert process.wait() == 0, text
    return [line for line in re.split(r"[\r\n]+", CONTROL.sub("", text)) if line.strip()]


def test_each_command_says_our_lines_alone_and_none_imports_what_the_folder_holds(folder: Path) -> None:
    terminals = {"teacher": said_on_a_terminal(folder, "teacher", "my.yaml")}
    terminals["student"] = said_on_a_terminal(folder, "student", "my.yaml")
    with ThreadPoolExecutor(1) as beside:
        exported = beside.submit(said_in_a_log, folder, "export", "run", "--out", "out")
        terminals["eval"] = said_on_a_terminal(folder, "eval", "my.yaml")
        foreign = {"export": [line for line in exported.result() if not OURS.fullmatch(line)]}
    bars = {}
    for name, lines in terminals.items():
        others = [line.rstrip() for line in lines if not OURS.fullmatch(line)]
        bars[name] = [line for line in others if BAR.fullmatch(line)]
        foreign[name] = [line for line in others if not BAR.fullmatch(line)]
    assert not any(foreign.values()), foreign
    assert [name for name, drawn in bars.items() if drawn] == ["teacher", "student"]
