"""Shards made by engines on a Ray cluster: the only module that imports ray.

This process, the driver, plans, claims, reads the corpus and hands out one shard at a time with its documents; an engine is an actor
that makes it and commits it itself, where the dump lies. Back come only counts. Ray places the engines, carries the calls, and tells
when an engine is lost: its shard is the next to be handed out, and another engine is started. An engine that finds nothing more to
do makes the oldest shard of another one as well; whichever commits first has made it.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.runtime import metrics
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.runtime.log import say, warn
from pipeline.runtime.termination import terminable
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.dump.job import Engines, Filled, Job, Maker
from stage1_teacher.dump.shard_writer import Made
from stage1_teacher.engines.base import HEAD_SHARE
from stage1_teacher.ray.actor import ClusterEngine, Task, code_sha256
from stage1_teacher.ray.resources import engine_room, remark
from stage1_teacher.ray.shard_queue import HandOut, Run
from stage1_teacher.targets.resolved import ResolvedTeacher

_LOOK_SECONDS = 1.0  # the longest that nothing happens here: the cluster may have grown


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster while the context lasts.

    Args:
        address: of the cluster; None: that of RAY_ADDRESS, or else one that runs on this machine, or else one that is started here;
            `local`: one that is started here.
    Raises:
        ValueError: Ray is not installed, there is no such cluster, it has another version, or none can be started here.
    """
    ray = import_ray()
    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"--address {address}: the dump is started on a machine of the cluster, or there with `ray job submit`; give --address auto"
        )
    end_children_with_me()  # a cluster that is started here is for this dump
    try:
        # Ray has its processes look for modules in the driver's folder before all else: there the operator may have a package named as ours.
        with chdir(Path(__file__).resolve().parents[2]):
            ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray has no class of its own for most of what goes wrong here
        raise ValueError(_not_connected(address, error)) from error
    try:
        with terminable():  # again: ray.init puts a handler of its own for SIGTERM in place
            yield ray
    finally:
        ray.shutdown()


def _not_connected(address: str | None, error: Exception) -> str:
    """What went wrong, and how to go on."""
    where = "--ray" if address is None else f"--address {address}"
    said = " ".join(str(error).split())
    if isinstance(error, ConnectionError):
        remembered = (
            "The address is that of RAY_ADDRESS, or of a cluster that this machine was part of, which Ray remembers until `ray stop`; "
            "--address local starts one for this dump. "
        )
        return (
            f"{where}: no Ray cluster answers: {said}. {remembered if address is None else ''}`ray start --head` starts one, and "
            "`ray status` says whether it is up; one that asks for a token needs RAY_AUTH_MODE=token in the environment"
        )
    if isinstance(error, ValueError):
        return f"{where}: {said}. Give HOST:PORT of the cluster's head, as in 10.0.0.1:6379, or auto or local"
    if "ersion" in said:
        return f"{where}: {said}. Install the same Ray and Python on all machines of the cluster"
    return f"{where}: Ray could not be started: {said}. Its logs are in /tmp/ray/session_latest/logs"


@contextmanager
def cluster_engines(address: str | None) -> Iterator[Engines]:
    """Engines of a Ray cluster, which is connected while the context lasts; see `ray_cluster`."""
    with ray_cluster(address) as ray:
        yield partial(ray_engines, ray=ray)


@contextmanager
def ray_engines(job: Job, _: ResolvedTeacher, ray: Any) -> Iterator[Maker]:
    """Shards made by engines of a Ray cluster, while it is connected. Raises ValueError where it has no room for an engine."""
    yield ClusterEngines(ray, job).make


