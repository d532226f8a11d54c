"""QLoRA: the frozen layers beside adapters in 4 bits (NF4), by bitsandbytes.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.config import StudentConfig, TrainConfig
from stage2_student.acceleration.requirements import require_package

if TYPE_CHECKING:  # the launcher checks options without torch
    import torch

_KEY = "student.lora_base: 4bit"
_HOW = {"compress_statistics": True, "quant_type": "nf4"}  # the paper's: NF4, the blocks' scales in 8 bits


def check_base(student: StudentConfig, train: TrainConfig) -> None:
    """Raise ValueError if this machine lacks the package of `student.lora_base`, or ZeRO would split its weights."""
    if student.lora_base == "full":
        return
    require_package(_KEY, "bitsandbytes", "pip install bitsandbytes", "student.lora_base=full")
    if train.deepspeed.zero_stage == 3:
        raise ValueError(
            f"{_KEY} packs weights with their scales, which train.deepspeed.zero_stage 3 would partition: give "
            "zero_stage 2 or less, or set student.lora_base=full"
        )


def quantize_base(lm: Any, student: StudentConfig, train: TrainConfig, device: "torch.device") -> None:
    """Put the layers that have adapters in 4 bits, one at a time, onto a device; their adapters stay as they are."""
    if student.lora_base == "full":
        return
    import torch
    from torch import nn

    layers = _adapted(lm)
    made_by = importlib.import_module("bitsandbytes").nn
    for adapted in layers:
        plain = adapted.base_layer
        made = made_by.Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=getattr(torch, train.dtype),
            **_HOW,
        )
        made.weight = made_by.Params4bit(plain.weight.data, requires_grad=False, module=made, **_HOW)
        if plain.bias is not None:
            made.bias = nn.Parameter(plain.bias.data, requires_grad=False)
        adapted.base_layer = made.to(device)  # which quantizes


def round_base(lm: Any, student: StudentConfig) -> None:
    """Round the layers that have adapters to what 4 bits hold: adapters are merged into what they learned beside."""
    if student.lora_base == "full":
        return
    import torch

    layers = _adapted(lm)
    functions = importlib.import_module("bitsandbytes").functional
    with torch.no_grad():
        for adapted in layers:
            weight = adapted.base_layer.weight
            weight.copy_(functions.dequantize_4bit(*functions.quantize_4bit(weight.data, **_HOW)))


def _adapted(lm: Any) -> list[Any]:
    """Return the linear layers that have adapters. Raises ValueError if there are none, or one is of another kind."""
    from peft.tuners.lora import Linear as AdaptedLinear
    from torch import nn

    found = [module for module in lm.modules() if isinstance(module, AdaptedLinear)]
    others = sorted({type(one.base_layer).__name__ for one in found if not isinstance(one.base_layer, nn.Linear)})
    if others or not found:
        raise ValueError(
            f"{_KEY} is for linear layers, and adapters of this {lm.config.model_type} are beside "
            f"{', '.join(others) or 'none'}: set student.lora_base=full"
        )
    return found
