"""An engine over several machines without weights: it takes its GPUs as vLLM's Ray executor does, and says which."""

from collections.abc import Iterator
from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from schemas.manifest import ShardPlan
from stage1_teacher.engine_room import HEAD_SHARE
from stage1_teacher.make_shards import Made
from stage1_teacher.restart import EngineError

Gpu = tuple[str, str]  # the machine, and its number there


class StandInEngine:
    """In place of `ClusterEngine`. The first of a cluster fails at its first shard."""

    def open(self, task: Any) -> str:
        """Where this process and each worker run, as Python's repr of a list of `Gpu`."""
        assert task.over_machines
        group = get_current_placement_group()
        assert group is not None and len(placement_group_table(group)["bundles"]) == group.bundle_count
        workers = [
            ray.remote(Worker)
            .options(
                num_cpus=0,
                num_gpus=1 - HEAD_SHARE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            )
            .remote()
            for bundle in range(group.bundle_count)
        ]
        self._workers = workers
        return repr([gpu(), *ray.get([worker.gpu.remote() for worker in workers])])

    def make(self, shard: ShardPlan, documents: Any) -> Iterator[Made]:
        if ray.get(ray.get_actor("failures").fail.remote()):
            raise EngineError("a worker is gone")
        yield Made(1, 1, 1, committed=shard.index)


class Worker:
    """A process of the engine, which holds a GPU."""

    def gpu(self) -> Gpu:
        return gpu()


class Failures:
    """Who is to fail: the first who asks."""

    def __init__(self) -> None:
        self._asked = False

    def fail(self) -> bool:
        first, self._asked = not self._asked, True
        return first


def gpu() -> Gpu:
    """The one that this process may use."""
    context = ray.get_runtime_context()
    [number] = context.get_accelerator_ids()["GPU"]
    return context.get_node_id(), number
