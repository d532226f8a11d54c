"""The worked examples of the page, run to the letter on a tiny model, without vLLM and DeepSpeed."""

import os
import re
import subprocess
import sys
import zipfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.sources.pypi import cache_folder, fetch
from stage2_student.library import DistillationCollator, DumpStream, byte_distillation_loss
from tests.support.small_dumps import make_dump

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "stage2_student/README.md"
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```\n", PAGE.read_text(encoding="utf-8"), re.DOTALL))
BLOCKED = """import runpy, sys
sys.modules.update(vllm=None, deepspeed=None)  # an import of either fails
for name in sys.argv[1:]:
    runpy.run_path(name, run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    make_dump(folder / "runs/mine/dump")
    (folder / "runs/mine/start").symlink_to(model)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, packages: Path, *names: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKED, *names]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_an_example_of_each_kind_and_the_plain_one_has_at_most_forty_lines() -> None:
    assert list(FILES) == ["plain.py", "trainer.py", "sft.py"]
    assert len(FILES["plain.py"].splitlines()) <= 40


def first_loss(folder: Path, num_records: int) -> float:
    """Compute the loss of the stream's first records per byte, in this process."""
    start = folder / "runs/mine/start"
    collator = DistillationCollator(AutoTokenizer.from_pretrained(start))
    batch = collator(list(islice(DumpStream(folder / "runs/mine/dump"), num_records)))
    logits_BLV = AutoModelForCausalLM.from_pretrained(start)(input_ids=batch["input_ids"]).logits
    return byte_distillation_loss(logits_BLV, batch).per_byte.item()


def test_the_plain_example_goes_on_where_it_was_interrupted_and_the_trainers_take_the_same_steps(
    folder: Path, tmp_path: Path
) -> None:
    plain = FILES["plain.py"]
    (folder / "two.py").write_text(plain.replace("steps, batch_size, saved = 4,", "steps, batch_size, saved = 2,"))
    (folder / "four.py").write_text(plain.replace("state.pt", "straight.pt"))
    fetch("pypi:trl==1.16.0/trl/__init__.py")  # not installed: it is unpacked for this test alone
    [wheel] = (cache_folder() / "archives").glob("*/trl-1.16.0-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    out = run(folder, tmp_path, "two.py", "plain.py", "four.py", "trainer.py", "sft.py")
    steps = [line.split()[:2] for line in out.splitlines() if "nats a byte" in line]
    assert steps[:4] == steps[4:] and [number for number, _ in steps[:4]] == ["1", "2", "3", "4"]
    assert float(steps[0][1]) == pytest.approx(first_loss(folder, 8), abs=1e-4)
    assert torch.load(folder / "state.pt")["after"] == (1, 8)  # 4 steps of 8 records, of 24 an epoch
    assert (folder / "distilled/model.safetensors").exists()
    losses = [float(found) for found in re.findall(r"'loss': '?([0-9.]+)", out)]
    # The trainer's is a mean of two micro-batches of 4, each divided by its own bytes.
    assert len(losses) == 6 and losses[0] == pytest.approx(first_loss(folder, 8), rel=0.02)
    assert losses[4] == pytest.approx(first_loss(folder, 4), abs=1e-3)  # TRL's
