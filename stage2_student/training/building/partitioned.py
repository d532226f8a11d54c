"""The student of a run under ZeRO stage 3, whose weights one rank alone reads.

DeepSpeed partitions a student weight by weight: rank 0 sends each one to all, and every rank keeps its part. So the
other ranks need no more than the shapes, and host memory holds the start model once in the whole job.
"""

import mmap
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.config import TrainConfig
from pipeline.runtime.huggingface import load_config
from pipeline.runtime.model_source import ModelSource
from stage2_student.data.packing import Packing
from stage2_student.distributed.rank_messages import Channel
from stage2_student.model.student import Student


def reads_weights(train: TrainConfig, rank: int) -> bool:
    """Return whether a rank reads the start model's weights."""
    return train.deepspeed.zero_stage < 3 or rank == 0


def empty_start(folder: Path, trust_remote_code: bool) -> Any:
    """Make the start model from its config: buffers are as computed, weights have no values, and take no memory."""
    config = load_config(ModelSource(str(folder), None, trust_remote_code))
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()  # what is moved to have no values loses its ties
    model.config.use_cache = False
    return model


def as_on_rank_0(student: Student, packing: Packing, channel: Channel) -> Packing:
    """Take over what rank 0 found by computing with the weights, and give this rank's weights room to arrive in.

    Args:
        packing: as rank 0 has resolved it; of no meaning on other ranks.
    Returns:
        Rank 0's.
    Raises:
        ValueError: this rank's student has other weights.
    """
    described = [(name, str(tuple(p.shape)), str(p.dtype), p.requires_grad) for name, p in student.named_parameters()]
    theirs, student.logit_scale, resolved = channel.gather(
        (described, student.logit_scale, packing) if channel.rank == 0 else None
    )[0]
    if different := sorted({one[0] for one in {*described} ^ {tuple(one) for one in theirs}}):
        raise ValueError(
            f"rank {channel.rank} makes other weights of the start's config than rank 0 has read from its files: "
            f"{', '.join(different[:3])}"
        )
    # DeepSpeed casts what is float32, which would fill the room.
    _make_room(student, torch.bfloat16 if student.train_config.precision == "bf16_master" else torch.float32)
    return packing if channel.rank == 0 else resolved


def _make_room(student: nn.Module, dtype: torch.dtype) -> None:
    """Replace weights without values by ones that take memory when they are first written to; tied ones stay tied.

    Each is a mapping of its own, which the system takes back as soon as DeepSpeed has dealt it: an allocator would keep
    the pages of most.
    """
    made: dict[int, nn.Parameter] = {}
    for module in student.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                if id(weight) not in made:
                    num_bytes = max(weight.numel() * dtype.itemsize, 1)
                    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                    room = torch.frombuffer(mapping, dtype=dtype, count=weight.numel()).view(weight.shape)
                    made[id(weight)] = nn.Parameter(room, requires_grad=weight.requires_grad)
                module.register_parameter(name, made[id(weight)])
