"""DeepSpeed's JSON configuration: derived from the recipe, with an operator's own file merged over it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import DeepSpeedConfig, Recipe, TrainConfig

# Keys set by the recipe or the training loop; a key covers everything below it.
_OURS = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_tokens",
    "managed_gradient_accumulation": "nothing: the loop accumulates",
    "gradient_clipping": "train.grad_clip",
    "prescale_gradients": "nothing: losses are sums that the loop divides",
    "gradient_predivide_factor": "nothing: losses are sums that the loop divides",
    "optimizer.type": "train.optimizer",
    "optimizer.params.lr": "train.lr",
    "optimizer.params.betas": "train.betas",
    "optimizer.params.weight_decay": "train.weight_decay",
    "scheduler": "train.warmup_steps and train.min_lr_ratio",
    "fp16": "train.dtype",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.dtype",
    "amp": "train.dtype",
    "data_types": "train.dtype",
    "zero_optimization.stage": "train.deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "train.deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "train.deepspeed.offload_parameters",
    "zero_optimization.elastic_checkpoint": "nothing: a resume in another world converts the checkpoint",
    "checkpoint": "nothing: the loop saves and loads",
    "elasticity": "nothing: a resume in another world converts the checkpoint",
    "activation_checkpointing": "train.gradient_checkpointing",
    "data_efficiency": "nothing: the loop reads the dump",
    "curriculum_learning": "nothing: the loop reads the dump",
}
# Keys that affect placement and speed, not the result; the rest of an operator's file is part of a run's identity.
_PLACEMENT = {
    "zero_optimization", "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "comms_logger",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "monitor_config", "aio", "autotuning",
}  # fmt: skip
_ZERO_DECIDES = {"zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"}


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """Build DeepSpeed's complete configuration from the recipe, the operator's file and the number of ranks.

    A pure function of these three. Batch sizes are for DeepSpeed's bookkeeping only (the number of documents in a
    micro-batch varies); the loop controls accumulation. Precision is ours
    (`stage2_student.model.student.Precision`): DeepSpeed's weights are plain float32, or bfloat16 with a float32 copy.

    Raises ValueError for a file that is not JSON, or that sets what the recipe decides.
    """
    train = recipe.train
    derived = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.grad_clip,
        **_optimizer(train),
        **_weights(train),
        "zero_optimization": _zero(train.deepspeed),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # we log our own lines
        "wall_clock_breakdown": False,
    }
    return _merged(derived, operators_json(train.deepspeed))


def _weights(train: TrainConfig) -> dict[str, Any]:
    """Return the sections on bfloat16 weights, whose gradients are summed in float32; empty for float32 weights."""
    if train.precision == "autocast":
        return {}
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def _optimizer(train: TrainConfig) -> dict[str, Any]:
    """Return the section on AdamW; empty for an optimizer that is made here and handed over."""
    if train.optimizer != "adamw":
        return {}
    return {
        "optimizer": {
            "type": "AdamW",
            # torch's own: DeepSpeed's CPU kernel takes minutes to compile, and its resumes were slightly off.
            "params": {
                "torch_adam": True,
                "lr": train.lr,
                "betas": list(train.betas),
                "eps": 1e-8,
                "weight_decay": train.weight_decay,
            },
        },
    }


def _zero(config: DeepSpeedConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, "contiguous_gradients": True, "overlap_comm": False}
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.offload_optimizer}
    if config.offload_parameters != "none":
        zero["offload_param"] = {"device": config.offload_parameters}
    return zero


def operators_json(config: DeepSpeedConfig) -> dict[str, Any]:
    """Read the file that `train.deepspeed.config` names; empty if none is given."""
    if config.config is None:
        return {}
    path = Path(config.config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"train.deepspeed.config: {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"train.deepspeed.config: {path} must hold an object, not {values!r}")
    for key in _keys(values):
        for ours, decided_by in _OURS.items():
            if key == ours or key.startswith(f"{ours}."):
                raise ValueError(
                    f"train.deepspeed.config: {path} sets {key}, which the recipe decides; set {decided_by} instead"
                    if decided_by.startswith("train.")
                    else f"train.deepspeed.config: {path} sets {key}, which cannot be set ({decided_by}); remove it"
                )
    return values


def decides_the_result(config: DeepSpeedConfig) -> dict[str, Any]:
    """Return the part of the operator's file that belongs to a run's identity."""
    values = operators_json(config)
    decides = {key: value for key, value in values.items() if key not in _PLACEMENT}
    zero = {key: value for key, value in values.get("zero_optimization", {}).items() if key in _ZERO_DECIDES}
    return decides | ({"zero_optimization": zero} if zero else {})


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys, nested objects' and their members' alike."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
