"""What a shard took to make, told with the shard: wall seconds of the process that made it, and on what."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.config import Recipe

SECONDS_KEY, DEVICES_KEY = "bld.seconds", "bld.devices"


def devices(recipe: Recipe) -> str:
    """What one process computes on, as in `2 x NVIDIA H100 80GB HBM3`, `4 CPU cores` or `a server`."""
    if recipe.teacher.engine == "openai":
        return "a server"
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{cores} CPU core{'' if cores == 1 else 's'}"
    return f"{recipe.placement.num_workers} x {torch.cuda.get_device_name()}"


def num_devices(recipe: Recipe) -> int:
    """How many of them: GPUs of a process on GPUs, else 1, a machine."""
    return recipe.placement.num_workers if torch.cuda.is_available() else 1


class Stopwatch:
    """Wall seconds since it was made, or since it was last read."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        since, self._since = self._since, time.monotonic()
        return self._since - since


def total_cost(shards: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What `summary.json` says of cost, from the shards' metadata; nothing where a shard does not tell, being older than this."""
    if not all(SECONDS_KEY in shard for shard in shards):
        return {}
    seconds = Counter[str]()
    for shard in shards:
        seconds[shard[DEVICES_KEY]] += round(float(shard[SECONDS_KEY]) * 1000)
    return {
        "seconds": sum(seconds.values()) / 1000,
        "seconds_by_devices": {name: milli / 1000 for name, milli in sorted(seconds.items())},
    }
