"""One optimizer step: the gradient of all micro-batches, agreement among the ranks, and the update itself."""

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
    """The place of this process among the ranks.

    Ranks wait in the channel, not in a collective, where one may take longer than the others.
    """

    rank: int
    world: int
    device: torch.device
    channel: Channel


@dataclass(frozen=True)
class StepPlan:
    """The values fixed before a step: its number (from 1), learning rate, seed, and supervised bytes over all ranks."""

    step: int
    lr: float
    seed: int
    num_bytes: int
    interface_alone: bool
    num_corpora: int = 1  # several of a union


class StepDone(NamedTuple):
    """The sums of this rank, the gradient norm over all ranks, and the next step's loss scale.

    `sums` has a row for each corpus, and a column for each sum named by the student.
    """

    sums: torch.Tensor
    grad_norm: float
    scale: LossScale | None


def take_step(
    engine: Any, micro_batches: Sequence[MicroBatch], plan: StepPlan, scale: LossScale | None, ranks: Ranks
) -> StepDone:
    """Update the weights once. In float16 the gradient is recomputed at half the scale until it does not overflow.

    Raises FloatingPointError, on every rank, if a loss or the gradient is not finite; the weights are then unchanged.
    """
    while True:
        torch.manual_seed(plan.seed)
        factor = 1.0 if scale is None else scale.factor
        sums, cause = _gradient(engine, micro_batches, plan, factor, ranks)
        if ds.all_reduce_max(int(cause is not None), ranks.device):
            _stop(plan.step, [fault for fault in ds.all_gather_objects(cause) if fault is not None])
        grad_norm = ds.optimizer_step(engine, plan.lr, factor)
        if math.isfinite(grad_norm):
            return StepDone(sums, grad_norm, None if scale is None else scale.after_step())
        if scale is None or not scale.can_shrink:
            doc_ids_by_rank = ds.all_gather_objects([name for micro in micro_batches for name in micro.doc_ids])
            names = ", ".join(name for doc_ids in doc_ids_by_rank for name in doc_ids)
            _stop(plan.step, [f"the gradient's norm is {grad_norm}, but the losses are finite, on documents {names}"])
        scale = scale.after_overflow()
        if ranks.rank == 0:
            count_failure("overflow")
            log.warning(
                f"step {plan.step}: the gradient overflows float16 at loss scale {factor:g}; "
                f"retrying the same batch at {scale.factor:g}"
            )


def _gradient(
    engine: Any, micro_batches: Sequence[MicroBatch], plan: StepPlan, factor: float, ranks: Ranks
) -> tuple[torch.Tensor, str | None]:
    """Accumulate the gradient of this rank's micro-batches. Returns their sums, and what is wrong with a loss or None.

    A rank whose loss is not finite continues: the others wait for its part of each gradient.
    """
    sums = torch.zeros((plan.num_corpora, len(engine.module.sums_names)), device=ranks.device)
    finite = []
    for index, micro in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        nats, micro_sums = engine(micro.to(ranks.device), plan.interface_alone)
        finite.append(torch.isfinite(nats.detach()))
        ds.backward(engine, nats, plan.num_bytes, ranks.world, last, factor)
        if not last:
            engine.step()
        sums[micro.corpus] += micro_sums
    bad = [micro for micro, good in zip(micro_batches, torch.stack(finite).tolist(), strict=True) if not good]
    if not bad:
        return sums, None
    names = ", ".join(name for micro in bad for name in micro.doc_ids)
    of_all = zip(engine.module.sums_names, sums.sum(0).tolist(), strict=True)
    values = ", ".join(f"{name} {value}" for name, value in of_all)
    return sums, f"the loss is not finite on documents {names} ({values})"


def _stop(step: int, causes: Sequence[str]) -> NoReturn:
    raise FloatingPointError(
        f"step {step}: {'; '.join(causes)}. The weights are as they were before this step, and the newest checkpoint "
        "is good; look at these documents with `bld inspect`, or lower train.lr"
    )
