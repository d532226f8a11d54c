"""The pool: lost engines are replaced.

A real cluster completes a dump although one engine is killed and another hangs.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import ray.exceptions

from pipeline.config.loading import load_recipe
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.locations import location, names
from schemas.text_corpus import TextManifest
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.coordination.shard_work import ShardProgress
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.generation.run import run_generate
from stage1_teacher.processes.shard_queue import ShardQueue
from stage1_teacher.ray.pool import ClusterEngines, _assigned_again, cluster_engines, import_ray, ray_cluster
from stage1_teacher.verification.verify import verify_dump
from tests.scenarios.test_store_dump import stored
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.stage1_teacher.generation.test_run import rows_of, texts
from tests.stage1_teacher.generation.test_run import write_recipe as write_text_recipe
from tests.stage1_teacher.ray.test_resources import placed
from tests.support.ascii_models import ascii_model
from tests.support.object_store import object_store
from tests.support.tiny import END_OF_TEXT, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = """
import sys, ray
for attempts_left in (2, 1, 0):  # Ray gives a node 30 seconds to start, however busy the machine is
    try:
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            _node_ip_address="127.0.0.1",
        )
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Return the address of a cluster with room for two engines.

    The environment that they need is set before it starts.
    """
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
    """A gate that holds the first engine until there are two; after three shards stops both, and kills one."""

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

    def troubled(engines: ClusterEngines, queue: ShardQueue) -> Iterator[ShardProgress]:
        trouble.strike(engines)
        for made in collect(engines, queue):
            trouble.committed += made.committed is not None
            yield made

    monkeypatch.setattr(ClusterEngines, "_collect", troubled)
    placement = recipe.placement.model_copy(update={"engine_cpus": 1, "writers": 1})
    try:
        run_teacher(recipe.with_values(placement=placement), connect=lambda: cluster_engines(cluster))
    finally:
        if psutil.pid_exists(trouble.hanging):
            os.kill(trouble.hanging, signal.SIGKILL)
    said, folder = capsys.readouterr().err, location("s3://bucket/ray")
    assert said.count("an engine is ready") == 3 and said.count(" assigned again") == 1
    assert f"the engine in process {trouble.killed} of" in said and "; complete" not in said and ": complete" in said
    assert stored(folder) == content(one) and verify_dump(folder) == []
    assert Manifest.load(folder) == Manifest.load(one) and not names(folder / "claims")


def test_text_by_two_engines_of_which_one_is_killed_is_that_of_one(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ascii_model(tmp_path / "model", tiny_tokenizer(), END_OF_TEXT)
    prompts = texts([f"the thing {i} and é" for i in range(12)])
    settings: dict[str, Any] = {"shard_prompts": 1, "completions": 2}
    run_generate(load_recipe(write_text_recipe(tmp_path / "one", model, prompts, **settings)))
    killed: list[int] = []
    collect = ClusterEngines._collect

    def troubled(engines: ClusterEngines, queue: ShardQueue) -> Iterator[ShardProgress]:
        working = [engine for engine in engines._working.values() if engine in engines._places]
        if len(engines._places) == 2 and working and not killed:
            killed.append(int(engines._places[working[0]].split()[1]))
            os.kill(killed[0], signal.SIGKILL)
        yield from collect(engines, queue)

    monkeypatch.setattr(ClusterEngines, "_collect", troubled)
    path = write_text_recipe(tmp_path / "ray", model, prompts, **settings, path="s3://bucket/written")
    run_generate(load_recipe(path, ["placement.engine_cpus=1"]), connect=lambda: cluster_engines(cluster))
    said, folder = capsys.readouterr().err, location("s3://bucket/written")
    assert f"the engine in process {killed[0]} of" in said and ": complete" in said
    tables = stored(folder)
    found = [row for name in sorted(tables) for row in tables[name].to_pylist()]
    assert found == rows_of(tmp_path / "one" / "text")
    assert TextManifest.load(folder) == TextManifest.load(tmp_path / "one" / "text") and not names(folder / "claims")


def test_without_ray_the_error_names_the_extra_and_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"byte-level-distillation\[ray\].*--worker I/N"):
        import_ray()


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        (
            "10.0.0.1:6379",
            ConnectionError("Failed to connect"),
            r"--address 10.0.0.1:6379: no Ray cluster .*`ray start --head`",
        ),
        (
            None,
            ConnectionError("Failed to connect"),
            r"^--ray: no Ray cluster answers.*RAY_ADDRESS.*--address local starts one",
        ),
        (
            "10.0.0.1",
            ValueError("Malformed address"),
            r"--address 10.0.0.1: Malformed address. Give HOST:PORT of the cluster's head",
        ),
        (
            None,
            RuntimeError("Version mismatch: Ray 2.1"),
            r"Version mismatch: Ray 2.1. Install the same Ray and Python on all",
        ),
        (
            "local",
            Exception("The current node timed out"),
            r"could not be started: The current node timed out. Its logs are in",
        ),
        ("ray://h:10001", None, r"ray://h:10001: run the command on a machine of the cluster"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_said_with_the_way_out(
    address: str | None, error: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        assert error is not None
        raise error

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said), ray_cluster(address):
        pass


class FakeRay:
    """A cluster of one machine with room for one engine.

    Each engine started opens and works as it is told; an exception is raised.
    """

    exceptions = ray.exceptions

    def __init__(self, *engines: tuple[Any, Any]) -> None:
        self._engines = list(engines)
        self.killed: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def remote(self, _: type) -> Any:
        opened, made = self._engines.pop(0)
        engine = SimpleNamespace(open=SimpleNamespace(remote=lambda _: Call(opened)))
        if not isinstance(made, Later):
            made = SimpleNamespace(make=lambda *_, given=made: iter([given]), flush=lambda: iter([]))
        for name in ("make", "flush"):
            setattr(engine, name, streaming(getattr(made, name)))
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: Handle(engine)))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, calls: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Any) -> Any:
        found = call.gives if isinstance(call, Call) else call
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self, engine: Any) -> None:
        self.killed.append(engine)


def streaming(method: Any) -> Any:
    return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=method))


class Later:
    """An engine that commits its shards when it is asked to, or dies then."""

    def __init__(self, dies: bool = False) -> None:
        self._made: list[int] = []
        self._dies = dies

    def make(self, plan: ShardPlan, _: Any) -> Iterator[Any]:
        self._made.append(plan.index)
        return iter([ShardProgress(1, 1, 1)])

    def flush(self) -> Iterator[Any]:
        if self._dies:
            return iter([ray.exceptions.ActorDiedError()])
        return iter([ShardProgress(0, 0, 0, committed=index, stored_bytes=9) for index in self._made])


class Call:
    def __init__(self, gives: Any) -> None:
        self.gives = gives


class Handle:
    """A handle compared by identity, as Ray's are by their ids."""

    def __init__(self, engine: Any) -> None:
        self.open, self.make, self.flush = engine.open, engine.make, engine.flush


