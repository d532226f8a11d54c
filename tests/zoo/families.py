"""The families: every architecture that transformers builds as a causal language model and that fits, a row each.

A row says what the family's tiny configuration changes of the common sizes.
"""

from typing import Any

POSITIONS = 256

# Under all names that configurations have for them; a configuration is given those that it has.
COMMON: dict[str, Any] = {
    # Training draws dropout anew for each step; what it says is compared with the model's own figures.
    **dict.fromkeys(
        ("dropout", "attention_dropout", "residual_dropout", "hidden_dropout", "activation_dropout", "layerdrop"), 0.0
    ),
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
    ),
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
OWN = None  # a key with this value is left as the configuration has it
_MLA: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 2}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "layer_types": OWN,
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
    "falcon_mamba": {"layer_types": OWN, "state_size": 8},
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
        "layer_types": OWN, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False,
    },
    "jais2": {},
    "jetmoe": {},
    "kimi_linear": {**_MLA, "linear_num_heads": 2, "linear_head_dim": 16},
    "lfm2": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {},
    "longcat_flash": _MLA,
    "mamba": {"layer_types": OWN, "state_size": 8},
    "mamba2": {
        "layer_types": OWN, "state_size": 16, "n_groups": 1, "chunk_size": 16, "num_heads": 8, "head_dim": 16,
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
        "mamba_d_state": 8, "mamba_dt_rank": 8, "num_hidden_layers": 4, "layer_types": OWN,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "kv_channels": 16,
        "adapter_rank": 8, "n_mamba_heads": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_query_groups": 4, "layer_types": OWN,
        "mamba_d_state": 8, "mamba_headdim": 32, "mamba_ngroups": 1, "chunk_size": 16,
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Checkpoints of families that only vLLM has are written as those of another, under the architecture's name.
OF_VLLM_ALONE = {"mimo": ("qwen2", "MiMoForCausalLM")}
