"""Several ranks, and runs continued in another world.

ZeRO, offload, float16, checkpointing, signals, damage, losses that are not numbers.

DeepSpeed takes seconds to start, so one process of one rank and one torchrun of two ranks do what all the tests look
at.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import Recipe
from pipeline.config.loading import save_recipe
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
NOT_THE_SAME = {"tokens_per_second", "data_wait_share", "memory_bytes", "seconds"}
# Each argument is a recipe. What it raises is written down beside the run, by rank.
TRAIN_EACH = """
import os, signal, sys
from pathlib import Path

import torch.distributed as dist

from pipeline.config.loading import load_recipe
from stage2_student.launch import launch
from stage2_student.training import loop
from stage2_student.training import loss_scale
from stage2_student.training import train
from stage2_student.model.student import Student
from stage2_student.training.stop_signals import Stopped

RANK = int(os.environ.get("RANK", 0))
# The call of `bld student`: under torchrun it launches nothing, and trains here.
run = launch.launch_student if "TORCHELASTIC_RUN_ID" in os.environ else train.run_rank
forward, take_step = Student.forward, loop.take_step

def bad_forward(self, *arguments):
    nats, sums = forward(self, *arguments)
    return (nats * float("nan") if RANK == 1 else nats), sums

def signalled_step(engine, micro_batches, plan, *others):
    if RANK == 1 and plan.step == 2:  # one rank alone is told
        os.kill(os.getpid(), signal.SIGINT)
    return take_step(engine, micro_batches, plan, *others)

for path in map(Path, sys.argv[1:]):
    recipe = load_recipe(path)
    loss_scale.INITIAL = 2.0**30  # so high that float16 overflows, some times in the same step
    Student.forward = bad_forward if path.stem == "nan" else forward
    loop.take_step = signalled_step if path.stem == "signalled" else take_step
    try:
        said = str(run(recipe))
    except FloatingPointError as error:
        said = str(error)
    (path.parent / f"{path.stem}.{RANK}.said").write_text(said)
    if path.stem == "signalled":
        newest = sorted((Path(recipe.student.path) / "checkpoints").glob("step-*"))[-1]
        if RANK == 0:  # one bit of a file that the other rank reads
            victim = sorted(newest.glob("*.pt"))[1]
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        dist.barrier()
        loop.take_step = take_step
        said = str(run(recipe))
