"""Which shard an engine of a cluster is given: none is forgotten, none counted twice, and none waits for an engine that hangs."""

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions

from pipeline.config import Recipe
from pipeline.corpus.documents import Document
from schemas.manifest import ShardPlan
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.dump.shard_writer import Made
from stage1_teacher.ray.actor import CONTENT, ROOT, ClusterEngine, Task, code_sha256
from stage1_teacher.ray.pool import ClusterEngines, import_ray, ray_cluster
from stage1_teacher.ray.resources import EngineResources, cross_machine_warning, engine_resources
from stage1_teacher.ray.shard_queue import Attempt, ShardQueue
from tests.test_layout import PACKAGES, dotted, imports, modules

RECIPE = {"corpus": {"source": "c"}, "teacher": {"model": "m"}, "dump": {"path": "d"}}


def shards(count: int) -> Iterator[tuple[ShardPlan, list[Document]]]:
    for index in range(count):
        yield ShardPlan(index=index, first_document=index, num_documents=1, num_bytes=10, sha256=""), []


def queue(count: int, attempts: int = 3) -> ShardQueue:
    return ShardQueue(shards(count), lambda documents: documents, attempts)


def last(index: int) -> Made:
    return Made(1, 10, 5, stored_bytes=100, committed=index, audited=1)


def test_any_order_of_finishes_losses_and_hangs_makes_each_shard_once_and_counts_it_once() -> None:
    for seed in range(50):
        chance = random.Random(seed)
        out, running, told = queue(7, attempts=100), [], []
        while not out.is_done:
            while len(running) < 3 and (run := out.next()):
                running.append(run)
            run = chance.choice(running)
            fate = chance.random()
            if fate < 0.2:
                running.remove(run)
                out.fail(run, "gone")
            elif fate < 0.6:
                told.append(out.advance(run, Made(0, 4, 2)) if run.done.text_bytes < 4 else None)
            else:
                running.remove(run)
                told.append(out.advance(run, Made(1, 10 - run.done.text_bytes, 5, 100, run.shard.plan.index, 1)))
        made = [t for t in told if t is not None]
        assert sorted(t.committed for t in made if t.committed is not None) == list(range(7))
        assert [sum(t[field] for t in made) for field in (0, 1, 3)] == [7, 70, 700]


def test_a_lost_shard_is_the_next_one_and_an_idle_engine_takes_the_oldest_that_another_is_at() -> None:
    out = queue(3)
    first, second = out.next(), out.next()
    assert isinstance(first, Attempt) and isinstance(second, Attempt)
    out.fail(first, "gone")
    again, third = out.next(), out.next()
    assert again is not None and third is not None
    assert (again.shard.plan.index, third.shard.plan.index) == (0, 2)
    copies = [out.next() for _ in range(4)]
    assert [copy.shard.plan.index if copy else None for copy in copies] == [0, 1, 2, None]
    assert out.advance(copies[1], last(1)) is not None  # type: ignore[arg-type]
    assert out.advance(second, last(1)) is None and not out.is_done


def test_a_shard_that_costs_engine_after_engine_ends_the_dump_with_the_cause() -> None:
    out = queue(1, attempts=2)
    out.fail(out.next(), "killed")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"shard 0 failed on 2 engines .*last error: out of memory"):
        out.fail(out.next(), "out of memory")  # type: ignore[arg-type]


def test_an_engine_takes_the_gpus_of_its_parallel_sizes_or_a_machine_without_gpus() -> None:
    split = {"tensor_parallel": 4, "pipeline_parallel": 2}
    gpus = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0}]
    for teacher, placement, machines, wanted in (
        ({}, split, gpus, EngineResources(1, 8)),
        ({}, {}, gpus, EngineResources(1, 1)),
        ({}, {}, [{"CPU": 16.0}, {"CPU": 8.0}, {}], EngineResources(8, 0)),
        ({}, {"engine_gpus": 2, "engine_cpus": 3}, [], EngineResources(3, 2)),
        ({"engine": "openai"}, {"base_url": "http://h"}, gpus, EngineResources(1, 0)),
    ):
        assert engine_resources(placed(teacher, placement), machines) == wanted


def placed(teacher: dict[str, object], placement: dict[str, object]) -> Recipe:
    return Recipe.model_validate(RECIPE | {"teacher": RECIPE["teacher"] | teacher, "placement": placement})


def test_an_engine_that_no_machine_has_gpus_for_takes_a_bundle_for_each() -> None:
    split = {"tensor_parallel": 4, "pipeline_parallel": 3}
    four = {"CPU": 16.0, "GPU": 4.0}
    room = engine_resources(placed({}, split), [four])
    assert room == EngineResources(1, 12, over_machines=True)
    assert room.bundles == [{"CPU": 1, "GPU": 1}] + 11 * [{"GPU": 1}]
    assert [room.count(n * [four]) for n in (2, 3, 5, 6)] == [0, 1, 1, 2]
    assert room.count([four, four, {"GPU": 4.0}]) == 1  # its first process needs a core as well, the others none
    assert room.count(3 * [{"GPU": 4.0}]) == 0
    assert cross_machine_warning(room, 4, [four]) is None
    assert "Prefer tensor_parallel: 4" in (cross_machine_warning(room, 12, [four]) or "")
    with pytest.raises(ValueError, match=r"engine_gpus is 5, more than any machine .* has \(4\).*\(12\)"):
        engine_resources(placed({}, split | {"engine_gpus": 5}), [four])


