"""What an engine reserves of a cluster, and how many engines have room: arithmetic, without Ray.

An engine that fits a machine reserves a part of it. One that needs more GPUs than any machine has reserves a bundle for each GPU; the
first bundle also holds the process that drives it, which is given hidden states and applies the head to them on the bundle's GPU.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.config import Recipe

Machine = Mapping[str, float]  # what it has, in Ray's units


class Room(NamedTuple):
    """What one engine reserves.

    Attributes:
        over_machines: its GPUs may lie on several machines.
    """

    cpus: float
    gpus: int
    over_machines: bool = False

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Of an engine over several machines, the driving process first."""
        first: dict[str, float] = {"CPU": self.cpus, "GPU": 1}
        return [first, *({"GPU": 1.0} for _ in range(self.gpus - 1))]

    def count(self, machines: Sequence[Machine]) -> int:
        """How many engines have room on machines that do nothing else."""
        if not self.over_machines:
            return sum(_times(machine, {"CPU": self.cpus, "GPU": self.gpus}) for machine in machines)
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        return min(gpus // self.gpus, sum(_times(machine, self.bundles[0]) for machine in machines))

    def __str__(self) -> str:
        apart = " on one machine or several" if self.over_machines else ""
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs{apart}"


def _times(machine: Machine, needed: Mapping[str, float]) -> int:
    return min(int(machine.get(kind, 0) // number) for kind, number in needed.items() if number)


def engine_room(recipe: Recipe, machines: Sequence[Machine]) -> Room:
    """What an engine reserves of these machines.

    Raises ValueError for `placement.engine_gpus` that differ from the engine's processes where no machine has so many.
    """
    placement = recipe.placement
    spec = recipe.teacher.engine_spec
    local = not spec.served
    gpus = placement.engine_gpus
    if gpus is None:
        gpus = placement.num_workers if local and any(machine.get("GPU") for machine in machines) else 0
    cpus: float | None = placement.engine_cpus
    if cpus is None:  # an engine on a CPU has a machine to itself
        cores = [machine["CPU"] for machine in machines if machine.get("CPU")]
        cpus = min(cores, default=1) if local and not gpus else 1
    most = max((int(machine.get("GPU", 0)) for machine in machines), default=0)
    over_machines = spec.over_machines and 0 < most < gpus  # without any, machines are to come
    if over_machines and gpus != placement.num_workers:
        raise ValueError(
            f"placement.engine_gpus is {gpus}, more than any machine of the Ray cluster has ({most}); over several machines an engine takes "
            f"as many as tensor_parallel x pipeline_parallel ({placement.num_workers}): leave engine_gpus out"
        )
    return Room(cpus, gpus, over_machines)


def remark(room: Room, tensor_parallel: int, machines: Sequence[Machine]) -> str | None:
    """What an operator should know of an engine over several machines whose layers are split over more GPUs than one of them has."""
    most = max((int(machine.get("GPU", 0)) for machine in machines), default=0)
    if not room.over_machines or tensor_parallel <= most:
        return None
    return (
        f"placement.tensor_parallel is {tensor_parallel}, more GPUs than a machine has ({most}): every layer waits for the network. Rather "
        f"tensor_parallel: {most}, and the rest by pipeline_parallel"
    )
