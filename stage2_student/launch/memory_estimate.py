"""Memory of a student's weights, gradients and optimizer per rank and ZeRO stage, counted without loading a weight.

As this project trains (`distributed.deepspeed_config`, `model.student.Precision`): weights, gradients and AdamW's two
moments are float32. Activations and logits come on top, and grow with `train.micro_batch_tokens`; a run's
`memory_bytes` includes them.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 3, for what each stage partitions; DeepSpeed 0.19's code for
what it holds in addition: from stage 1 on, another copy of the rank's partition of the weights, and a bucket for
reducing gradients. Stage 3 also gathers the weights of the layer being computed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from pipeline.config import DeepSpeedConfig, Recipe, student_config
from pipeline.runtime.huggingface import load_config
from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.distributed.deepspeed_config import operators_json
from stage2_student.interfaces import StudentShape, make_interface
from stage2_student.model.drop_layers import smaller_config
from stage2_student.model.initial_student import end_tokens, student_tokenizer
from stage2_student.model.lora import add_adapters
from stage2_student.model.rows_alone import freeze_body

FLOAT_BYTES = 4
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default of zero_optimization.reduce_bucket_size


class Sizes(NamedTuple):
    """Numbers of parameters, including the interface's."""

    total: int
    trained: int


def student_sizes(recipe: Recipe) -> Sizes:
    """Count the parameters of the student that the recipe trains.

    It is moved to its tokenizer, layers are dropped, adapters and interface added.
    """
    student = student_config(recipe)
    source = resolve_model(student.source)
    tokenizer, _, _ = student_tokenizer(student)
    moved = tokenizer.sha256 != ByteTokenizer.load(source).sha256
    config = load_config(source)
    if moved:
        config.get_text_config().vocab_size = len(tokenizer.token_bytes)
        if student.transfer.tie == "untie":
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if student.drop_layers:
        layers = range(config.get_text_config().num_hidden_layers)
        config = smaller_config(config, [layer for layer in layers if layer not in student.drop_layers])
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=source.trust_remote_code)
        parts: list[torch.nn.Module] = [lm]
        if recipe.train.objectives.uses_bytes:
            shape = StudentShape.of(lm, tokenizer, end_tokens(student, tokenizer))
            parts.append(make_interface(student, shape))
        if student.lora_rank:
            add_adapters(lm, student, moved)
        elif student.trained == "rows":
            freeze_body(lm)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    return Sizes(
        total=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def state_bytes(sizes: Sizes, zero_stage: int, num_ranks: int, moment_bytes: int = FLOAT_BYTES) -> int:
    """Return the bytes on each rank without the bucket; offloaded state counts as if it were not offloaded.

    Args:
        moment_bytes: of each of the optimizer's two moments of a weight.
    """
    weights = sizes.total / (num_ranks if zero_stage == 3 else 1)
    copy = sizes.trained / num_ranks if zero_stage else 0
    gradients = sizes.trained / (num_ranks if zero_stage >= 2 else 1)
    moments = 2 * sizes.trained / (num_ranks if zero_stage >= 1 else 1)
    return int(FLOAT_BYTES * (weights + copy + gradients) + moment_bytes * moments)


def footprint_lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield label and text for `bld plan`: the student's parameters, and GiB on each rank by ZeRO stage."""
    sizes = student_sizes(recipe)
    yield "parameters", f"{sizes.total:,} parameters, {sizes.trained:,} of them trained"
    bucket = bucket_bytes(recipe.train.deepspeed)
    moment_bytes = FLOAT_BYTES if recipe.train.optimizer == "adamw" else 1
    without = [
        f"{key}: {value}"
        for key, value, plain in (
            ("train.precision", recipe.train.precision, "autocast"),
            ("student.lora_base", student_config(recipe).lora_base, "full"),
        )
        if value != plain
    ]
    less = f"; {' and '.join(without)} takes less than this, which counts weights of 4 bytes" if without else ""
    for num_ranks in sorted({1, 8, recipe.train.num_processes}):
        stages = (state_bytes(sizes, stage, num_ranks, moment_bytes) + (bucket if stage else 0) for stage in range(4))
        text = ", ".join(f"stage {stage} {size / 2**30:.2f}" for stage, size in enumerate(stages))
        yield (
            f"memory, {num_ranks} rank{'' if num_ranks == 1 else 's'}",
            f"GiB on each by ZeRO stage: {text}; activations and logits come on top"
            + (f"; from stage 1 on {bucket / 2**30:.2f} are DeepSpeed's bucket" if num_ranks == 1 else "")
            + less,
        )


def bucket_bytes(config: DeepSpeedConfig) -> int:
    """Return the size of the buffer that gradients are reduced in, from stage 1 on."""
    zero = operators_json(config).get("zero_optimization", {})
    return FLOAT_BYTES * int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