def test_one_machine_holds_as_many_engines_as_its_scarcest_part_allows() -> None:
    assert (
        EngineResources(4, 2).count([{"CPU": 16.0, "GPU": 8.0}, {"CPU": 7.0, "GPU": 8.0}, {"CPU": 64.0}, {}]) == 4 + 1
    )
    assert EngineResources(4, 0).count([{"CPU": 16.0, "GPU": 8.0}, {"CPU": 7.0}]) == 4 + 1


def test_a_machine_with_other_code_or_without_the_dump_refuses_to_make_shards(tmp_path: object) -> None:
    recipe = Recipe.model_validate(RECIPE | {"dump": {"path": f"{tmp_path}/elsewhere"}})
    task = Task(recipe, {}, (), frozenset(), str(tmp_path), "another", False)
    with pytest.raises(ValueError, match=r"process \d+ of .* runs another release of this package"):
        ClusterEngine().open(task)
    with pytest.raises(
        ValueError, match=r"cannot find .*elsewhere: dump.path must be a folder that all machines share"
    ):
        ClusterEngine().open(task._replace(code=code_sha256()))


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
        ("ray://h:10001", None, r"ray://h:10001: run the dump on a machine of the cluster"),
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
    """One machine with room for one engine. Each that is started opens and makes as it is told; an exception is raised."""

    exceptions = ray.exceptions

    def __init__(self, *engines: tuple[Any, Any]) -> None:
        self._engines = list(engines)
        self.killed: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def remote(self, _: type) -> Any:
        opened, made = self._engines.pop(0)
        engine = SimpleNamespace(open=SimpleNamespace(remote=lambda _: Call(opened)))
        engine.make = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: iter([made])))
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


class Call:
    def __init__(self, gives: Any) -> None:
        self.gives = gives


class Handle:
    """Told apart by identity, as Ray's are by their ids."""

    def __init__(self, engine: Any) -> None:
        self.open, self.make = engine.open, engine.make


def failed(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("open", "traceback", cause)


def make_on(fake: FakeRay) -> list[int | None]:
    shards = [ShardPlan(index=0, first_document=0, num_documents=1, num_bytes=1, sha256="")]
    manifest = SimpleNamespace(identity={}, accepted_engines=())
    job: Any = SimpleNamespace(
        recipe=placed({}, {}), manifest=manifest, audited=set(), dump="d", missing=lambda: shards
    )
    made = ClusterEngines(fake, job).make(iter([(shard, []) for shard in shards]))
    return [one.committed for one in made]


def test_an_engine_that_fails_dies_or_is_ended_for_its_memory_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    good = Made(1, 1, 1, committed=0)
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


def test_what_every_engine_would_say_ends_the_dump_at_once() -> None:
    fake = FakeRay((failed(ValueError("teacher.end names no token")), None))
    with pytest.raises(ValueError, match=r"teacher\.end names no token"):
        make_on(fake)
    lost = [(failed(RuntimeError(f"number {i}")), None) for i in range(3)]
    with pytest.raises(EngineError, match=r"3 engines in a row failed to start .*RuntimeError: number 2"):
        make_on(FakeRay(*lost))


def test_other_code_is_other_content_not_another_report(tmp_path: Path) -> None:
    for package in ("pipeline", "schemas", "stage1_teacher"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    ours = code_sha256(tmp_path)
    assert ours == code_sha256()
    for aside in ("pipeline/reports/page.py", "pipeline/cli/app.py", "pipeline/setup/doctor.py", "schemas/README.md"):
        with (tmp_path / aside).open("a", encoding="utf-8") as file:
            file.write("# more\n")
    assert code_sha256(tmp_path) == ours
    for deciding in ("stage1_teacher/reduction/cpu_kernel.py", "pipeline/covering/covering.py", "schemas/levels.py"):
        with (tmp_path / deciding).open("a", encoding="utf-8") as file:
            file.write("# more\n")
        assert code_sha256(tmp_path) != ours
        shutil.copy(ROOT / deciding, tmp_path / deciding)
    assert code_sha256(tmp_path) == ours


def test_whatever_an_engine_runs_is_in_that_hash_but_for_what_decides_no_content() -> None:
    paths = {dotted(path): path for path in modules(*PACKAGES)}
    run: set[str] = set()
    found = {"stage1_teacher.ray.actor", "stage1_teacher.engines.vllm_worker"}
    while found:
        run |= found
        found = {name for module in found for name in imports(paths[module])} & paths.keys() - run
    places = [ROOT / part for part in CONTENT]
    left_out = {name for name in run if not any(paths[name].is_relative_to(place) for place in places)}
    rooms = ("pipeline.runtime.", "pipeline.dumps", "stage1_teacher.coordination", "stage1_teacher.dump")
    assert {name for name in left_out if not name.startswith(rooms)} <= {"pipeline", "stage1_teacher"}
    # Of rooms that are not in it whole: logs and processes, licences and cards, identities, audits and what shards took.
    assert left_out.isdisjoint({"pipeline.runtime.dtypes", "pipeline.runtime.huggingface"})
    assert left_out.isdisjoint({"stage1_teacher.dump.shard_plan", "stage1_teacher.dump.shard_writer"})


def test_a_process_of_ray_finds_nothing_by_the_drivers_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started_in: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda **_: started_in.append(Path.cwd()))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_cluster("local"):
        assert Path.cwd() == tmp_path
    assert started_in == [ROOT]  # what Ray gives its processes as the first place to look for modules
