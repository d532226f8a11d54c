"""Two ranks that wait for each other longer than a collective's timeout, and one that dies in mid-collective.

DeepSpeed takes seconds to start, so one pair of ranks does what most of the tests look at: it goes on with a run of one
rank.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.loading import save_recipe
from stage2_student.distributed.rank_environment import free_port
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
# A collective's time-out is 5 seconds, and what takes long 7: on rank 0, but for the counting. The second run has
# nothing to train.
TRAIN_TWICE = """
import os, shutil, sys, time
from datetime import timedelta

from pipeline.config.loading import load_recipe
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.runs import checkpoints
from stage2_student.training import train, usable

RANK = int(os.environ["RANK"])
init_distributed = ds.deepspeed.init_distributed
ds.deepspeed.init_distributed = lambda **told: init_distributed(**told | {"timeout": timedelta(seconds=5)})

def slow(holder, name, rank=0, after=""):
    function = getattr(holder, name)

    def slowly(*arguments, **options):
        if RANK == rank and name not in done and (not after or after in done):
            time.sleep(7)
            done.append(name)
        return function(*arguments, **options)

    setattr(holder, name, slowly)

slow(train, "export_start")
slow(usable, "keep_counts", rank=1)
slow(ds, "convert_to_universal")
slow(ds.torch, "save")  # what DeepSpeed writes its files of a checkpoint with
slow(checkpoints.os, "fsync", after="save")  # before the checkpoint gets its name
slow(train, "export")
recipe = load_recipe(sys.argv[1])
for _ in range(2):
    done = []
    train.train(recipe)
    print("slow:", *done, flush=True)
    if RANK == 0:
        shutil.move(f"{recipe.student.path}/export", f"{recipe.student.path}/export-{len(done)}")
"""
# Rank 1 dies in its second step.
DIE = """
import os, signal, sys
from stage2_student.training import loop
from stage2_student.training import train

take_step = loop.take_step

def last_step(engine, micro_batches, plan, *others):
    if os.environ["RANK"] == "1" and plan.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(engine, micro_batches, plan, *others)

loop.take_step = last_step
train.main(["--recipe", sys.argv[1]])
"""
ZERO_3 = {"deepspeed": {"zero_stage": 3}, "steps": 2, "save_every": 1, "objectives": {"ce": 1.0, "byte_ce": 0, "kl": 0}}


def recipe_of(work: Path, name: str, **train: Any) -> Path:
    save_recipe(make_recipe(work / "dump", work / "model", work / name, ZERO_3 | train), work / f"{name}.yaml")
    return work / f"{name}.yaml"


def start(work: Path, world: int, rank: int, port: int, *command: str) -> "subprocess.Popen[str]":
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment | {name: str(value) for name, value in told.items()},
        cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start_two(work: Path, *command: str) -> list["subprocess.Popen[str]"]:
    port = free_port()
    return [start(work, 2, rank, port, *command) for rank in range(2)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run with one rank and continue it with two slow ones after its first step.

    `said` is the output of each of them.
    """
    work = tmp_path_factory.mktemp("slow")
    tiny_model(work / "model")
    make_dump(work / "dump")
    run = work / "slow"
    train = ("-m", "stage2_student.training.train", "--recipe", str(recipe_of(work, "slow")))
    assert start(work, 1, 0, free_port(), *train).wait(600) == 0
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    ranks = start_two(work, "-c", TRAIN_TWICE, str(work / "slow.yaml"))
    for rank, process in enumerate(ranks):
        said, _ = process.communicate(timeout=600)
        (work / f"{rank}.said").write_text(f"{said}\nended with {process.returncode}\n")
    return work


def said_by(work: Path, rank: int) -> str:
    return (work / f"{rank}.said").read_text()


def test_the_job_outlives_a_start_a_conversion_and_a_disk_that_take_longer_than_a_collective(work: Path) -> None:
    assert "ended with 0" in said_by(work, 0), said_by(work, 0)
    assert "ended with 0" in said_by(work, 1), said_by(work, 1)
    assert "slow: export_start convert_to_universal save fsync export" in said_by(work, 0)
    assert "slow: keep_counts" in said_by(work, 1)
    assert "now there are 2 ranks; converting it" in said_by(work, 0)
    files = json.loads((work / "slow" / "checkpoints" / "step-000002" / "files.json").read_text())
    assert files["world"] == 2


def test_an_export_that_takes_longer_than_a_collective_is_there_at_the_end(work: Path) -> None:
    assert (work / "slow" / "export-5" / "model.safetensors").stat().st_size > 100_000


def test_with_nothing_left_to_train_it_is_there_as_well(work: Path) -> None:
    assert "nothing to train" in said_by(work, 0) and "slow: export_start export\n" in said_by(work, 0)
    assert (work / "slow" / "export-2" / "model.safetensors").stat().st_size > 100_000


def test_a_rank_that_is_killed_in_a_step_ends_the_other_in_words(work: Path) -> None:
    ranks = start_two(work, "-c", DIE, str(recipe_of(work, "dies")))
    (said, _), _ = (process.communicate(timeout=600) for process in ranks)
    assert ranks[0].returncode == 1 and ranks[1].returncode == -9
    assert f"rank 1 (process {ranks[1].pid} of " in said and "is gone without a word" in said
    assert "Traceback" not in said
    assert (work / "dies" / "checkpoints" / "latest").read_text() == "step-000001"
