"""The kernel of the student's attention, by the name that transformers gives it."""

from typing import Any

from pipeline.config import TrainConfig
from pipeline.runtime.model_source import ModelSource
from stage2_student.acceleration.requirements import require_gpu, require_package

_KEY = "train.attention"
_OTHERWISE = f"{_KEY}=sdpa"
_PACKAGES = {
    "flash_attention_2": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash-attn-3", "pip install flash-attn-3"),
    "flash_attention_4": ("flash-attn-4", "pip install flash-attn-4"),
}


def check_attention(train: TrainConfig) -> None:
    """Raise ValueError if this machine lacks the package or GPU of `train.attention`, or it has no such dtype."""
    name = train.attention
    if name in _PACKAGES:
        require_package(f"{_KEY}: {name}", *_PACKAGES[name], _OTHERWISE)
    if train.attention_on_gpu:
        require_gpu(f"{_KEY}: {name}", _OTHERWISE)
    if name in _PACKAGES and train.dtype == "float32":
        raise ValueError(
            f"{_KEY}: {name} computes in bfloat16 or float16, and train.dtype is float32: give another train.dtype, "
            f"or set {_OTHERWISE}"
        )


def check_model_has(train: TrainConfig, source: ModelSource) -> None:
    """Raise ValueError if a model's family has no such attention; its weights are not read.

    Args:
        source: a local folder or hub name.
    """
    if train.attention == "auto":
        return
    import torch  # seconds to import, and the launcher needs none of these
    from transformers import AutoModelForCausalLM

    from pipeline.runtime.huggingface import load_config

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(load_config(source), trust_remote_code=source.trust_remote_code)
    use_attention(lm, train)


def use_attention(lm: Any, train: TrainConfig) -> None:
    """Give a model the attention that the recipe names.

    Raises:
        ValueError: its family has no such attention, or would compute with another.
    """
    name, family = train.attention, lm.config.model_type
    if name == "auto":
        return
    try:
        lm.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{_KEY}: {name} cannot be used for a model of type {family}: {str(error).split(' Please ')[0]} "
            f"Set {_KEY}=auto"
        ) from error
    if (used := lm.config._attn_implementation) != name:
        raise ValueError(
            f"{_KEY}: {name} cannot be used for a model of type {family}, which would compute with {used}. "
            f"Set {_KEY}=auto"
        )
