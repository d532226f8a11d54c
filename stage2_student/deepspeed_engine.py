"""DeepSpeed, and nothing else: the only module that imports it.

Losses arrive as sums in nats. `engine.backward` gets them times the world size over the global number of supervised
bytes: DeepSpeed averages over ranks, and that makes the mean the sum that the bytes divide.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pipeline.config import Recipe, TrainConfig
from stage2_student.launch import free_port

LR_FACTOR = "lr_factor"  # of a parameter group


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """What DeepSpeed is told, all of it: a pure function of the recipe and the number of ranks.

    Batch sizes are DeepSpeed's book-keeping only (documents of one micro-batch vary); accumulation is steered by
    `train_step`. Precision is ours (`stage2_student.model.Precision`): its weights are plain float32.
    """
    train = recipe.train
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.grad_clip,
        "optimizer": {
            "type": "AdamW",
            # torch's own: DeepSpeed's CPU kernel compiles for minutes, and resumed slightly off.
            "params": {
                "torch_adam": True,
                "lr": train.lr,
                "betas": list(train.betas),
                "eps": 1e-8,
                "weight_decay": train.weight_decay,
            },
        },
        "zero_optimization": {"stage": train.deepspeed.zero_stage, "contiguous_gradients": True, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # we print our own lines
        "wall_clock_breakdown": False,
    }


def learning_rate(step: int, train: TrainConfig) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then a cosine down to `lr * min_lr_ratio` at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    share = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * cosine)


def start_ranks() -> tuple[int, int, torch.device]:
    """Join the launcher's group (or be alone, without a launcher). Returns (rank, world, device)."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    # On a CPU DeepSpeed would compile a collective of its own first: a minute, a compiler, and a lock file that a kill
    # leaves behind for the next run to wait on. Gloo is there already.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    device = torch.device(get_accelerator().device_name(), int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu":
        return dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    get_accelerator().set_device(device.index)
    return dist.get_rank(), dist.get_world_size(), device


def start_engine(student: nn.Module, config: dict[str, Any], rates: Mapping[float, Sequence[nn.Parameter]]) -> Any:
    """Wrap the student; its weights are split over the ranks from here on, as the ZeRO stage says.

    `rates` holds the parameters that learn, by their multiple of the rate that `optimizer_step` is given; others stay as they are.
    """
    parameters = [{"params": list(params), LR_FACTOR: factor} for factor, params in rates.items()]
    student.register_state_dict_post_hook(_without_frozen)
    engine, _, _, _ = deepspeed.initialize(model=student, model_parameters=parameters, config=config)
    return engine


def _without_frozen(student: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Frozen weights are not part of a student's state. DeepSpeed leaves them out by their first name only: a tied head would stay."""
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, on all of them."""
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    dist.barrier()


def backward(engine: Any, nats: Tensor, num_bytes: int, world: int, last: bool) -> None:
    """Add a micro-batch's gradient; after the `last` of a step the optimizer runs at `optimizer_step`."""
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(nats * world / num_bytes, scale_wrt_gas=False)


def optimizer_step(engine: Any, lr: float) -> float:
    """One AdamW step. Returns the gradient's norm over all ranks, before clipping."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group[LR_FACTOR]
    plain = not engine.zero_optimization()  # without ZeRO DeepSpeed clips, but does not tell the norm
    norm = get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]) if plain else None
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def save(engine: Any, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
    """Write a DeepSpeed checkpoint to `folder/tag`, without frozen weights: the start model has them. Every rank calls it."""
    engine.save_checkpoint(
        str(folder), tag=tag, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
    )


def load(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Read weights and optimizer back; returns the `client_state` stored with them."""
    path, client_state = engine.load_checkpoint(
        str(folder), tag=tag, load_lr_scheduler_states=False, custom_load_fn=_load_trained
    )
    if path is None:
        raise ValueError(
            f"{folder / tag} is not a DeepSpeed checkpoint; delete that folder to resume from the one before"
        )
    return dict(client_state)


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
