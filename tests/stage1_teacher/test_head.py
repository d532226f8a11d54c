"""The head read from a checkpoint against the model's own logits, for heads of several kinds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from stage1_teacher.head_weights import load_head

TOKENS: tuple[bytes | None, ...] = (b"b", b"a", None, b"ab", b"\xff", b"a", b"c", b"ba")
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS) + 3,  # padding rows
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gpt-neox, under another name in the checkpoint": GPTNeoXConfig(**SIZES, tie_word_embeddings=False),
    "granite, logits divided by logits_scaling": GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere, logits multiplied by logit_scale": CohereConfig(**SIZES, logit_scale=0.25),
    "gemma2, soft-capped": Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=1, final_logit_softcapping=1.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own_in_sorted_columns(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    head, vocabulary = load_head(str(tmp_path), None, torch.float32, TOKENS, (2,), False)
    ids = torch.tensor([[1, 5, 0, 7, 3]])
    with torch.inference_mode():
        hidden_RD = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected_RV = model(input_ids=ids, use_cache=False).logits[0]
    assert head.weight_CD.shape[0] == len(TOKENS) + 3
    torch.testing.assert_close(head.logits(hidden_RD), expected_RV[:, vocabulary.order], rtol=1e-5, atol=1e-5)
