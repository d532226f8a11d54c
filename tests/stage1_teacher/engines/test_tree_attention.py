"""Branches in one packed forward against each path alone, for several kinds of attention."""

import random
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    NemotronConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from stage1_teacher.engines.base import BranchToken
from stage1_teacher.engines.own_logits import OwnLogits
from stage1_teacher.engines.tree_attention import Tree

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # attention far from uniform
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama, grouped queries": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3, normed queries": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma2, soft-capped scores and a sliding window": Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0
    ),
    "gemma3, a sliding window": Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8, sliding_window=4),
    "gpt-neox, partial rotation": GPTNeoXConfig(**SIZES),
    "gpt-oss, sinks and a sliding window": GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
    ),
    "deepseek-v3, values narrower than keys": DeepseekV3Config(
        **SIZES, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6,
        first_k_dense_replace=2,
    ),
}  # fmt: skip
UNKNOWN: dict[str, tuple[PreTrainedConfig, str]] = {
    "convolutions": (
        Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
        "Lfm2ForCausalLM has layers that are not attention",
    ),
    "two attentions a layer": (DiffLlamaConfig(**SIZES), "one of its layers attends twice"),
    "a mask of its own": (DogeConfig(**SIZES), "DogeAttention passes attention_mask to its attention"),
    "keyword arguments kept": (
        NemotronConfig(**SIZES, num_key_value_heads=2),
        "does not pass keyword arguments to its NemotronAttention",
    ),
}  # fmt: skip


def whole_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    # eager: what defines a model (others leave out Gemma 2's soft cap), though with a softmax in float32
    dtype = torch.float32 if config.model_type == "gpt_oss" else torch.float64  # its experts do not multiply in float64
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def alone(model: PreTrainedModel, path: list[int]) -> torch.Tensor:
    states_TD: torch.Tensor = model.base_model(input_ids=torch.tensor([path]), use_cache=False).last_hidden_state[0]
    return states_TD


@pytest.mark.parametrize("name", CONFIGS)
def test_each_branch_token_is_as_if_its_path_ran_alone(name: str) -> None:
    model, rng = whole_model(CONFIGS[name]), random.Random(name)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in (13, 1, 8)]
    tree = Tree(OwnLogits(model), prompts)
    for prompt, states_TD in zip(prompts, tree.states, strict=True):
        torch.testing.assert_close(states_TD, alone(model, prompt), rtol=0, atol=1e-5)
    paths: list[list[int]] = []
    owners: list[int] = []
    for size in (5, 1, 7):
        tokens = []
        for _ in range(size):
            token = rng.randrange(VOCABULARY)
            if owners and rng.random() < 0.6:
                parent = rng.randrange(len(owners) - len(tokens)) if len(owners) > len(tokens) else None
            else:
                parent = None
            prompt = rng.randrange(len(prompts)) if parent is None else owners[parent]
            leaves = rng.randint(1, len(prompts[prompt]))
            tokens.append(BranchToken(prompt, leaves, token, parent))
            paths.append([*(prompts[prompt][:leaves] if parent is None else paths[parent]), token])
            owners.append(prompt)
        for state_D, path in zip(tree.extend(tokens), paths[-size:], strict=True):
            torch.testing.assert_close(state_D, alone(model, path)[-1], rtol=0, atol=1e-5)
    assert tree.num_tokens == sum(map(len, prompts)) + len(paths)


def test_the_model_is_left_with_the_attention_that_it_had() -> None:
    model = whole_model(CONFIGS["llama, grouped queries"])
    usual = model.config._attn_implementation
    Tree(OwnLogits(model), [[1, 2, 3]])
    assert model.config._attn_implementation == usual


def test_a_model_with_an_attention_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole_model(CONFIGS["llama, grouped queries"])
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(ValueError, match="attention of its own, which cannot branch"):
        Tree(OwnLogits(model), [[1]])


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_model_whose_layers_do_more_than_attend_to_a_path_is_refused(what: str) -> None:
    config, why = UNKNOWN[what]
    with pytest.raises(ValueError, match=why):
        Tree(OwnLogits(whole_model(config)), [[1, 2, 3], [4, 5]])


def test_room_that_no_key_was_written_to_is_never_read() -> None:
    """Its memory may hold anything: a share of 0 times nan is nan."""
    model = whole_model(CONFIGS["llama, grouped queries"])
    tree = Tree(OwnLogits(model), [[1, 2, 3]])
    tree.extend([BranchToken(0, 2, 7, None)])
    with torch.inference_mode():
        for layer in tree._layers.values():
            layer.keys_NKE[1:] = layer.values_NKE[1:] = torch.nan
    deep_D, short_D = tree.extend([BranchToken(0, 2, 8, parent=0), BranchToken(0, 3, 9, None)])
    torch.testing.assert_close(deep_D, alone(model, [1, 2, 7, 8])[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(short_D, alone(model, [1, 2, 3, 9])[-1], rtol=0, atol=1e-5)