def failed(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("open", "traceback", cause)


def make_on(fake: FakeRay, num_shards: int = 1) -> list[int | None]:
    shards = [ShardPlan(index=i, first_document=0, num_documents=1, num_bytes=1, sha256="") for i in range(num_shards)]
    job: Any = SimpleNamespace(recipe=placed({}, {}), folder="d", missing=lambda: shards, task=lambda _: None)
    made = ClusterEngines(fake, job).make(iter([(shard, []) for shard in shards]))
    return [one.committed for one in made]


def test_an_engine_that_fails_dies_or_is_ended_for_its_memory_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    good = ShardProgress(1, 1, 1, committed=0)
    fake = FakeRay(
        (ray.exceptions.OutOfMemoryError("the node is low on memory\nand so on"), None),
        (failed(RuntimeError("no GPU here")), None),
        ("a", failed(EngineError("failed 3 times"))),
        ("b", ray.exceptions.ActorDiedError()),
        ("c", good),
    )
    assert make_on(fake) == [0] and len(fake.killed) == 4
    said = capsys.readouterr().err
    assert "failed to start (the node is low on memory)" in said and "(RuntimeError: no GPU here)" in said
    assert "the engine in a is lost (EngineError: failed 3 times); shard 0 is assigned again" in said


def test_shards_committed_long_after_they_are_made_are_counted_once_and_lost_with_their_engine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = FakeRay(("a", Later(dies=True)), ("b", Later()))
    made = make_on(fake, num_shards=2)
    assert [index for index in made if index is not None] == [0, 1]
    said = capsys.readouterr().err
    assert "the engine in a is lost" in said and "shards 0 and 1 are assigned again" in said
    assert _assigned_again([]) == "" and _assigned_again([4, 2, 7]) == "; shards 4, 2 and 7 are assigned again"


def test_what_every_engine_would_say_ends_the_dump_at_once() -> None:
    fake = FakeRay((failed(ValueError("teacher.end names no token")), None))
    with pytest.raises(ValueError, match=r"teacher\.end names no token"):
        make_on(fake)
    lost = [(failed(RuntimeError(f"number {i}")), None) for i in range(3)]
    with pytest.raises(EngineError, match=r"3 engines in a row failed to start .*RuntimeError: number 2"):
        make_on(FakeRay(*lost))


def test_a_process_of_ray_finds_nothing_by_the_drivers_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started_in: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda **_: started_in.append(Path.cwd()))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_cluster("local"):
        assert Path.cwd() == tmp_path
    assert started_in == [ROOT]  # what Ray gives its processes as the first place to look for modules
