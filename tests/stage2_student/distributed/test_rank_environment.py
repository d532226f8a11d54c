"""The environment of a rank, as srun, torchrun or our launcher starts it."""

import re
import shlex
from pathlib import Path

import pytest

from stage2_student.distributed.rank_environment import first_host, rank_environment, started_as_rank

ROOT = Path(__file__).parents[3]
SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "123456",
}  # fmt: skip


def test_a_rank_of_srun_finds_the_others_by_what_slurm_says() -> None:
    assert started_as_rank(SLURM)
    assert rank_environment(SLURM) == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4",
        "MASTER_ADDR": "gpu003", "MASTER_PORT": "23456",
    }  # fmt: skip
    assert (
        rank_environment(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
        .keys()
        .isdisjoint({"MASTER_ADDR", "MASTER_PORT"})
    )
    alone = SLURM | {"SLURM_STEP_NUM_TASKS": "1"}
    assert not started_as_rank(alone) and rank_environment(alone)["WORLD_SIZE"] == "1"
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert not started_as_rank(batch_script) and rank_environment(batch_script)["RANK"] == "0"


def test_a_rank_of_torchrun_keeps_what_torchrun_says() -> None:
    told = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert started_as_rank(told | {"TORCHELASTIC_RUN_ID": "none"})
    assert rank_environment(told) == {"LOCAL_SIZE": "2"}
    assert not started_as_rank({})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("gpu[003-004,007],big1", "gpu003"), ("a-1,b-2", "a-1"), ("rack[1-2]n[10-12]", "rack1n10")],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_command_for_slurm_ends_the_step_when_a_rank_ends() -> None:
    """Every srun command of the documentation that starts ranks does."""
    pages = [ROOT / "README.md", ROOT / "stage2_student" / "README.md"]
    commands = [
        line for page in pages for line in page.read_text().splitlines() if re.match(r"srun .*bld student", line)
    ]
    assert commands
    for command in commands:
        options = shlex.split(command, comments=True)
        assert "--kill-on-bad-exit=1" in options[: options.index("bld")] and "--ntasks-per-node=8" in options
