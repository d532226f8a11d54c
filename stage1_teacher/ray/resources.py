"""CPUs and GPUs that an engine reserves on a cluster, and how many engines fit: arithmetic only, without Ray.

An engine that fits on one machine reserves part of it. An engine that needs more GPUs than any machine has reserves one
bundle per GPU; the first bundle also holds the driving process, which receives the hidden states and applies the head
to them on that bundle's GPU.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.config import Recipe
from stage1_teacher.coordination.shard_writers import num_writers

Machine = Mapping[str, float]  # its resources, in Ray's units


class EngineResources(NamedTuple):
    """Resources that one engine reserves.

    Attributes:
        over_machines: its GPUs may be on several machines.
    """

    cpus: float
    gpus: int
    over_machines: bool = False

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundles of an engine over several machines, the driving process's first."""
        first: dict[str, float] = {"CPU": self.cpus, "GPU": 1}
        return [first, *({"GPU": 1.0} for _ in range(self.gpus - 1))]

    def count(self, machines: Sequence[Machine]) -> int:
        """Return how many engines fit on machines that run nothing else."""
        if not self.over_machines:
            return sum(_times(machine, self._on_first) for machine in machines)
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        return min(gpus // self.gpus, sum(_times(machine, self._on_first) for machine in machines))

    def cores(self, machines: Sequence[Machine]) -> int:
        """Return how many cores each engine on GPUs has to itself if all that fit run; 0 if none fits."""
        fitting = [(machine["CPU"], _times(machine, self._on_first)) for machine in machines if machine.get("CPU")]
        # One over several machines leaves no GPUs for another on the machine of its driving process.
        return min(
            (int(cores // (1 if self.over_machines else engines)) for cores, engines in fitting if engines), default=0
        )

    @property
    def _on_first(self) -> dict[str, float]:
        return self.bundles[0] if self.over_machines else {"CPU": self.cpus, "GPU": self.gpus}

    def __str__(self) -> str:
        where = " on one machine or several" if self.over_machines else ""
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs{where}"


def _times(machine: Machine, needed: Mapping[str, float]) -> int:
    return min(int(machine.get(kind, 0) // number) for kind, number in needed.items() if number)


def _max_gpus(machines: Sequence[Machine]) -> int:
    return max((int(machine.get("GPU", 0)) for machine in machines), default=0)


def engine_resources(recipe: Recipe, machines: Sequence[Machine]) -> EngineResources:
    """Return what an engine reserves on these machines.

    Raises:
        ValueError: `placement.engine_gpus` differs from the engine's number of processes, and no machine has that many
            GPUs.
    """
    placement = recipe.placement
    spec = recipe.teacher.engine_spec
    local = not spec.served
    gpus = placement.engine_gpus
    if gpus is None:
        gpus = placement.num_workers if local and any(machine.get("GPU") for machine in machines) else 0
    cpus: float | None = placement.engine_cpus
    if cpus is None:  # an engine without GPUs gets a machine to itself
        cores = [machine["CPU"] for machine in machines if machine.get("CPU")]
        cpus = min(cores, default=1) if local and not gpus else 1
    max_gpus = _max_gpus(machines)
    over_machines = spec.over_machines and 0 < max_gpus < gpus  # 0: machines with GPUs may still join
    if over_machines and gpus != placement.num_workers:
        raise ValueError(
            f"placement.engine_gpus is {gpus}, more than any machine of the Ray cluster has ({max_gpus}); an engine "
            f"over several machines takes tensor_parallel x pipeline_parallel GPUs ({placement.num_workers}): leave "
            "engine_gpus out"
        )
    return EngineResources(cpus, gpus, over_machines)


def with_writers(recipe: Recipe, resources: EngineResources, machines: Sequence[Machine]) -> Recipe:
    """Return the recipe with a number of writers for each engine; by itself it would count all cores as its own."""
    cores = resources.cores(machines)
    if recipe.placement.writers is not None or not resources.gpus or not cores:
        return recipe
    return recipe.with_values(placement=recipe.placement.model_copy(update={"writers": num_writers(cores)}))


def cross_machine_warning(resources: EngineResources, tensor_parallel: int, machines: Sequence[Machine]) -> str | None:
    """Return a warning if an engine splits its layers over more GPUs than one machine has, else None."""
    max_gpus = _max_gpus(machines)
    if not resources.over_machines or tensor_parallel <= max_gpus:
        return None
    return (
        f"placement.tensor_parallel is {tensor_parallel}, but a machine has {max_gpus} GPUs: every layer waits for the "
        f"network. Prefer tensor_parallel: {max_gpus}, and split the rest by pipeline_parallel"
    )
