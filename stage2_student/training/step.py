"""One optimizer step: the gradient of all micro-batches, what all ranks agree on, and the step itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch

from pipeline.runtime import log
from pipeline.runtime.metrics import count_failure
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.distributed.rank_messages import Channel
from stage2_student.training.loss_scale import LossScale


class Ranks(NamedTuple):
    """This process among the others. Where one may take longer than the others, they meet in the channel, not in a
    collective.
    """

    rank: int
    world: int
    device: torch.device
    channel: Channel


@dataclass(frozen=True)
class StepPlan:
    """What is fixed before a step: its number (from 1), rate, random seed, the supervised bytes over all ranks."""

    step: int
    lr: float
    seed: int
    num_bytes: int
    interface_alone: bool


class StepDone(NamedTuple):
    """This rank's sums (as the student names them), the gradient's norm over all ranks, the loss scale to go on
    with.
    """

    sums: torch.Tensor
    grad_norm: float
    scale: LossScale | None


def take_step(
    engine: Any, micro_batches: Sequence[MicroBatch], plan: StepPlan, scale: LossScale | None, ranks: Ranks
) -> StepDone:
    """Update the weights once. In float16 a gradient that overflows is taken again at half the scale, until it does
    not.

    Raises FloatingPointError, on every rank, where a loss or the gradient is not finite; the weights are then as they
    were.
    """
    while True:
        torch.manual_seed(plan.seed)
        factor = 1.0 if scale is None else scale.factor
        sums, cause = _gradient(engine, micro_batches, plan, factor, ranks)
        if ds.largest(int(cause is not None), ranks.device):
            _stop(plan.step, [found for found in ds.gather(cause) if found is not None])
        grad_norm = ds.optimizer_step(engine, plan.lr, factor)
        if math.isfinite(grad_norm):
            return StepDone(sums, grad_norm, None if scale is None else scale.after_step())
        if scale is None or not scale.can_shrink:
            names = [name for names in ds.gather([n for m in micro_batches for n in m.doc_ids]) for name in names]
            _stop(
                plan.step,
                [f"the gradient's norm is {grad_norm}, and the losses are finite, on documents {', '.join(names)}"],
            )
        scale = scale.after_overflow()
        if ranks.rank == 0:
            count_failure("overflow")
            log.warning(
                f"step {plan.step}: the gradient overflows float16 at loss scale {factor:g}; the same batch again at {scale.factor:g}"
            )


def _gradient(
    engine: Any, micro_batches: Sequence[MicroBatch], plan: StepPlan, factor: float, ranks: Ranks
) -> tuple[torch.Tensor, str | None]:
    """Add up the gradient of this rank's micro-batches. Returns their sums, and what is wrong with a loss, if anything
    is.

    A rank whose loss is bad goes on: the others wait for its share of each gradient.
    """
    sums = torch.zeros(len(engine.module.sums_names), device=ranks.device)
    finite = []
    for index, micro in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        nats, micro_sums = engine(micro.to(ranks.device), plan.interface_alone)
        finite.append(torch.isfinite(nats.detach()))
        ds.backward(engine, nats, plan.num_bytes, ranks.world, last, factor)
        if not last:
            engine.step()
        sums += micro_sums
    bad = [micro for micro, good in zip(micro_batches, torch.stack(finite).tolist(), strict=True) if not good]
    if not bad:
        return sums, None
    names = ", ".join(name for micro in bad for name in micro.doc_ids)
    values = ", ".join(f"{name} {value}" for name, value in zip(engine.module.sums_names, sums.tolist(), strict=True))
    return sums, f"the loss is not finite on documents {names} ({values})"


def _stop(step: int, causes: Sequence[str]) -> NoReturn:
    raise FloatingPointError(
        f"step {step}: {'; '.join(causes)}. The weights are as they were before this step, and the newest checkpoint is good; look at "
        "these documents with `bld inspect`, or lower train.lr"
    )
