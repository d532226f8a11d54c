"""LoRA: low-rank adapters that train beside frozen linear layers, and are merged into them at export.

Source: Hu et al. 2021, arXiv:2106.09685; the adapters are peft's.
"""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.config import StudentConfig


def add_adapters(lm: Any, student: StudentConfig, tokenizer_moved: bool) -> LoraModel:
    """Put adapters beside linear layers of `lm`, in place, and freeze all else; they start as no change at all.

    Rows of new tokens are averages that nothing but training can tell apart, and an adapter beside a lookup of rank 64
    cannot move each of them on its own. So where the tokenizer moved, embedding and head train in full, unless
    `student.lora_embeddings` says otherwise. Tied, they stay one weight.

    Returns peft's view of the model: `merge_and_unload()` of it gives a plain model.

    Raises ValueError for a target that is not a linear layer of the blocks.
    """
    targets = _targets(lm, student.lora_targets)
    alpha = student.lora_rank if student.lora_alpha is None else student.lora_alpha
    adapted = LoraModel(
        lm, LoraConfig(r=student.lora_rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0), "default"
    )
    if tokenizer_moved if student.lora_embeddings is None else student.lora_embeddings:
        for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            module.requires_grad_(True)
    return adapted


def _targets(lm: Any, wanted: Sequence[str]) -> list[str]:
    """Full names of the linear layers of the blocks whose last name is wanted; of all where none is named."""
    head = lm.get_output_embeddings()
    linear = [
        name for name, module in lm.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    known = {name.rpartition(".")[2] for name in linear}
    unknown = set(wanted) - known
    if unknown:
        raise ValueError(
            f"student.lora_targets names {', '.join(sorted(unknown))}; the linear layers of this model's blocks are "
            f"{', '.join(sorted(known))}"
        )
    return [name for name in linear if not wanted or name.rpartition(".")[2] in wanted]