def import_ray() -> Any:
    """Raises ValueError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            "--ray: Ray is not installed: `pip install 'byte-level-distillation[ray]'` on every machine of the cluster; without it, "
            "start `bld teacher` with --worker I/N on each machine"
        ) from error
    return ray


class ClusterEngines:
    """The cluster's engines: those that are starting, idle, or at work. Each is one actor; where one machine has too few GPUs for it,
    the actor stands in a placement group in which vLLM starts an actor for each of them."""

    def __init__(self, ray: Any, job: Job) -> None:
        self._ray, self._job, self._placement = ray, job, job.recipe.placement
        machines = self._machines()
        self._room = engine_room(job.recipe, machines)
        if (said := remark(self._room, self._placement.tensor_parallel, machines)) is not None:
            warn(f"{job.dump}: {said}")
        self._num_shards = self._num_at_first = len(job.missing())
        identity, accepted = job.manifest.identity, job.manifest.accepted_engines
        over_machines = self._room.over_machines
        self._task = ray.put(
            Task(job.recipe, identity, accepted, job.audited, str(Path.cwd()), code_sha256(), over_machines)
        )
        self._starting: dict[Any, Any] = {}  # the call of `open`: its engine
        self._idle: list[Any] = []
        self._working: dict[Any, tuple[Any, Run]] = {}  # the call of `make`: its engine, and what it makes
        self._places: dict[Any, str] = {}
        self._groups: dict[Any, Any] = {}  # of engines over several machines
        self._failed_starts = 0  # in a row
        if not self._num_wanted():
            raise ValueError(
                f"the Ray cluster has no room for an engine, which takes {self._room}: its machines have "
                f"{'; '.join(map(_described, machines))}. Add one, or set placement.engine_gpus and placement.engine_cpus; "
                "with placement.most_engines the dump waits for machines to come"
            )

    def make(self, shards: Iterator[Filled]) -> Iterator[Made]:
        """Have the shards made, each handed out when an engine is free for it."""
        hand_out = HandOut(shards, self._ray.put, self._placement.engine_attempts)
        while not hand_out.is_done:
            self._start()
            while self._idle and (run := hand_out.next()):
                engine = self._idle.pop()
                call = engine.make.options(num_returns="streaming").remote(run.shard.plan, run.shard.documents)
                self._working[call] = engine, run
            if not hand_out.is_done:
                yield from self._take_in(hand_out)

    def _start(self) -> None:
        """Ask for engines, as many as there is room and work for; Ray starts each once its resources are free."""
        for _ in range(self._num_wanted() - len(self._starting) - len(self._places)):
            engine = self._new_over_machines() if self._room.over_machines else self._new()
            self._starting[engine.open.remote(self._task)] = engine

    def _new(self) -> Any:
        options = {"num_cpus": self._room.cpus, "num_gpus": self._room.gpus}
        return self._ray.remote(ClusterEngine).options(**options, scheduling_strategy="SPREAD").remote()

    def _new_over_machines(self) -> Any:
        """An engine in the first bundle of a placement group of its own; on as few machines as have room."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self._ray.util.placement_group(self._room.bundles, strategy="PACK")
        options = {"num_cpus": self._room.cpus, "num_gpus": HEAD_SHARE}
        first = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        engine = self._ray.remote(ClusterEngine).options(**options, scheduling_strategy=first).remote()
        self._groups[engine] = group
        return engine

    def _drop(self, engine: Any) -> None:
        """An engine that is lost: what is left of it ends, and what it reserved is free."""
        self._ray.kill(engine)
        if engine in self._groups:
            self._ray.util.remove_placement_group(self._groups.pop(engine))

    def _num_wanted(self) -> int:
        rooms = self._room.count(self._machines())
        # Two to the end, so that one that hangs has another beside it.
        return min(self._placement.most_engines or rooms, max(self._num_shards, min(self._num_at_first, 2)))

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _take_in(self, hand_out: HandOut) -> Iterator[Made]:
        """Wait for engines to have done something, and pass it on; after a while without, that nothing was done."""
        calls = [*self._starting, *self._working]
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=_LOOK_SECONDS)
        if not ready:
            yield Made(0, 0, 0)
        for call in ready:
            if call in self._starting:
                self._take_started(call)
            else:
                yield from self._take_made(call, hand_out)

    def _take_started(self, call: Any) -> None:
        engine = self._starting.pop(call)
        try:
            self._places[engine] = self._ray.get(call)
        except (
            self._ray.exceptions.RayError
        ) as error:  # it failed, its process or machine died, or Ray ended it to save memory
            why = _cause(error)
            self._drop(engine)
            self._failed_starts += 1
            metrics.count_failure("engine")
            if self._failed_starts >= self._placement.engine_attempts:
                raise EngineError(
                    f"{self._failed_starts} engines in a row were lost while they started (placement.engine_attempts), the last one: "
                    f"{why}. Mend the cause (less memory: lower placement.gpu_memory), then run the same command again."
                ) from error
            warn(f"{self._job.dump}: an engine was lost while it started ({why}); starting another")
            return
        self._failed_starts = 0
        self._idle.append(engine)
        say(f"{self._job.dump}: an engine is ready in {self._places[engine]}; {len(self._places)} now")

    def _take_made(self, call: Any, hand_out: HandOut) -> Iterator[Made]:
        engine, run = self._working[call]
        try:
            made = hand_out.advance(run, self._ray.get(next(call)))
        except StopIteration:
            del self._working[call]
            self._idle.append(engine)
            return
        except (
            self._ray.exceptions.RayError
        ) as error:  # it failed, its process or machine died, or Ray ended it to save memory
            why = _cause(error)
            del self._working[call]
            self._drop(engine)
            metrics.count_failure("engine")
            warn(
                f"{self._job.dump}: the engine in {self._places.pop(engine)} is lost ({why}); shard {run.shard.plan.index} is handed "
                "out again"
            )
            hand_out.lose(run, why)
            return
        if made is not None:
            self._num_shards -= made.committed is not None
            yield made


def _described(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _cause(error: Any) -> str:
    """What an engine was lost by, in a line. Raises what it says is wrong with recipe, weights or text, which another would say too."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ValueError):
        raise cause from error
    said = str(cause or error).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {said}" if cause is not None else said
