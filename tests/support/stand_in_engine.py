"""An engine over several machines without weights, which reports its GPUs.

It takes them as vLLM's Ray executor does.

Ray starts a process for each of these classes, so this module imports little.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

Gpu = tuple[str, str]  # the machine, and its number there


class StandInEngine:
    """A stand-in for `ClusterEngine`. The first of a cluster fails at its first shard."""

    def open(self, task: Any) -> str:
        """Return the GPUs of this process and of each worker, as Python's repr of a list of `Gpu`."""
        from stage1_teacher.engines.base import DRIVER_SHARE

        group = get_current_placement_group()
        assert group is not None
        self._workers = []
        for bundle in range(group.bundle_count):
            there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            options = {"num_cpus": 0, "num_gpus": 1 - DRIVER_SHARE, "scheduling_strategy": there}
            self._workers.append(ray.remote(Worker).options(**options).remote())
        return repr([gpu(), *ray.get([worker.gpu.remote() for worker in self._workers])])

    def make(self, shard: Any, documents: Any) -> Iterator[SimpleNamespace]:
        if ray.get(ray.get_actor("failures").fail.remote()):
            raise RuntimeError("a worker is gone")
        counted = dict.fromkeys(("documents", "text_bytes", "tokens", "stored_bytes", "left_out"), 1)
        yield SimpleNamespace(**counted, committed=shard.index, audited=0, positions=1, dropped=0.0, tail=0.0)


class Worker:
    """A process of the engine, which holds a GPU."""

    def gpu(self) -> Gpu:
        return gpu()


class Failures:
    """An actor that picks who fails: the first to ask."""

    def __init__(self) -> None:
        self._asked = False

    def fail(self) -> bool:
        first, self._asked = not self._asked, True
        return first


def gpu() -> Gpu:
    """Return the GPU that this process may use."""
    context = ray.get_runtime_context()
    [number] = context.get_accelerator_ids()["GPU"]
    return context.get_node_id(), number
