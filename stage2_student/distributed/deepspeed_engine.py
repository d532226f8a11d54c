"""DeepSpeed, and nothing else: the only module that imports it.

Losses arrive as sums in nats. `engine.backward` gets them times the world size over the global number of supervised
bytes: DeepSpeed averages over ranks, and that makes the mean the sum that the bytes divide.
"""

import argparse
import atexit
import contextlib
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pipeline.config import TrainConfig
from stage2_student.distributed.rank_environment import rank_environment

LR_FACTOR = "lr_factor"  # of a parameter group


def learning_rate(step: int, train: TrainConfig) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then a cosine down to `lr * min_lr_ratio` at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    share = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * cosine)


def start_ranks() -> tuple[int, int, torch.device]:
    """Join the group of whatever started this process (or be alone). Returns (rank, world, device)."""
    os.environ.update(rank_environment(os.environ))
    # On a CPU DeepSpeed would compile a collective of its own first: a minute, a compiler, and a lock file that a kill
    # leaves behind for the next run to wait on. Gloo is there already.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    device = own_device()
    if device.type != "cpu":
        get_accelerator().set_device(device.index)
    return dist.get_rank(), dist.get_world_size(), device


def own_device() -> torch.device:
    """What this rank computes on; LOCAL_RANK says which of the machine's."""
    name = get_accelerator().device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(name, int(os.environ["LOCAL_RANK"]))


def leave_at_exit() -> None:
    """Have this process leave the group when it ends, as NCCL wants it. Not for after an error: the others may be
    waiting in it.
    """
    atexit.unregister(deepspeed.comm.destroy_process_group)  # once, however often a process trains
    if dist.is_initialized():
        atexit.register(deepspeed.comm.destroy_process_group)


def start_engine(
    student: nn.Module,
    config: dict[str, Any],
    rates: Mapping[float, Sequence[nn.Parameter]],
    meet: Callable[[], object] = lambda: None,
) -> Any:
    """Wrap the student; its weights are split over the ranks from here on, as the ZeRO stage says.

    Args:
        rates: the parameters that learn, by their multiple of the rate that `optimizer_step` is given; others stay as
            they are.
        meet: returns when all ranks have called it: once they have written or read their files of a checkpoint, for
            some disks take longer than DeepSpeed's own collectives after that wait.
    """
    parameters = [{"params": list(params), LR_FACTOR: factor} for factor, params in rates.items()]
    student.register_state_dict_post_hook(_without_frozen)
    engine, _, _, _ = deepspeed.initialize(model=student, model_parameters=parameters, config=config)
    _meet_before(engine.checkpoint_engine, "commit", meet)  # then DeepSpeed has all ranks wait in a barrier
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):  # ZeRO-3's, which gathers weights
        _meet_before(engine.optimizer, "checkpoint_event_epilogue", meet)
    return engine


def _meet_before(holder: Any, name: str, meet: Callable[[], object]) -> None:
    method = getattr(holder, name)

    def met(*arguments: Any) -> Any:
        meet()
        return method(*arguments)

    setattr(holder, name, met)


def _without_frozen(student: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Frozen weights are not part of a student's state. DeepSpeed leaves them out by their first name only: a tied head
    would stay.
    """
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, on all of them."""
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def gather(value: Any) -> list[Any]:
    """Each rank's value, in order, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers, on every rank."""
    box = torch.tensor([number], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def backward(engine: Any, nats: Tensor, num_bytes: int, world: int, last: bool, scale: float = 1.0) -> None:
    """Add a micro-batch's gradient, `scale` times; after the `last` of a step the optimizer runs at
    `optimizer_step`.
    """
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    loss = nats * world / num_bytes
    if not engine.zero_optimization():
        loss = loss * scale
    elif scale != engine.optimizer.loss_scale:
        engine.optimizer.override_loss_scale(scale)  # ZeRO multiplies the loss, and divides its shares of the gradient
    engine.backward(loss, scale_wrt_gas=False)


def optimizer_step(engine: Any, lr: float, scale: float = 1.0) -> float:
    """One AdamW step on the gradient over `scale`. Returns the gradient's norm over all ranks, before clipping.

    Where that is not finite, nothing was changed, and the gradient is gone: the step may be tried again.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group[LR_FACTOR]
    if engine.zero_optimization():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Without ZeRO DeepSpeed clips, but neither tells the norm nor looks at it.
    grads = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if scale != 1:
        for grad in grads:
            grad.div_(scale)
    norm = float(get_total_norm(grads))
    if math.isfinite(norm):
        engine.step()
    else:
        engine.zero_grad()
    return norm


def save(engine: Any, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
    """Write a DeepSpeed checkpoint to `folder/tag`, without frozen weights: the start model has them. Every rank calls
    it.
    """
    engine.save_checkpoint(
        str(folder), tag=tag, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
    )


def load(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Read weights and optimizer back; returns the `client_state` stored with them.

    A universal checkpoint (`for_any_world`) is read by an engine whose config says so.
    """
    factors = [group[LR_FACTOR] for group in engine.optimizer.param_groups]
    path, client_state = engine.load_checkpoint(
        str(folder), tag=tag, load_lr_scheduler_states=False, custom_load_fn=_load_trained
    )
    if path is None:
        raise ValueError(
            f"{folder / tag} is not a DeepSpeed checkpoint; delete that folder to resume from the one before"
        )
    # A universal checkpoint gives ZeRO-3 the first group's values for all groups, and all of them one step to count in.
    for group, factor in zip(engine.optimizer.param_groups, factors, strict=True):
        group[LR_FACTOR] = factor
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if "step" in state:
            state["step"] = state["step"].clone()
    return dict(client_state)


UNIVERSAL = {"checkpoint": {"load_universal": True}}  # of the config of an engine that will load one


def for_any_world(checkpoint: Path, out: Path) -> None:
    """Write a ZeRO checkpoint to `out` in the form that any number of ranks can load. One rank does it, in its own
    process.
    """
    wanted = {
        "input_folder": str(checkpoint),
        "output_folder": str(out),
        "num_extract_workers": 1,
        "num_merge_workers": 1,
    }
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    said = io.StringIO()  # a progress bar for each of its passes
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ds_to_universal.main(argparse.Namespace(**wanted, **flags))
    (out.parent / "latest_universal").unlink()  # it names `out`, which does not stay


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a checkpoint's weights into a student; those that it does not hold are frozen, else ValueError."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    lacking = trained & set(missing)
    if lacking or unexpected:
        raise ValueError(
            f"the checkpoint does not fit the student: lacking {sorted(lacking)[:5]}, unknown {unexpected[:5]}"
        )


def checkpoint_weights(folder: Path, tag: str) -> dict[str, Tensor]:
    """The float32 weights that were trained, of a checkpoint of any ZeRO stage, by name, on the CPU.

    ZeRO leaves its shares of the weights in one file per rank; without ZeRO they lie in one piece in the model's file.
    """
    shares: Iterable[Path] = (folder / tag).glob("*_optim_states.pt")
    if any(True for _ in shares):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag))
    states = torch.load(folder / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return dict(states["module"])
