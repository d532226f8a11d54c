"""LoRA: low-rank adapters trained beside frozen linear layers, and merged into them at export.

Source: Hu et al. 2021, arXiv:2106.09685; the adapters are peft's.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig, LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.config import StudentConfig

_OUT_PROJ = "out_proj"
# Their kernels use the weight of `out_proj` directly, bypassing an adapter.
_FUSED = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def add_adapters(lm: Any, student: StudentConfig, tokenizer_moved: bool, by_peft: bool = False) -> LoraModel:
    """Put adapters beside linear layers of `lm`, in place, and freeze everything else; at first they change nothing.

    The rows of new tokens are averages that only training can tell apart, and an adapter of rank 64 beside a lookup
    cannot move each of them on its own. So if the tokenizer moved, embedding and head train in full, unless
    `student.lora_embeddings` says otherwise. Tied weights stay tied.

    Args:
        by_peft: peft translates the names, as in runs of earlier releases (`stage2_student.runs.folder`). It takes
            names that end like an expert's layer in transformers 4 for such layers, and puts adapters beside the
            experts' weights instead of the shared expert's and of dense layers'.
    Returns:
        peft's view of the model; its `merge_and_unload()` gives a plain model.
    Raises:
        ValueError: a target is neither a linear layer of the blocks nor their experts' weights.
    """
    linear, experts = _targets(lm, student.lora_targets, by_peft)
    if not by_peft:
        _check_not_shared(lm, linear)
    alpha = student.lora_rank if student.lora_alpha is None else student.lora_alpha
    config = LoraConfig(
        r=student.lora_rank,
        lora_alpha=alpha,
        target_modules=linear,
        target_parameters=experts or None,
        lora_dropout=0.0,
    )
    with contextlib.nullcontext() if by_peft else _names_as_they_are(lm):
        adapted = LoraModel(lm, config, "default")
    if tokenizer_moved if student.lora_embeddings is None else student.lora_embeddings:
        for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            module.requires_grad_(True)
    return adapted


def expert_weights(lm: Any) -> dict[str, str]:
    """Return full name -> short name (`experts.down_proj`) of the weights that hold all experts of a layer.

    A mixture keeps them as one parameter, (experts, out, in) or transposed, which is no linear layer.
    """
    return {
        f"{name}.{own}": f"{name.rpartition('.')[2]}.{own}"
        for name, module in lm.named_modules()
        # Other modules have weights with three axes too: the gates of RecurrentGemma, the mixes of RWKV.
        if "expert" in f"{name} {type(module).__name__}".lower() and not type(module).__module__.startswith("torch.nn")
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }


def router_weights(lm: Any) -> dict[str, str]:
    """Return full name -> short name of the weights that choose the experts, (experts, in).

    Only those that are not linear layers either.
    """
    counts = {lm.get_parameter(name).shape[0] for name in expert_weights(lm)}
    return {
        f"{name}.{own}": f"{name.rpartition('.')[2]}.{own}"
        for name, module in lm.named_modules()
        if not (type(module).__module__.startswith("torch.nn") or _is_linear(module))
        for own, weight in module.named_parameters(recurse=False)
        if own == "weight" and weight.ndim == 2 and weight.shape[0] in counts
    }


def mixture_remarks(lm: Any, student: StudentConfig, by_peft: bool = False) -> Iterator[str]:
    """Yield a sentence for each part of a mixture of experts that does not learn; none for other models.

    Args:
        lm: the model, before adapters are added.
    """
    short = sorted(set(expert_weights(lm).values()))
    left = [name for name in short if name not in student.lora_targets]
    routers = sorted(set(router_weights(lm).values()))
    if student.lora_rank and short and by_peft:
        yield (
            "this run continues with the adapters that it began with: in some families (DeepSeek, GLM-4.5, Qwen3-Next) "
            "they are beside the experts' weights instead of the shared expert's and of dense layers'; with a new "
            "student.path they are where student.lora_targets says"
        )
    elif student.lora_rank and left:
        yield (
            f"the experts get no adapters for {', '.join(left)}, and learn nothing there; to adapt them, name them in "
            "student.lora_targets beside the linear layers"
            + (f". The router does not learn either ({', '.join(routers)})" if routers else "")
        )
    balance = getattr(lm.config.get_text_config(), "router_aux_loss_coef", None)
    if balance:
        yield (
            f"the router's auxiliary loss (router_aux_loss_coef {balance:g}), which balances the experts, is not part "
            "of the objectives"
        )


def _is_linear(module: nn.Module) -> bool:
    """Return whether it is a linear layer that returns its weight's product with the input.

    A router that is one in name returns more.
    """
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _check_not_shared(lm: Any, linear: Sequence[str]) -> None:
    """Check that no two of the layers share a weight (Zamba).

    Raises:
        ValueError: two do; each would get its own adapter, but an export holds only one weight.
    """
    first_by_weight: dict[int, str] = {}
    for name in linear:
        first = first_by_weight.setdefault(id(lm.get_submodule(name).weight), name)
        if first != name:
            raise ValueError(
                f"{lm.config.model_type}: {first} and {name} share one weight, but each would get its own adapter, and "
                f"an export holds only one weight; leave {name.rpartition('.')[2]} and the others of that block out of "
                "student.lora_targets, or set student.lora_rank=0"
            )


@contextlib.contextmanager
def _names_as_they_are(lm: Any) -> Iterator[None]:
    """Keep peft from translating targets by the model's type, by hiding the type."""
    config = lm.config
    lm.config = config.to_dict()
    try:
        yield
    finally:
        lm.config = config


def _targets(lm: Any, targets: Sequence[str], by_peft: bool) -> tuple[list[str], list[str]]:
    """Return the full names of the linear layers of the blocks with these last names, and of the experts' weights.

    If no name is given, all linear layers, and no experts' weights.
    """
    head, kind = lm.get_output_embeddings(), lm.config.model_type
    linear = [
        name
        for name, module in lm.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) if by_peft else _is_linear(module)) and module is not head
    ]
    if kind in _FUSED and not by_peft:
        linear = [name for name in linear if name.rpartition(".")[2] != _OUT_PROJ]
    experts = expert_weights(lm)
    known = {name.rpartition(".")[2] for name in linear} | set(experts.values())
    unknown = set(targets) - known
    if unknown:
        raise ValueError(
            f"student.lora_targets names {', '.join(sorted(unknown))}; the layers of this model's blocks that can have "
            f"adapters are {', '.join(sorted(known))}"
        )
    layers = [name for name in linear if not targets or name.rpartition(".")[2] in targets]
    return layers, [name for name, short in experts.items() if short in targets]
