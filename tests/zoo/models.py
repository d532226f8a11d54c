"""Tiny random models of every architecture that transformers can build: one row each, what a row changes of the common sizes.

Weights are made so that mistakes show: logits are spread wide (a standard deviation of `SPREAD`), whatever the family multiplies them by or
caps them at, and no bias or gain is what a fresh model has it at.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SPREAD = 3.0
MOST_PARAMETERS = 30_000_000
POSITIONS = 256

# Under all names that configurations have for them; a configuration is given those that it has.
_COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), 1),
    "head_dim": 32,  # the smallest that vLLM's CPU kernels take
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 48),
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_OWN = None  # a key with this value is left as the configuration has it
_MLA: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 2}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "layer_types": _OWN,
}

# By model_type; what differs from the common sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "bert": {},  # reads what follows: not a causal model
    "bitnet": {},
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8, "n_ctx": POSITIONS, "n_head": 4, "num_attention_heads": 4},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "cwm": {},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128, "lm_head_multiplier": 0.0390625},
    "falcon_mamba": {"layer_types": _OWN, "state_size": 8},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 4.0},
    "gemma3_text": {},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0], "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 4.0,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {**_MAMBA2, "logits_scaling": 8.0, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"logits_scaling": 4.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hyperclovax": {"logits_scaling": 0.125},
    "jamba": {
        "layer_types": _OWN, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False,
    },
    "jais2": {},
    "jetmoe": {},
    "kimi_linear": _MLA,
    "lfm2": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {},
    "longcat_flash": _MLA,
    "mamba": {"layer_types": _OWN, "state_size": 8},
    "mamba2": {
        "layer_types": _OWN, "state_size": 16, "n_groups": 1, "chunk_size": 16, "num_heads": 8, "head_dim": 16,
    },
    "mimo_v2_flash": {},
    "minicpm3": {**_MLA, "dim_model_base": 16},
    "minimax": {},
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {"pad_token_id": 0},
    "mpt": {},
    "nanochat": {"final_logit_softcapping": 4.0},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "recurrent_gemma": {"logits_soft_cap": 4.0, "lru_width": 64, "attention_window_size": 64},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"final_logit_softcapping": 4.0},
    "xglm": {},
    "xlnet": {},  # as bert
    "xlstm": {"output_logit_soft_cap": 4.0, "num_heads": 4, "embedding_dim": 64},
    "youtu": _MLA,
    "zamba": {
        "attention_hidden_size": 128, "attention_head_dim": 64, "num_key_value_heads": 2, "use_mamba_kernels": False,
        "mamba_d_state": 8, "mamba_dt_rank": 8, "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "layer_types": _OWN,
    },
    "zamba2": {
        "attention_hidden_size": 128, "attention_head_dim": 64, "kv_channels": 32, "adapter_rank": 8, "n_mamba_heads": 4,
        "mamba_d_state": 8, "mamba_headdim": 32, "mamba_ngroups": 1, "chunk_size": 16, "num_query_groups": 4,
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4, "layer_types": _OWN,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Checkpoints of families that only vLLM has are written as those of another, under the architecture's name.
OF_VLLM_ALONE = {"mimo": ("qwen2", "MiMoForCausalLM")}


def architecture(family: str) -> str:
    """The class that a family's checkpoints name."""
    if family in OF_VLLM_ALONE:
        return OF_VLLM_ALONE[family][1]
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return found if isinstance(found, str) else str(found[0])


def tiny_config(family: str, vocab_size: int, **values: Any) -> PreTrainedConfig:
    """The configuration of a family at the common sizes.

    Raises whatever transformers does for a configuration that it does not take.
    """
    kind = CONFIG_MAPPING[OF_VLLM_ALONE.get(family, (family,))[0]]
    fresh = kind()
    known = {*fresh.to_dict(), *getattr(kind, "attribute_map", {})}
    wanted = {key: value for key, value in _COMMON.items() if key in known and hasattr(fresh, key)}
    kinds = getattr(fresh, "layer_types", None)
    if kinds:
        wanted["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
        wanted["num_hidden_layers"] = len(wanted["layer_types"])
    own = FAMILIES.get(family, {}) | values
    wanted = {key: value for key, value in (wanted | own).items() if own.get(key, "") is not _OWN}
    return kind(**{"pad_token_id": None, **wanted}, vocab_size=vocab_size)


def tiny_model(family: str, vocab_size: int, seed: int = 0, **values: Any) -> Any:
    """A model of a family with random weights, float32, ready to be asked. ValueError for one that is not tiny."""
    config = tiny_config(family, vocab_size, **values)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
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
