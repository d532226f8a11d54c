"""Shards made by engines on a Ray cluster: the only module that imports ray.

This process, the driver, plans, claims, reads the corpus and hands out one shard at a time with its documents; an engine is an actor
that makes it and commits it itself, where the dump lies. Back come only counts. Ray places the engines, carries the calls, and tells
when an engine is lost: its shard is the next to be handed out, and another engine is started. An engine that finds nothing more to
do makes the oldest shard of another one as well; whichever commits first has made it.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import metrics
from pipeline.config import Recipe
from pipeline.interrupt import terminable
from pipeline.logs import say, warn
from stage1_teacher.cluster_engine import ClusterEngine, Task, code_sha256
from stage1_teacher.dump import Filled, Job, Maker
from stage1_teacher.hand_out import HandOut, Run
from stage1_teacher.make_shards import Made
from stage1_teacher.restart import EngineError
from stage1_teacher.teacher import Named

_LOOK_SECONDS = 1.0  # the longest that nothing happens here: the cluster may have grown


@contextmanager
def ray_engines(job: Job, _: Named, address: str | None) -> Iterator[Maker]:
    """Shards made by engines of a Ray cluster, while the context lasts.

    Args:
        address: of the cluster; None: that of RAY_ADDRESS, or else one that runs on this machine, or else one that is started here.
    Raises:
        ValueError: Ray is not installed, there is no such cluster, or it has no room for an engine.
    """
    ray = import_ray()
    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"--address {address}: the dump is started on a machine of the cluster, or there with `ray job submit`; give --address auto"
        )
    try:
        ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ValueError(
            f"--address {address}: no Ray cluster answers: {error}. One that asks for a token needs RAY_AUTH_MODE=token in the environment"
        ) from error
    try:
        with terminable():  # again: ray.init puts a handler of its own for SIGTERM in place
            yield Engines(ray, job).make
    finally:
        ray.shutdown()


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


def engine_resources(recipe: Recipe, machines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What an engine reserves of one machine, in Ray's units."""
    placement = recipe.placement
    local = recipe.teacher.engine != "openai"
    gpus = placement.engine_gpus
    if gpus is None:
        gpus = placement.num_workers if local and any(machine.get("GPU") for machine in machines) else 0
    cpus: float | None = placement.engine_cpus
    if cpus is None:  # an engine on a CPU has a machine to itself
        cores = [machine["CPU"] for machine in machines if machine.get("CPU")]
        cpus = min(cores, default=1) if local and not gpus else 1
    return {"CPU": cpus, "GPU": gpus}


class Engines:
    """The cluster's engines: those that are starting, idle, or at work. Each is one actor, and lies on one machine."""

    def __init__(self, ray: Any, job: Job) -> None:
        self._ray, self._job, self._placement = ray, job, job.recipe.placement
        self._resources = engine_resources(job.recipe, self._machines())
        self._num_shards = self._num_at_first = len(job.missing())
        identity, accepted = job.manifest.identity, job.manifest.accepted_engines
        self._task = ray.put(Task(job.recipe, identity, accepted, job.audited, str(Path.cwd()), code_sha256()))
        self._starting: dict[Any, Any] = {}  # the call of `open`: its engine
        self._idle: list[Any] = []
        self._working: dict[Any, tuple[Any, Run]] = {}  # the call of `make`: its engine, and what it makes
        self._places: dict[Any, str] = {}
        self._failed_starts = 0  # in a row
        if not self._num_wanted():
            raise ValueError(
                f"no machine of the Ray cluster has room for an engine, which takes {_described(self._resources)}: its machines have "
                f"{'; '.join(map(_described, self._machines()))}. Add one, or set placement.engine_gpus and placement.engine_cpus; "
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
            options = {"num_cpus": self._resources["CPU"], "num_gpus": self._resources["GPU"]}
            engine = self._ray.remote(ClusterEngine).options(**options, scheduling_strategy="SPREAD").remote()
            self._starting[engine.open.remote(self._task)] = engine

    def _num_wanted(self) -> int:
        rooms = sum(
            min(int(machine.get(kind, 0) // needed) for kind, needed in self._resources.items() if needed)
            for machine in self._machines()
        )
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
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayActorError as error:
            self._failed_starts += 1
            metrics.FAILURES.labels("engine").inc()
            if self._failed_starts >= self._placement.engine_attempts:
                raise EngineError(
                    f"{self._failed_starts} engines in a row were lost while they started (placement.engine_attempts), the last one: "
                    f"{_first_line(error)}. Mend the cause (less memory: lower placement.gpu_memory), then run the same command again."
                ) from error
            warn(f"{self._job.dump}: an engine was lost while it started ({_first_line(error)}); starting another")
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
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayActorError as error:
            del self._working[call]
            metrics.FAILURES.labels("engine").inc()
            warn(
                f"{self._job.dump}: the engine in {self._places.pop(engine)} is lost ({_first_line(error)}); shard "
                f"{run.shard.plan.index} is handed out again"
            )
            hand_out.lose(run, _first_line(error))
            return
        if made is not None:
            self._num_shards -= made.committed is not None
            yield made


def _described(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
