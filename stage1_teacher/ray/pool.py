"""Engines on a Ray cluster; the only module that imports ray.

This process, the driver, plans, claims shards, reads the corpus and assigns shards with their documents to engines. An
engine is an actor that makes a shard and commits it to the folder itself; only counts come back. Ray places
the engines, carries the calls and reports lost engines: a lost engine's shard is the next to be assigned, and a new
engine is started. An engine with nothing else to do also makes the oldest shard that another one is working on; the
first commit counts. That second copy is why Ray's own retries (`max_restarts`, `max_task_retries`, `ActorPool`,
`ray.data`) are not used: they wait for an engine that hangs, and for a host that is cut off until Ray has given it up.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.runtime import log, metrics
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.runtime.format import count_of
from pipeline.runtime.termination import terminable
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.coordination.shard_job import Job, OpenShardMaker
from stage1_teacher.coordination.shard_work import ShardMaker, ShardProgress, ShardWork
from stage1_teacher.engines.base import DRIVER_SHARE
from stage1_teacher.processes.shard_queue import Attempts, ShardQueue
from stage1_teacher.ray.actor import ClusterEngine, ClusterTask, code_sha256
from stage1_teacher.ray.resources import cross_machine_warning, engine_resources, with_writers

_POLL_SECONDS = 1.0  # the longest wait for an engine before the cluster's size is checked again


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """Connect to a Ray cluster for as long as the context lasts, and yield the `ray` module.

    Args:
        address: the cluster's address; None: RAY_ADDRESS, or a cluster running on this machine, or a new one started
            here; `local`: a new one started here.
    Raises:
        ValueError: Ray is not installed, the cluster does not answer or has another version, or none can be started.
    """
    ray = import_ray()
    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"--address {address}: run the command on a machine of the cluster (also with `ray job submit`), with "
            "--address auto"
        )
    end_children_with_me()  # a cluster started here ends with this dump
    try:
        # Ray puts the driver's folder first on its processes' module path; the operator's may hold a package with one
        # of our names.
        with chdir(Path(__file__).resolve().parents[2]):
            ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray has no exception class of its own for most failures here
        raise ValueError(_not_connected(address, error)) from error
    try:
        with terminable():  # again: ray.init replaces the SIGTERM handler
            yield ray
    finally:
        ray.shutdown()


def _not_connected(address: str | None, error: Exception) -> str:
    """Return a message that says what went wrong and what to do."""
    where = "--ray" if address is None else f"--address {address}"
    message = " ".join(str(error).split())
    if isinstance(error, ConnectionError):
        remembered = (
            "The address comes from RAY_ADDRESS, or from a cluster that this machine was part of, which Ray remembers "
            "until `ray stop`; --address local starts one for this dump. "
        )
        return (
            f"{where}: no Ray cluster answers: {message}. {remembered if address is None else ''}`ray start --head` "
            "starts one, and `ray status` shows whether it is up; a cluster that requires a token needs "
            "RAY_AUTH_MODE=token in the environment"
        )
    if isinstance(error, ValueError):
        return f"{where}: {message}. Give HOST:PORT of the cluster's head (for example 10.0.0.1:6379), auto or local"
    if "ersion" in message:
        return f"{where}: {message}. Install the same Ray and Python on all machines of the cluster"
    return f"{where}: Ray could not be started: {message}. Its logs are in /tmp/ray/session_latest/logs"


@contextmanager
def cluster_engines(address: str | None) -> Iterator[OpenShardMaker]:
    """Connect to a Ray cluster, as `ray_cluster` does, and yield what opens its engines."""
    with ray_cluster(address) as ray:
        yield partial(ray_engines, ray=ray)


@contextmanager
def ray_engines(job: Job, ray: Any) -> Iterator[ShardMaker]:
    """Yield what has shards made by the cluster's engines. Raises ValueError if no engine fits on the cluster."""
    yield ClusterEngines(ray, job).make


