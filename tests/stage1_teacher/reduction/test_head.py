"""The head of a checkpoint, with the model's logit rule, against the model's own logits.

Heads of many kinds.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.runtime.model_source import ModelSource
from stage1_teacher.engines.model_head import head_inputs, logit_rule, own_logprobs
from stage1_teacher.reduction.head_weights import load_head
from stage1_teacher.reduction.logit_rule import LogitRule, fit_rule, probe_products

TOKENS: tuple[bytes | None, ...] = (b"b", b"a", None, b"ab", b"\xff", b"a", b"c", b"ba")
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS) + 3,  # padding rows
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_head": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "under another name in the checkpoint": ("gpt_neox", {"tie_word_embeddings": False}),
    "with a bias": ("phi", {"tie_word_embeddings": False}),
    "divided by logits_scaling": ("granite", {"logits_scaling": 8.0}),
    "multiplied by logits_scaling": ("hyperclovax", {"logits_scaling": 0.3, **GROUPED}),
    "multiplied by logit_scale": ("cohere", {"logit_scale": 0.25}),
    "multiplied by lm_head_multiplier": ("falcon_h1", {"lm_head_multiplier": 0.0195, **MAMBA, **GROUPED}),
    "hidden states divided before the head": (
        "minicpm3",
        {
            "dim_model_base": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 2,
        },
    ),
    "soft-capped": ("gemma2", {"final_logit_softcapping": 1.5, **GROUPED}),
    "soft-capped by another key": (
        "recurrent_gemma",
        {"logits_soft_cap": 1.5, "lru_width": 16, "attention_window_size": 8, "num_key_value_heads": 1},
    ),
    "soft-capped by a third key": (
        "xlstm",
        {
            "output_logit_soft_cap": 1.5,
            "num_heads": 2,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
        },
    ),
    "projected before the head": ("opt", {"word_embed_proj_dim": 8, "ffn_dim": 24}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_models_own_in_sorted_columns(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family, values = CASES[name]
    config: PreTrainedConfig = CONFIG_MAPPING[family](**(SIZES | values))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    head, vocabulary = load_head(ModelSource(str(tmp_path)), torch.float32, TOKENS, (2,))
    rule = logit_rule(model)
    head.follow(rule)
    ids = torch.tensor([[1, 5, 0, 7, 3]])
    with torch.inference_mode():
        hidden_RD = head_inputs(model, input_ids=ids, use_cache=False)[0]
        expected_RV = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(own_logprobs(model, ids)[0], expected_RV.log_softmax(-1))
    assert head.weight_CD.shape[0] == len(TOKENS) + 3
    torch.testing.assert_close(head.logits(hidden_RD), expected_RV[:, vocabulary.order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [LogitRule(), LogitRule(1 / 3), LogitRule(0.0195), LogitRule(1.0, 30.0), LogitRule(2.5, 7.5, (0, 11))]
)
def test_a_rule_is_found_to_the_last_digit_in_what_it_makes_of_numbers(rule: LogitRule) -> None:
    products = probe_products(300)
    logits = products * np.float32(rule.scale)
    if rule.soft_cap:
        logits = np.tanh(logits / np.float32(rule.soft_cap)) * np.float32(rule.soft_cap)
    logits[:, list(rule.suppressed)] = -np.inf
    assert fit_rule(products, logits, "Model") == rule


def test_logits_that_no_rule_gives_are_refused_by_the_models_name() -> None:
    products = probe_products(300)
    norms = np.sqrt((products**2).mean(axis=1, keepdims=True))
    for logits in (products / norms, np.maximum(products, 0), products + 1, -products):
        with pytest.raises(ValueError, match="OddForCausalLM does more to its logits than a factor"):
            fit_rule(products, logits, "OddForCausalLM")
