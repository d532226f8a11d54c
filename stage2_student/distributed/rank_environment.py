"""Which rank this process is, told by whatever started it: DeepSpeed's launcher, torchrun, srun, or nothing."""

import re
import socket
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 20_000, 20_000  # of rendezvous under SLURM: the same on all machines, another for each job


def started_as_rank(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or srun has started this process as one rank of several, so that there is nothing left to
    launch.
    """
    return "TORCHELASTIC_RUN_ID" in environment or _num_slurm_tasks(environment) > 1


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed and DeepSpeed ask the environment for, as far as it is not there already."""
    wanted = {"MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in environment and _num_slurm_tasks(environment) > 1:
        wanted |= _of_slurm(environment)
    wanted |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | wanted
    wanted["LOCAL_SIZE"] = environment.get("LOCAL_WORLD_SIZE", wanted.get("LOCAL_SIZE", "1"))
    if "MASTER_PORT" not in environment and "MASTER_PORT" not in wanted:
        wanted["MASTER_PORT"] = str(free_port())
    return {name: value for name, value in wanted.items() if name not in environment}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _num_slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step that srun started; 0 outside of one, as in a batch script's own shell."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "0")) if "SLURM_PROCID" in environment else 0


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _NUM_PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_SIZE": environment["SLURM_STEP_TASKS_PER_NODE"].split(",")[0].split("(")[0],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(port),
    }


def first_host(nodes: str) -> str:
    """Of a list as SLURM writes it: `gpu[003-004,007],big1` begins with gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
