"""LoRA: low-rank adapters that train beside frozen linear layers, and are merged into them at export.

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
_FUSED = (
    "falcon_h1",
    "falcon_mamba",
    "mamba",
    "mamba2",
    "nemotron_h",
)  # their kernels take its weight itself, past an adapter


def add_adapters(lm: Any, student: StudentConfig, tokenizer_moved: bool, by_peft: bool = False) -> LoraModel:
    """Put adapters beside linear layers of `lm`, in place, and freeze all else; they start as no change at all.

    Rows of new tokens are averages that nothing but training can tell apart, and an adapter beside a lookup of rank 64
    cannot move each of them on its own. So where the tokenizer moved, embedding and head train in full, unless
    `student.lora_embeddings` says otherwise. Tied, they stay one weight.

    Args:
        by_peft: names are translated by peft, as in runs of earlier releases (`stage2_student.runs.folder`). It takes
            them for those of transformers 4 where they end like that of an expert's layer then: adapters beside the
            experts' weights in place of the shared expert's and of dense layers'.

    Returns peft's view of the model: `merge_and_unload()` of it gives a plain model.

    Raises ValueError for a target that is not a linear layer of the blocks, nor its experts' weights.
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
    """Full name -> short name (`experts.down_proj`) of the weights that hold those of all experts of a layer, (experts,
    out, in) or turned: a mixture keeps them as one parameter, which is no linear layer.
    """
    return {
        f"{name}.{own}": f"{name.rpartition('.')[2]}.{own}"
        for name, module in lm.named_modules()
        # Weights of three axes have others too: the gates of RecurrentGemma, the mixes of RWKV.
        if "expert" in f"{name} {type(module).__name__}".lower() and not type(module).__module__.startswith("torch.nn")
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }


def router_weights(lm: Any) -> dict[str, str]:
    """As `expert_weights`, of what chooses the experts, (experts, in): where it is no linear layer either."""
    counts = {lm.get_parameter(name).shape[0] for name in expert_weights(lm)}
    return {
        f"{name}.{own}": f"{name.rpartition('.')[2]}.{own}"
        for name, module in lm.named_modules()
        if not (type(module).__module__.startswith("torch.nn") or _is_linear(module))
        for own, weight in module.named_parameters(recurse=False)
        if own == "weight" and weight.ndim == 2 and weight.shape[0] in counts
    }


def mixture_remarks(lm: Any, student: StudentConfig, by_peft: bool = False) -> Iterator[str]:
    """What a mixture of experts does not learn by, a sentence each; nothing for other models. `lm` has no adapters
    yet.
    """
    short = sorted(set(expert_weights(lm).values()))
    left = [name for name in short if name not in student.lora_targets]
    routers = sorted(set(router_weights(lm).values()))
    if student.lora_rank and short and by_peft:
        yield (
            "this run goes on with the adapters that it began with: in some families (DeepSeek, GLM-4.5, Qwen3-Next) beside the experts' weights in "
            "place of the shared expert's and of dense layers'; under a new student.path they are where student.lora_targets has them"
        )
    elif student.lora_rank and left:
        yield (
            f"the experts get no adapters for {', '.join(left)}, and learn nothing there; to adapt them, name them in "
            "student.lora_targets beside the linear layers"
            + (f". Nor does what chooses among them learn ({', '.join(routers)})" if routers else "")
        )
    balance = getattr(lm.config.get_text_config(), "router_aux_loss_coef", None)
    if balance:
        yield (
            f"the router's auxiliary loss (router_aux_loss_coef {balance:g}), which keeps the experts in balance, is not part of the "
            "objectives"
        )


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer that gives what its weight makes of its input: a router that is one in name gives
    more.
    """
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _check_not_shared(lm: Any, linear: Sequence[str]) -> None:
    """Raise ValueError where two of the layers have one weight (Zamba): each would get its own adapter, and an export
    holds but one weight.
    """
    seen: dict[int, str] = {}
    for name in linear:
        first = seen.setdefault(id(lm.get_submodule(name).weight), name)
        if first != name:
            raise ValueError(
                f"{lm.config.model_type}: {first} and {name} are one weight, which adapters would part, and an export holds but one; leave "
                f"{name.rpartition('.')[2]} and the others of that block out of student.lora_targets, or set student.lora_rank=0"
            )


@contextlib.contextmanager
def _names_as_they_are(lm: Any) -> Iterator[None]:
    """peft translates targets by the model's type, which it does not find here."""
    config = lm.config
    lm.config = config.to_dict()
    try:
        yield
    finally:
        lm.config = config


def _targets(lm: Any, wanted: Sequence[str], by_peft: bool) -> tuple[list[str], list[str]]:
    """Full names of the linear layers of the blocks whose last name is wanted, of all where none is named; and of the
    experts' weights that are named.
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
    unknown = set(wanted) - known
    if unknown:
        raise ValueError(
            f"student.lora_targets names {', '.join(sorted(unknown))}; the linear layers of this model's blocks that can have adapters are "
            f"{', '.join(sorted(known))}"
        )
    chosen = [name for name in linear if not wanted or name.rpartition(".")[2] in wanted]
    return chosen, [name for name, short in experts.items() if short in wanted]