def import_ray() -> Any:
    """Import ray. Raises ValueError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default it reports usage to its makers
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            "--ray: Ray is not installed. Run `pip install 'byte-level-distillation[ray]'` on every machine of the "
            "cluster; without Ray, start the command with --worker I/N on each machine"
        ) from error
    return ray


class ClusterEngines:
    """Engines of a cluster: starting, idle or working.

    Each is one actor. An engine with more GPUs than one machine has is an actor in a placement group, in which vLLM
    starts one actor per GPU.
    """

    def __init__(self, ray: Any, job: Job) -> None:
        self._ray, self._job, self._placement = ray, job, job.recipe.placement
        machines = self._machines()
        self._resources = engine_resources(job.recipe, machines)
        if (warning := cross_machine_warning(self._resources, self._placement.tensor_parallel, machines)) is not None:
            log.warning(f"{job.folder}: {warning}")
        self._num_shards = self._num_at_first = len(job.missing())
        task = job.task(with_writers(job.recipe, self._resources, machines))
        over_machines = self._resources.over_machines
        self._task = ray.put(ClusterTask(task, str(Path.cwd()), code_sha256(), over_machines))
        self._starting: dict[Any, Any] = {}  # pending call of `open`: its engine
        self._idle: list[Any] = []
        self._working: dict[Any, Any] = {}  # running call of `make` or `flush`: its engine
        self._attempts: dict[Any, Attempts] = {}  # of every engine that has started
        self._places: dict[Any, str] = {}  # of every engine that has started
        self._groups: dict[Any, Any] = {}  # placement groups of engines over several machines
        self._failed_starts = 0  # in a row
        if not self._num_wanted():
            raise ValueError(
                f"no engine fits on the Ray cluster: it needs {self._resources}, and the machines have "
                f"{'; '.join(map(_described, machines))}. Add a machine, or set placement.engine_gpus and "
                "placement.engine_cpus; with placement.max_engines set, the command waits for machines to join"
            )

    def make(self, shards: Iterator[ShardWork]) -> Iterator[ShardProgress]:
        """Have the shards made, each read when an engine is free for it, and yield progress."""
        queue = ShardQueue(shards, self._ray.put, self._placement.max_engine_failures)
        while not queue.is_done:
            self._start()
            self._idle = [engine for engine in self._idle if not self._give_work(engine, queue)]
            if not queue.is_done:
                yield from self._collect(queue)

    def _give_work(self, engine: Any, queue: ShardQueue) -> bool:
        """Have an engine make a shard, or commit those that it has made; returns False if it has nothing to do."""
        uncommitted = self._attempts[engine]
        if attempt := queue.next(is_idle=not uncommitted):
            uncommitted.add(attempt)
            make = engine.make.options(num_returns="streaming")
            self._working[make.remote(attempt.shard.plan, attempt.shard.documents)] = engine
        elif uncommitted:
            self._working[engine.flush.options(num_returns="streaming").remote()] = engine
        else:
            return False
        return True

    def _start(self) -> None:
        """Request as many engines as fit and have work; Ray starts each when its resources are free."""
        for _ in range(self._num_wanted() - len(self._starting) - len(self._places)):
            engine = self._new_over_machines() if self._resources.over_machines else self._new()
            self._starting[engine.open.remote(self._task)] = engine

    def _new(self) -> Any:
        options = {"num_cpus": self._resources.cpus, "num_gpus": self._resources.gpus}
        return self._ray.remote(ClusterEngine).options(**options, scheduling_strategy="SPREAD").remote()

    def _new_over_machines(self) -> Any:
        """Create an engine in the first bundle of its own placement group, on as few machines as possible."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self._ray.util.placement_group(self._resources.bundles, strategy="PACK")
        options = {"num_cpus": self._resources.cpus, "num_gpus": DRIVER_SHARE}
        first = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        engine = self._ray.remote(ClusterEngine).options(**options, scheduling_strategy=first).remote()
        self._groups[engine] = group
        return engine

    def _lose(self, engine: Any, error: Any) -> str:
        """Free the resources of a lost engine, and return why it was lost.

        It failed, its process or machine died, or Ray ended it to save memory. Raises an error that every engine would
        raise.
        """
        why = _cause(error)
        metrics.count_failure("engine")
        self._ray.kill(engine)
        if engine in self._groups:
            self._ray.util.remove_placement_group(self._groups.pop(engine))
        return why

    def _num_wanted(self) -> int:
        num_fitting = self._resources.count(self._machines())
        # At least two until the end, so that a hanging engine has another beside it.
        return min(self._placement.max_engines or num_fitting, max(self._num_shards, min(self._num_at_first, 2)))

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _collect(self, queue: ShardQueue) -> Iterator[ShardProgress]:
        """Wait until an engine has started or finished a batch, and yield the progress, after a while an empty one."""
        calls = [*self._starting, *self._working]
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=_POLL_SECONDS)
        if not ready:
            yield ShardProgress(0, 0, 0)
        for call in ready:
            if call in self._starting:
                self._collect_started(call)
            else:
                yield from self._collect_made(call, queue)

    def _collect_started(self, call: Any) -> None:
        engine = self._starting.pop(call)
        try:
            self._places[engine] = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            why = self._lose(engine, error)
            self._failed_starts += 1
            if self._failed_starts >= self._placement.max_engine_failures:
                engines = count_of(self._failed_starts, "engine")
                raise EngineError(
                    f"{engines} in a row failed to start (placement.max_engine_failures); last error: "
                    f"{why}. Fix the cause (if it is memory, lower placement.gpu_memory) and rerun the same "
                    "command."
                ) from error
            log.warning(f"{self._job.folder}: an engine failed to start ({why}); starting another")
            return
        self._failed_starts = 0
        self._idle.append(engine)
        self._attempts[engine] = Attempts()
        log.info(f"{self._job.folder}: an engine is ready in {self._places[engine]}; {len(self._places)} now")

    def _collect_made(self, call: Any, queue: ShardQueue) -> Iterator[ShardProgress]:
        engine = self._working[call]
        try:
            progress = self._ray.get(next(call))
        except StopIteration:
            del self._working[call]
            self._idle.append(engine)
            return
        except self._ray.exceptions.RayError as error:
            why = self._lose(engine, error)
            del self._working[call]
            place, lost = self._places.pop(engine), list(self._attempts.pop(engine))
            again = _assigned_again([attempt.shard.plan.index for attempt in lost])
            log.warning(f"{self._job.folder}: the engine in {place} is lost ({why}){again}")
            for attempt in lost:
                queue.fail(attempt, why)
            return
        made = queue.advance(self._attempts[engine].of(progress), progress)
        if made is not None:
            self._num_shards -= made.committed is not None
            yield made


def _assigned_again(shards: Sequence[int]) -> str:
    """Return the end of a sentence that names a lost engine's shards; it may have committed all of them."""
    if not shards:
        return ""
    *others, last = map(str, shards)
    return (
        f"; shards {', '.join(others)} and {last} are assigned again" if others else f"; shard {last} is assigned again"
    )


def _described(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _cause(error: Any) -> str:
    """Return why an engine was lost, in one line. Raises its ValueError, which any other engine would raise too."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ValueError):
        raise cause from error
    message = str(cause or error).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {message}" if cause is not None else message
