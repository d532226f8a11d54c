"""DeepSpeed behind a few functions: the only module that imports it.

Losses arrive as sums in nats. `engine.backward` gets them multiplied by the world size and divided by the global number
of supervised bytes: DeepSpeed averages over ranks, so the result is the global sum divided by the global byte count.
"""

import argparse
import atexit
import contextlib
import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
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

from stage2_student.distributed.rank_environment import rank_environment

LR_FACTOR = "lr_factor"  # of a parameter group


def start_ranks() -> tuple[int, int, torch.device]:
    """Join the process group of the launcher, or a group of one. Returns (rank, world, device)."""
    os.environ.update(rank_environment(os.environ))
    # On a CPU DeepSpeed would first compile its own collective: this takes a minute and a compiler, and a killed run
    # leaves a lock file that the next one waits on. Gloo is already available.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    device = own_device()
    if device.type != "cpu":
        get_accelerator().set_device(device.index)
    return dist.get_rank(), dist.get_world_size(), device


def own_device() -> torch.device:
    """Return the device of this rank; LOCAL_RANK selects among the machine's."""
    name = get_accelerator().device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(name, int(os.environ["LOCAL_RANK"]))


def leave_at_exit() -> None:
    """Destroy the process group when this process exits, as NCCL expects.

    Do not call it after an error: the other ranks may be waiting in the group.
    """
    atexit.unregister(deepspeed.comm.destroy_process_group)  # register once, however often a process trains
    if dist.is_initialized():
        atexit.register(deepspeed.comm.destroy_process_group)


def start_engine(
    student: nn.Module,
    config: dict[str, Any],
    groups: Iterable[tuple[float, float, Sequence[nn.Parameter]]],
    meet: Callable[[], object] = lambda: None,
    make_optimizer: Callable[[Sequence[dict[str, Any]]], Any] | None = None,
) -> Any:
    """Wrap the student in an engine, which partitions its weights over the ranks according to the ZeRO stage.

    Args:
        groups: the trained parameters, each group with its multiple of the learning rate given to `optimizer_step`
            and its weight decay; all others stay frozen.
        meet: blocks until all ranks have called it. Called once a rank has written or read its files of a checkpoint,
            because some disks take longer than the timeout of the DeepSpeed collectives that follow.
        make_optimizer: makes the optimizer of these groups; None: the one that the configuration names.
    """
    parameters = [
        {"params": list(params), LR_FACTOR: factor, "weight_decay": decay} for factor, decay, params in groups
    ]
    student.register_state_dict_post_hook(_without_frozen)
    engine, _, _, _ = deepspeed.initialize(
        model=student, model_parameters=parameters, config=config, optimizer=make_optimizer
    )
    _meet_before(engine.checkpoint_engine, "commit", meet)  # a barrier of DeepSpeed's follows
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
    """Remove frozen weights from a student's state dict, and the scales of those in 4 bits.

    DeepSpeed excludes them by their first name only, so that a tied head would remain.
    """
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            for key in [key for key in state if f"{key}.".startswith(f"{prefix}{name}.")]:
                del state[key]


def broadcast_buffers(student: nn.Module, device: torch.device) -> None:
    """Give all ranks the buffers of rank 0; ZeRO stage 3 does so with the weights alone."""
    for buffer in student.buffers():
        sent = buffer.to(device)
        dist.broadcast(sent, 0)
        buffer.copy_(sent)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the element-wise sum over all ranks, on every rank."""
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def all_gather_objects(value: Any) -> list[Any]:
    """Return each rank's value, in rank order, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_max(number: int, device: torch.device) -> int:
    """Return the maximum of the ranks' numbers, on every rank."""
    box = torch.tensor([number], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def backward(engine: Any, nats: Tensor, num_bytes: int, world: int, last: bool, scale: float = 1.0) -> None:
    """Accumulate a micro-batch's gradient times `scale`.

    After the `last` micro-batch of a step, `optimizer_step` applies the gradient.
    """
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    loss = nats * world / num_bytes
    if not engine.zero_optimization():
        loss = loss * scale
    elif scale != engine.optimizer.loss_scale:
        engine.optimizer.override_loss_scale(scale)  # ZeRO multiplies the loss, and divides its gradient partitions
    engine.backward(loss, scale_wrt_gas=False)


def optimizer_step(engine: Any, lr: float, scale: float = 1.0) -> float:
    """Take one AdamW step on the gradient divided by `scale`.

    Returns the gradient's norm over all ranks, before clipping. If it is not finite, the weights are unchanged and the
    gradient is discarded: the step may be retried.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group[LR_FACTOR]
    if engine.zero_optimization():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Without ZeRO, DeepSpeed clips, but neither reports the norm nor checks it.
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
    """Write a DeepSpeed checkpoint to `folder/tag`; every rank calls it.

    Frozen weights are excluded: the start model has them.
    """
    engine.save_checkpoint(
        str(folder), tag=tag, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
    )


def load(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Load weights and optimizer state; returns the `client_state` stored with them.

    To load a universal checkpoint (`convert_to_universal`), the engine needs `UNIVERSAL` in its configuration.
    """
    own = [{key: group[key] for key in (LR_FACTOR, "weight_decay")} for group in engine.optimizer.param_groups]
    path, client_state = engine.load_checkpoint(
        str(folder), tag=tag, load_lr_scheduler_states=False, custom_load_fn=_load_trained
    )
    if path is None:
        raise ValueError(
            f"{folder / tag} is not a DeepSpeed checkpoint; delete that folder to resume from the one before"
        )
    # From a universal checkpoint ZeRO-3 takes the first group's values for all groups, and one shared step counter.
    for group, values in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(values)
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    return dict(client_state)


UNIVERSAL = {"checkpoint": {"load_universal": True}}  # configuration of an engine that loads a universal checkpoint


def convert_to_universal(checkpoint: Path, out: Path) -> None:
    """Convert a ZeRO checkpoint to one that any number of ranks can load, and write it to `out`.

    A single rank does this, in its own process.
    """
    options = {
        "input_folder": str(checkpoint),
        "output_folder": str(out),
        "num_extract_workers": 1,
        "num_merge_workers": 1,
    }
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    discarded = io.StringIO()  # a progress bar for each of its passes
    with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
        ds_to_universal.main(argparse.Namespace(**options, **flags))
    (out.parent / "latest_universal").unlink()  # it names `out`, which is temporary


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a checkpoint's weights into a student. Raises ValueError if it lacks a trained one or has unknown ones."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    lacking = trained & set(missing)
    if lacking or unexpected:
        raise ValueError(
            f"the checkpoint does not match the student: missing {sorted(lacking)[:5]}, unknown {unexpected[:5]}"
        )


def checkpoint_weights(folder: Path, tag: str) -> dict[str, Tensor]:
    """Return the trained float32 weights of a checkpoint of any ZeRO stage, by name, on the CPU.

    ZeRO stores its partitions of the weights in one file per rank; without ZeRO the model's file holds them whole.
    """
    partitions: Iterable[Path] = (folder / tag).glob("*_optim_states.pt")
    if any(True for _ in partitions):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag))
    states = torch.load(folder / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return dict(states["module"])
