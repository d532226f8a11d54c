"""An engine that needs more GPUs than one machine has, placed by a real Ray cluster.

Its two machines claim to have two GPUs each.
"""

from ast import literal_eval
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import Recipe
from schemas.manifest import ShardPlan
from stage1_teacher.ray import pool as ray_workers
from tests.stage1_teacher.ray.test_pool import ENVIRONMENT
from tests.support.stand_in_engine import Failures, StandInEngine

MACHINE = {"num_cpus": 1, "num_gpus": 2, "object_store_memory": 100 << 20, "include_log_monitor": False}


@pytest.fixture
def ray() -> Iterator[Any]:
    """Start Ray on a cluster of two machines with a core and two GPUs each; the GPUs do not exist."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args=MACHINE | {"include_dashboard": False})
        try:
            cluster.add_node(**MACHINE)
            ray.init(address=cluster.address, logging_level="warning")
            yield ray
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_an_engine_over_two_machines_has_a_gpu_for_each_worker_and_frees_them_when_it_is_lost(
    ray: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_workers, "ClusterEngine", StandInEngine)
    monkeypatch.setattr(ray_workers, "ClusterTask", lambda *_: None)  # whose class each engine would import, with torch
    failures = ray.remote(num_cpus=0)(Failures).options(name="failures").remote()
    sections = {"corpus": {"source": "c"}, "teacher": {"model": "t"}, "dump": {"path": "d"}}
    recipe = Recipe.model_validate(sections | {"placement": {"pipeline_parallel": 3}})
    shards = [ShardPlan(index=i, first_document=i, num_documents=1, num_bytes=1, sha256="") for i in range(2)]
    job: Any = SimpleNamespace(recipe=recipe, folder="d", missing=lambda: shards, task=lambda _: None)
    made = ray_workers.ClusterEngines(ray, job).make(iter([(shard, []) for shard in shards]))
    assert sorted(one.committed for one in made if one.committed is not None) == [0, 1]
    said = capsys.readouterr().err
    assert "is lost (RuntimeError: a worker is gone); shard 0 is assigned again" in said
    ready = [line.partition("ready in ")[2].partition("; ")[0] for line in said.splitlines() if "ready in" in line]
    assert len(ready) == 2  # four GPUs: the second engine had room only once the first had left
    for place in ready:
        driver, *workers = literal_eval(place)
        assert driver == workers[0] and len(set(workers)) == 3
        assert len({machine for machine, _ in workers}) == 2
    ray.kill(failures)
