"""Tiny random models of the families.

Weights are made so that mistakes show: logits are spread wide (a standard deviation of `SPREAD`), whatever the family
multiplies them by or caps them at, and no bias or gain is what a fresh model has it at.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.zoo.families import COMMON, FAMILIES, OF_VLLM_ALONE, OWN

SPREAD = 3.0
MAX_PARAMETERS = 30_000_000


def architecture(family: str) -> str:
    """Return the class that a family's checkpoints name."""
    if family in OF_VLLM_ALONE:
        return OF_VLLM_ALONE[family][1]
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return found if isinstance(found, str) else str(found[0])


def tiny_config(family: str, vocab_size: int, **values: Any) -> PreTrainedConfig:
    """Return the configuration of a family at the common sizes.

    Raises whatever transformers does for a configuration that it does not take.
    """
    kind = CONFIG_MAPPING[OF_VLLM_ALONE.get(family, (family,))[0]]
    fresh = kind()
    known = {*fresh.to_dict(), *getattr(kind, "attribute_map", {})}
    wanted = {key: value for key, value in COMMON.items() if key in known and hasattr(fresh, key)}
    kinds = getattr(fresh, "layer_types", None)
    if kinds:
        wanted["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
        wanted["num_hidden_layers"] = len(wanted["layer_types"])
    own = FAMILIES.get(family, {}) | values
    wanted = {key: value for key, value in (wanted | own).items() if own.get(key, "") is not OWN}
    return kind(**{"pad_token_id": None, **wanted}, vocab_size=vocab_size)


def tiny_model(family: str, vocab_size: int, seed: int = 0, **values: Any) -> Any:
    """Make a model of a family with random weights, float32, in evaluation mode.

    Raises ValueError for one that is not tiny.
    """
    config = tiny_config(family, vocab_size, **values)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{family}: {size:,} parameters")
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    _make_mistakes_show(model, vocab_size, seed)
    return model


def save_tiny(
    folder: Path, family: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0, padding: int = 0, **values: Any
) -> Path:
    """Write a family's model with a tokenizer to `folder`, as `save_pretrained` does.

    Args:
        padding: rows of the head beyond the tokenizer's tokens.
    """
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(family, len(tokenizer) + padding, seed, **ends, **values)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family in OF_VLLM_ALONE:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = [architecture(family)]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@torch.no_grad()
def _make_mistakes_show(model: Any, vocab_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tokens_BL = torch.randint(0, vocab_size, (1, 24), generator=generator)
    head = model.get_output_embeddings()
    for _ in range(12):  # a tied head changes the states too
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
        deviation = float((logits_BLV - logits_BLV.mean(-1, keepdim=True)).std())
        if abs(deviation / SPREAD - 1) < 0.1:
            break
        head.weight *= min(SPREAD / max(deviation, 1e-6), 30.0)
