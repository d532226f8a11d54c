"""The cost of making a shard, stored beside it: wall seconds of the process that made it, and its devices."""

import time
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

from pipeline.config import Recipe
from pipeline.runtime.devices import computes_on_gpu, gpu_name, num_cores
from pipeline.runtime.format import count_of
from schemas import dump_files
from schemas.manifest import Manifest, ShardPlan, read_json, write_json
from schemas.storage.atomic import make_folder
from schemas.storage.locations import AnyLocation, Location
from stage1_teacher.coordination.thread_map import thread_map


class Cost(NamedTuple):
    """Seconds since the same process's previous shard, or for its first shard since the engine was ready."""

    seconds: float
    devices: str


def devices(recipe: Recipe) -> str:
    """Return the devices of one process, as in `2 x NVIDIA H100 80GB HBM3`, `4 CPU cores` or `a server`."""
    if recipe.teacher.engine_spec.needs_address:
        return "a server"
    if not computes_on_gpu():
        return count_of(num_cores(), "CPU core")
    return f"{recipe.placement.num_workers} x {gpu_name()}"


def num_devices(recipe: Recipe) -> int:
    """Count them: GPUs of a process on GPUs, else 1 (a machine)."""
    return recipe.placement.num_workers if computes_on_gpu() else 1


class Stopwatch:
    """A stopwatch of wall seconds, restarted by each reading."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        since, self._since = self._since, time.monotonic()
        return self._since - since


def write_cost(dump: Location, shard: ShardPlan, seconds: float, on: str) -> None:
    """Write a shard's cost before the shard is committed; beside it, so that a shard made again is the same file."""
    path = _path(dump, shard)
    make_folder(path.parent)
    write_json(path, {"seconds": round(seconds, 3), "devices": on})


def read_cost(dump: Location, shard: ShardPlan) -> Cost | None:
    """Read a shard's cost; None if it is unknown (a merged or pulled dump has only the total)."""
    path = _path(dump, shard)
    if not path.exists():
        return None
    values = read_json(path, "seconds", "devices", remedy="Delete it: the cost of the whole dump is then unknown")
    return Cost(values["seconds"], values["devices"])


def total_cost(dump: Location, manifest: Manifest) -> dict[str, Any] | None:
    """Return the cost of all shards; None if that of any shard is unknown."""
    costs = thread_map(partial(read_cost, dump), manifest.shards)
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    milliseconds = Counter[str]()
    for cost in known:
        milliseconds[cost.devices] += round(cost.seconds * 1000)
    return {
        "seconds": sum(milliseconds.values()) / 1000,
        "by_devices": {name: number / 1000 for name, number in sorted(milliseconds.items())},
    }


def _path(dump: AnyLocation, shard: ShardPlan) -> AnyLocation:
    name = f"{dump_files.part_name(shard.index)}.json"
    return dump / dump_files.COSTS / (f"{shard.folder}/{name}" if shard.folder else name)
