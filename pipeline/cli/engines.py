"""Options of commands that run engines of stage 1: which shards, and on which machines."""

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stage1_teacher.coordination.shard_job import Connect

Worker = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Run as worker I of N, counted from 0: make every N-th shard, with one engine (default: all shards, "
        "with engines on all GPUs of this machine).",
    ),
]
OnRay = Annotated[
    bool, typer.Option("--ray", help="Make the shards with engines on a Ray cluster (default: on this machine).")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Cluster for --ray (default: that of RAY_ADDRESS, or one on this machine, or one started for this "
        "command).",
    ),
]


def engines_elsewhere(worker: str | None, ray: bool, address: str | None) -> "Connect | None":
    """Return what connects to engines on a cluster or in processes of this machine; None for one in this process.

    Raises ValueError for an address without --ray.
    """
    if address is not None and not ray:
        raise ValueError(f"--address {address} is for a Ray cluster; give --ray too")
    if ray:
        from stage1_teacher.ray.pool import cluster_engines

        return partial(cluster_engines, address)
    if worker is None and not is_slurm_task(os.environ):
        from stage1_teacher.processes.local_engines import machine_engines

        return machine_engines
    return None


def is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Return whether SLURM started several tasks, of which this process is one: each has its own engine."""
    return any(int(environment.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"))


def parse_worker(text: str | None) -> tuple[int, int]:
    """Parse `I/N` as numbers; None is the only worker. Raises ValueError unless 0 <= I < N."""
    index, slash, count = (text or "0/1").partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--worker {text}: give I/N with 0 <= I < N, e.g. 0/4")
    return int(index), int(count)
