"""The rank of this process, from the environment of its launcher: DeepSpeed's, torchrun, srun, or none."""

import re
import socket
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 20_000, 20_000  # rendezvous under SLURM: the same port on all machines, derived from the job


def started_as_rank(environment: Mapping[str, str]) -> bool:
    """Tell whether torchrun or srun started this process as a rank, so that nothing is left to launch."""
    return "TORCHELASTIC_RUN_ID" in environment or _num_slurm_tasks(environment) > 1


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch.distributed and DeepSpeed need and `environment` does not set yet."""
    variables = {"MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in environment and _num_slurm_tasks(environment) > 1:
        variables |= _slurm_variables(environment)
    variables |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | variables
    variables["LOCAL_SIZE"] = environment.get("LOCAL_WORLD_SIZE", variables.get("LOCAL_SIZE", "1"))
    if "MASTER_PORT" not in environment and "MASTER_PORT" not in variables:
        variables["MASTER_PORT"] = str(free_port())
    return {name: value for name, value in variables.items() if name not in environment}


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _num_slurm_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of the srun step; 0 outside one, as in a batch script's own shell."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "0")) if "SLURM_PROCID" in environment else 0


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
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
    """Return the first host of a SLURM node list: gpu003 for `gpu[003-004,007],big1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
