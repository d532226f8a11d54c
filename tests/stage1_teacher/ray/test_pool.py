"""A dump on a real Ray cluster of this machine, into an object store, through the loss of one engine and the hanging of another."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config.loading import load_recipe
from schemas.manifest import Manifest
from schemas.storage.locations import location, names
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.dump.shard_writer import Made
from stage1_teacher.ray.pool import ClusterEngines, cluster_engines
from stage1_teacher.ray.shard_queue import ShardQueue
from stage1_teacher.verification.verify import verify_dump
from tests.scenarios.test_store_dump import stored
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.support.object_store import object_store
from tests.support.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = """
import sys, ray
for attempts_left in (2, 1, 0):  # Ray gives a node 30 seconds to start, however busy the machine is
    try:
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _node_ip_address="127.0.0.1")
        break
    except Exception:
        ray.shutdown()
        if not attempts_left:
            raise
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()  # until the test is over, or gone
"""
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),  # of the engines: this checkout, wherever they start
    "RAY_AUTH_MODE": "disabled",  # a token would be written into the home folder
    "RAY_worker_niceness": "0",  # 15 by default: a machine that does anything else would hardly import torch
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster with room for two engines; what they need of the environment is there before it starts."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in (store.environment | ENVIRONMENT).items():
            patch.setenv(name, value)
        with subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                address = process.stdout.readline().strip()
                assert address, "the cluster did not start; what it says is above"
                yield address
            finally:
                process.stdin.close()


class Trouble:
    """Holds the first engine back until there are two; after three shards stops both, and kills one of them."""

    def __init__(self) -> None:
        self.stage = self.committed = 0
        self.killed = self.hanging = 0

    def strike(self, engines: ClusterEngines) -> None:
        pids = [int(place.split()[1]) for place in engines._places.values()]
        if self.stage == 0 and len(pids) == 2:
            self._signal(pids, signal.SIGCONT)
        elif self.stage == 0 and pids:
            os.kill(pids[0], signal.SIGSTOP)
        if self.stage == 1 and self.committed >= 3:
            self._signal(pids, signal.SIGSTOP)
        elif self.stage == 2 and len(engines._working) == 2:  # both are given work, which neither can finish
            self.killed, self.hanging = pids
            self._signal([self.killed], signal.SIGKILL)

    def _signal(self, pids: list[int], number: signal.Signals) -> None:
        self.stage += 1
        for pid in pids:
            os.kill(pid, number)


def test_a_dump_on_two_engines_survives_that_one_is_killed_and_the_other_hangs(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "model")
    one = dump(write_recipe(tmp_path / "one", model, TEXTS[:24]))
    recipe = load_recipe(write_recipe(tmp_path / "ray", model, TEXTS[:24], path="s3://bucket/ray"))
    trouble, collect = Trouble(), ClusterEngines._collect

    def troubled(engines: ClusterEngines, queue: ShardQueue) -> Iterator[Made]:
        trouble.strike(engines)
        for made in collect(engines, queue):
            trouble.committed += made.committed is not None
            yield made

    monkeypatch.setattr(ClusterEngines, "_collect", troubled)
    placement = recipe.placement.model_copy(update={"engine_cpus": 1})
    try:
        run_teacher(recipe.with_values(placement=placement), connect=lambda: cluster_engines(cluster))
    finally:
        if psutil.pid_exists(trouble.hanging):
            os.kill(trouble.hanging, signal.SIGKILL)
    said, folder = capsys.readouterr().err, location("s3://bucket/ray")
    assert said.count("an engine is ready") == 3 and said.count("is assigned again") == 1
    assert f"the engine in process {trouble.killed} of" in said and "; complete" not in said and ": complete" in said
    assert stored(folder) == content(one) and verify_dump(folder) == []
    assert Manifest.load(folder) == Manifest.load(one) and not names(folder / "claims")
