"""Training runs of one rank: killed, resumed, without a teacher. More ranks are in `test_scale`."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import DumpConfig, Recipe
from pipeline.config.loading import save_recipe
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.model.initial_student import export_start
from stage2_student.runs import folder
from stage2_student.runs.identity import run_identity
from stage2_student.training.building.student import build_student
from tests.support.object_store import SECRET, object_store
from tests.support.scoring import score
from tests.support.small_dumps import make_dump, make_recipe, recipe_in
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[3]
TIMES = {"tokens_per_second", "data_wait_share", "memory_bytes", "seconds"}
NO_TEACHER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "stage1_teacher"):
            raise ImportError(name + " must not be imported by the student")

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, a dump, and an undisturbed run (`whole`)."""
    work = tmp_path_factory.mktemp("die läufe")  # a space and no ASCII: as names are
    tiny_model(work / "model")
    make_dump(work / "dump")
    (work / "sitecustomize.py").write_text(NO_TEACHER)
    assert start(work, "whole").wait(600) == 0
    return work


def recipe(work: Path, name: str, dump: str = "dump", **train: Any) -> Recipe:
    """Return a recipe with every objective and the interface with most modules.

    It has learning rates for the interface and the embedding, and a warm-up step.
    """
    values = {"interface_lr": 3.0, "embedding_lr": 2.0, "interface_warmup_steps": 1} | train
    found = make_recipe(work / "dump", work / "model", work / name, values, interface="causal")
    return found.with_values(dump=DumpConfig(path=dump if "://" in dump else str(work / dump)))


def student_environment(work: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{work}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def start(work: Path, name: str, **train: Any) -> "subprocess.Popen[bytes]":
    """Run one rank in a process that cannot import vllm or the teacher's stage.

    The teacher's model is not there either.
    """
    save_recipe(recipe(work, name, **train), work / f"{name}.yaml")
    command = [sys.executable, "-m", "stage2_student.training.train", "--recipe", str(work / f"{name}.yaml")]
    return subprocess.Popen(command, env=student_environment(work), cwd=work)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_run_trains_and_exports_a_plain_model(work: Path) -> None:
    run = work / "whole"
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] and all(math.isfinite(v) for line in lines for v in line.values())
    assert math.isclose(lines[0]["bits_per_byte"], lines[0]["ce"] / math.log(2))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 6 and summary["left_out"] == {}
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    started = AutoModelForCausalLM.from_pretrained(run / "start")
    assert AutoTokenizer.from_pretrained(run / "export")("the")["input_ids"]
    assert not torch.equal(exported.model.embed_tokens.weight, started.model.embed_tokens.weight)
    assert not [name for name in load_file(run / "export" / "model.safetensors") if "interface" in name]
    tokenizer = ByteTokenizer.load(str(run / "export"))
    text = [b"the river and the stone", b"a thing in 7 hills."]
    before, after = (score(m.eval(), tokenizer, text, 268)["bits_per_byte"] for m in (started, exported))
    assert after < before


def test_these_runs_could_not_import_the_teacher(work: Path) -> None:
    command = [sys.executable, "-c", "import stage1_teacher"]
    assert b"must not be imported" in subprocess.run(command, env=student_environment(work), capture_output=True).stderr


def test_a_run_killed_and_restarted_ends_with_the_same_bits(work: Path) -> None:
    run = work / "killed"
    process = start(work, "killed")
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "export").exists()
    (run / "checkpoints" / "step-000099.partial").mkdir()  # as a kill in the middle of a checkpoint leaves it
    # Neither batches made ahead and lost, nor the dump's location, may matter.
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for variable, value in store.environment.items():
            patch.setenv(variable, value)
        assert start(work, "killed", dump=store.put(work / "dump", "dump"), prefetch=0).wait(600) == 0
    written = [path for path in run.rglob("*") if path.is_file()]
    assert written and not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert metrics(run) == metrics(work / "whole")
    ours, theirs = (load_file(work / name / "export" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list((run / "checkpoints").glob("*.partial"))


def identity(work: Path, sha256: str = "s", dump: str = "dump", **train: Any) -> dict[str, Any]:
    wanted = recipe(work, "whole", **train)
    return run_identity(wanted, Manifest.load(work / dump), sha256, SpecialIds(1, (1,)))


def test_resume_refuses_another_recipe_tokenizer_or_dump_by_name(work: Path, tmp_path: Path) -> None:
    make_dump(work / "other", teacher="another")
    folder.claim(tmp_path, identity(work))
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    folder.claim(
        tmp_path, identity(work, save_every=5, micro_batch_tokens=7, prefetch=0, packing="on")
    )  # placement may change
    for changed, field in [
        (identity(work, lr=0.5), "train.lr: 0.001 there, 0.5 here"),
        (identity(work, sha256="t"), "student.tokenizer_sha256: 's' there, 't' here"),
        (identity(work, dump="other"), "dump.teacher.model: 't' there, 'another' here"),
    ]:
        with pytest.raises(ValueError, match=field):
            folder.claim(tmp_path, changed)


def test_a_second_process_in_the_same_run_is_refused(tmp_path: Path) -> None:
    with folder.lock(tmp_path), pytest.raises(ValueError, match="another process is training"):
        folder.lock(tmp_path)
    folder.lock(tmp_path).close()


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_with_gradient_checkpointing_a_block_is_computed_again_in_the_backward_pass(
    tmp_path: Path, checkpointing: bool, passes: int
) -> None:
    tokenizer = ByteTokenizer.load(str(tiny_model(tmp_path / "model")))
    wanted = recipe_in(tmp_path, gradient_checkpointing=checkpointing, objectives={"ce": 1.0, "byte_ce": 0, "kl": 0})
    export_start(wanted)
    student = build_student(wanted, tokenizer, SpecialIds(268, (268,)))
    calls = []
    # Before, not after: what is computed again ends inside the block, once nothing more is needed of it.
    student.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens_BL = torch.tensor([[268, 5, 6, 7]])
    student.lm(input_ids=tokens_BL).logits.sum().backward()
    assert len(calls) == passes
