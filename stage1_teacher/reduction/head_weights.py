"""Loading of the output head's tensors, and nothing else, from a Hugging Face checkpoint.

Separate from `stage1_teacher.reduction.head` because importing transformers' models takes seconds, which a complete
dump need not spend.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import cached_file

from pipeline.covering.vocabulary import Vocabulary
from pipeline.runtime.model_source import ModelSource
from stage1_teacher.reduction.head import Head


def load_head(
    source: ModelSource,
    dtype: torch.dtype,
    token_bytes: tuple[bytes | None, ...],
    end_ids: tuple[int, ...],
    alone: bool = False,
) -> tuple[Head, Vocabulary]:
    """Read only the head's tensors of a Hugging Face model, tied or not, and sort them.

    What the model does to their products comes from its engine (`Engine.logit_rule`).

    Args:
        source: the model's, resolved.
        dtype: dtype of the returned tensors.
        token_bytes: spelling of each token; None for a token without one.
        end_ids: tokens that mean END.
        alone: see `Head`.
    Raises:
        ValueError: the checkpoint holds no safetensors, or not the tensor of the model's head, or one that is not
            finite.
    """
    config = AutoConfig.from_pretrained(source.source, **source.options)
    names, bias_name, rename = _head_names(config, source.trust_remote_code)
    weight_VD = _tensor(source, names, rename).to(dtype)
    if not bool(torch.isfinite(weight_VD).all()):
        raise ValueError(f"{source.source}: the weights of its head ({names[0]}) are not finite; fetch it again")
    bias_V = _tensor(source, [bias_name], rename) if bias_name else None
    vocabulary = Vocabulary(token_bytes, end_ids, len(weight_VD))
    return Head(weight_VD, bias_V, vocabulary, alone), vocabulary


def _head_names(config: object, trust: bool) -> tuple[list[str], str | None, Callable[[str], str]]:
    """Find how the head's tensors are named.

    Returns:
        The names of the head's weight in the model (several if it is tied), the name of its bias or None, and a
        function from a checkpoint's name of a tensor to the model's.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    head = model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    weights = {id(head.weight)} | ({id(model.get_input_embeddings().weight)} if tied else set())
    named = list(model.named_parameters(remove_duplicate=False))
    bias = getattr(head, "bias", None)
    bias_name = next((name for name, parameter in named if bias is not None and parameter is bias), None)
    # GPT-NeoX's checkpoints name it embed_out, the model lm_head.
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def rename(name: str) -> str:
        return rename_source_key(name, renamings, [])[0]

    return [name for name, parameter in named if id(parameter) in weights], bias_name, rename


def _tensor(source: ModelSource, names: list[str], rename: Callable[[str], str]) -> Tensor:
    """Read the first of `names` that the checkpoint holds, under that name or one that the model renames to it."""
    model, revision = source.source, source.revision
    files = _checkpoint_files(model, revision)
    stored = {rename(name): name for name in files} | {name: name for name in files}
    for name in names:
        if name in stored:
            path = cached_file(model, files[stored[name]], revision=revision)
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor(stored[name])
    raise ValueError(
        f"{model} holds none of the tensors {names}, one of which should be its head; it holds e.g. {sorted(files)[:5]}"
    )


def _checkpoint_files(model: str, revision: str | None) -> dict[str, str]:
    """Return the file of each tensor of the checkpoint."""
    index = cached_file(
        model, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        weight_map: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return weight_map
    single = cached_file(model, "model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise ValueError(
            f"{model} holds no model.safetensors: only safetensors are read. Convert it with save_pretrained."
        )
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")