"""
STOPPED = {"save_every": 1, "num_processes": 2, "deepspeed": {"zero_stage": 2}}
ONE_RANK: dict[str, dict[str, Any]] = {
    "whole": {},
    "stopped": STOPPED | {"num_processes": 1},  # begun by two ranks of the launcher
    "checkpointed": {"gradient_checkpointing": True, "deepspeed": {"zero_stage": 3}},
    "half": {"dtype": "float16", "steps": 3},
    "half-2": {"dtype": "float16", "steps": 3, "deepspeed": {"zero_stage": 2}},
    "half-3": {"dtype": "float16", "steps": 3, "deepspeed": {"zero_stage": 3}},
    "offload-1": {"deepspeed": {"zero_stage": 1, "offload_optimizer": "cpu"}},
    "offload-3": {"deepspeed": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    "marginal-1": {"steps": 3},
}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "two-0": {},
    "offload-1": ONE_RANK["offload-1"],  # begun by one rank, without its last four steps
    "checkpointed": ONE_RANK["checkpointed"],
    "marginal-2": {"steps": 3, "deepspeed": {"zero_stage": 3}},
    "signalled": {"save_every": 1, "keep_last": 0, "deepspeed": {"zero_stage": 1}},
    "nan": {"deepspeed": {"zero_stage": 3}},
}


def write_recipe(work: Path, name: str, train: dict[str, Any]) -> Recipe:
    """Every objective, the interface with most modules, three groups of parameters, and a step of warm-up."""
    interface = "token_marginal" if name.startswith("marginal") else "causal"
    values = {"interface_lr": 3.0, "embedding_lr": 2.0, "interface_warmup_steps": 1} if interface == "causal" else {}
    model = (work / "model").resolve()
    # Some positions are left out, so that ranks differ in what they count.
    masks = {"max_token_end": 0.05, "max_dropped": 0.05}
    recipe = make_recipe(work / "dump", model, work / name, values | train, interface=interface, **masks)
    save_recipe(recipe, work / f"{name}.yaml")
    return recipe


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def await_step(process: "subprocess.Popen[bytes]", log: Path, said_before: int = 0) -> None:
    """Wait until the log, after its first bytes, has a step's line."""
    deadline = time.monotonic() + 600
    while b"/6 " not in log.read_bytes()[said_before:]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def forget(run: Path, *steps: int) -> None:
    """Leave a run as it was before these checkpoints."""
    shutil.rmtree(run / "export")
    for step in steps:
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make runs with one rank, one of them continued after two ranks were stopped.

    These were killed together with their launcher, then stopped by SIGTERM.
    """
    work = tmp_path_factory.mktemp("scale")
    tiny_model(work / "model")
    make_dump(work / "dump")
    (work / "each.py").write_text(TRAIN_EACH)
    write_recipe(work, "stopped", STOPPED)
    command = [sys.executable, "-m", "pipeline", "student", str(work / "stopped.yaml")]
    with (work / "stopped.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(), cwd=work, stdout=log, stderr=subprocess.STDOUT)
        await_step(process, work / "stopped.log")
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        gone, left = psutil.wait_procs(started, timeout=60)
        (work / "killed.said").write_text(f"{len(gone)} gone, {len(left)} left")
        said = (work / "stopped.log").stat().st_size
        process = subprocess.Popen(command, env=environment(), cwd=work, stdout=log, stderr=subprocess.STDOUT)
        await_step(process, work / "stopped.log", said)
        process.send_signal(signal.SIGTERM)
        (work / "stopped.code").write_text(str(process.wait(600)))
    shutil.copytree(work / "stopped" / "checkpoints", work / "stopped-checkpoints")
    for name, train in ONE_RANK.items():
        write_recipe(work, name, train)
    command = [sys.executable, "each.py", *(f"{name}.yaml" for name in ONE_RANK)]
    with (work / "log").open("wb") as log:
        subprocess.run(command, env=environment(), cwd=work, check=True, stdout=log, stderr=subprocess.STDOUT)
    return work


@pytest.fixture(scope="module")
def two(work: Path) -> Path:
    """Return the folder of runs that two ranks of one torchrun made or continued."""
    two = work / "two"
    two.mkdir()
    for name in ("model", "dump", "each.py"):
        (two / name).symlink_to(work / name)
    for name in ("offload-1", "checkpointed"):
        shutil.copytree(work / name, two / name)
        forget(two / name, 4, 6)
    for name, train in TWO_RANKS.items():
        write_recipe(two, name, train)
    with (two / "log").open("wb") as log:
        subprocess.run(
            [*(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "each.py")]
            + [f"{name}.yaml" for name in TWO_RANKS],
            env=environment(), cwd=two, check=True, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return two


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_THE_SAME} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def assert_same_training(run: Path, other: Path, rel: float = 1e-5) -> None:
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        assert ours == pytest.approx(theirs, rel=rel)
    exported, expected = weights(run), weights(other)
    assert exported.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(exported[name], expected[name], rtol=1e-3, atol=1e-4)


def test_the_ranks_end_with_the_command_that_is_killed_and_the_same_command_trains_on(work: Path) -> None:
    gone, left = (int(words.split()[0]) for words in (work / "killed.said").read_text().split(", "))
    assert gone >= 4 and left == 0  # launcher, two ranks, and who ended them
    log = (work / "stopped.log").read_text()
    assert "is gone; ended 3 processes that it had started" in log and "another process is training" not in log


def test_sigterm_stops_all_ranks_after_the_same_step_and_saves_it(work: Path) -> None:
    assert (work / "stopped.code").read_text() == "143"
    log = (work / "stopped.log").read_text()
    saved = sorted(path.name for path in (work / "stopped-checkpoints").glob("step-*"))
    assert f"SIGTERM: stopped after step {int(saved[-1].removeprefix('step-'))}" in log
    assert "interrupted; what is written stays. Run the same command again to resume" in log
    assert json.loads((work / "stopped-checkpoints" / saved[-1] / "files.json").read_text())["world"] == 2
    assert int(saved[-1].removeprefix("step-")) < 6


def test_one_rank_goes_on_where_two_ranks_of_zero_2_were_stopped(work: Path) -> None:
    assert_same_training(work / "stopped", work / "whole")
    assert json.loads((work / "stopped" / "summary.json").read_text())["documents"] == documents(work / "whole")


def documents(run: Path) -> int:
    return int(json.loads((run / "summary.json").read_text())["documents"])


@pytest.mark.parametrize("name", ["checkpointed", "offload-1", "offload-3"])
def test_gradient_checkpointing_and_offload_change_no_loss(work: Path, name: str) -> None:
    assert_same_training(work / name, work / "whole")


@pytest.mark.parametrize("name", ["half", "half-2", "half-3"])
def test_float16_that_overflows_takes_the_batch_again_and_skips_no_step(work: Path, name: str) -> None:
    ours, theirs = metrics(work / name), metrics(work / "whole")
    assert [line["step"] for line in ours] == [1, 2, 3]
    assert all(1 < line["loss_scale"] < 2**30 for line in ours)
    log = (work / "log").read_text()
    assert (
        f"step 1: the gradient overflows float16 at loss scale {2.0**30:g}; the same batch again at {2.0**29:g}" in log
    )
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=5e-3)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=2e-2)
    assert ours[2]["loss"] == pytest.approx(theirs[2]["loss"], rel=5e-3)
    assert weights(work / name)["model.embed_tokens.weight"].dtype == torch.float16


def test_two_ranks_of_torchrun_train_what_one_does(two: Path, work: Path) -> None:
    assert_same_training(two / "two-0", work / "whole")


@pytest.mark.parametrize("name", ["offload-1", "checkpointed"])
def test_two_ranks_go_on_where_one_rank_of_zero_1_or_3_left_off(two: Path, work: Path, name: str) -> None:
    assert "step-000002: written by a world of 1, now there are 2 ranks; converting it" in (two / "log").read_text()
    assert_same_training(two / name, work / "whole")
    assert not list((two / name / "checkpoints").glob("*universal*"))


def test_token_marginal_trains_on_two_ranks_of_zero_3_what_it_does_on_one(two: Path, work: Path) -> None:
    one = metrics(work / "marginal-1")
    for ours, theirs in zip(metrics(two / "marginal-2"), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert one[-1]["kl"] < one[0]["kl"] and 0 < one[0]["uncounted_share"] < 1


def test_a_signal_to_one_rank_stops_both_after_the_step_under_way(two: Path) -> None:
    assert [(two / f"signalled.{rank}.said").read_text() for rank in (0, 1)] == ["130", "130"]
    assert "SIGINT: stopped after step 2" in (two / "log").read_text()


def test_a_damaged_newest_checkpoint_is_named_and_kept_and_the_one_before_it_loaded(two: Path, work: Path) -> None:
    log = (two / "log").read_text()
    assert "step-000002 cannot be loaded (" in log and "kept as step-000002.damaged, going back to step-000001" in log
    assert "resuming after step 1," in log
    assert {path.name for path in (two / "signalled" / "checkpoints").glob("step-00000[26]*")} == {
        "step-000002", "step-000002.damaged", "step-000006"
    }  # fmt: skip
    assert_same_training(two / "signalled", work / "whole")


def test_a_bad_loss_on_one_rank_stops_both_before_the_optimizer_and_names_its_documents(two: Path) -> None:
    said = [(two / f"nan.{rank}.said").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("step 1: the loss is not finite on documents d")
    assert not list((two / "nan" / "checkpoints").glob("step-*"))
