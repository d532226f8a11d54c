"""Division of this machine's GPUs among its engines: which GPUs each of them gets."""

from collections.abc import Sequence

from pipeline.config import Recipe
from pipeline.runtime.devices import visible_gpus
from pipeline.runtime.format import count_of

Share = tuple[str, ...]  # names of an engine's GPUs, as CUDA_VISIBLE_DEVICES has them; empty: it computes elsewhere


def divide_gpus(gpus: Sequence[str], per_engine: int, num_engines: int | None) -> list[Share]:
    """Divide GPUs among engines, neighbours together; at least one engine.

    Args:
        per_engine: GPUs that one engine needs. If there are fewer, there is one engine with what there is: it says what
            it lacks.
        num_engines: None: as many as fit. If more than fit, groups of GPUs are shared, in turn.
    Raises:
        ValueError: several engines were asked for, and there are too few GPUs for one.
    """
    groups = [tuple(gpus[first : first + per_engine]) for first in range(0, len(gpus) - per_engine + 1, per_engine)]
    if gpus and not groups and num_engines is not None and num_engines > 1:
        raise ValueError(
            f"placement.engines is {num_engines}, but one engine takes {count_of(per_engine, 'GPU')} "
            f"(tensor_parallel x pipeline_parallel), and {count_of(len(gpus), 'GPU')} can be seen here "
            "(CUDA_VISIBLE_DEVICES): lower tensor_parallel or pipeline_parallel, or leave engines out"
        )
    groups = groups or [tuple(gpus)]
    return [groups[index % len(groups)] for index in range(num_engines or len(groups))]


def engine_shares(recipe: Recipe) -> list[Share]:
    """Return the GPUs of each engine that `bld teacher` runs on this machine. Raises as `divide_gpus` does."""
    placement = recipe.placement
    served = recipe.teacher.engine_spec.served
    return divide_gpus([] if served else visible_gpus(), placement.num_workers, placement.engines)


def unused_gpus(gpus: Sequence[str], shares: Sequence[Share]) -> list[str]:
    """Return the GPUs that hold no engine."""
    used = {name for share in shares for name in share}
    return [name for name in gpus if name not in used]


def num_independent(shares: Sequence[Share]) -> int:
    """Return how many engines have devices of their own: those that share GPUs, or a CPU's cores, count as one."""
    return len(set(shares)) if shares[0] else 1


def describe_shares(recipe: Recipe, shares: Sequence[Share]) -> str:
    """Return how many engines run, on which GPUs, and which hold none: `2 engines on 4 GPUs: 0,1 | 2,3`."""
    engines = count_of(len(shares), "engine")
    if not shares[0]:
        return engines
    groups = list(dict.fromkeys(shares))
    listed = " | ".join(",".join(group) for group in groups)
    text = f"{engines} on {count_of(sum(map(len, groups)), 'GPU')}: {listed}"
    if len(groups) < len(shares):
        text += "; several engines share a GPU"
    idle = unused_gpus(visible_gpus(), shares)
    if not idle:
        return text
    why = f"an engine takes {recipe.placement.num_workers}" if recipe.placement.engines is None else "placement.engines"
    return f"{text}; {count_of(len(idle), 'GPU')} without an engine ({why}): {','.join(idle)}"
