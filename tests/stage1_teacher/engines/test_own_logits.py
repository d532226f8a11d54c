"""A model's own logits in two halves against one ordinary forward pass, for heads of many kinds."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stage1_teacher.engines.own_logits import OwnLogits

SIZES: dict[str, Any] = {
    "vocab_size": 11,
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


def random_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    family, values = CASES[name]
    config: PreTrainedConfig = CONFIG_MAPPING[family](**(SIZES | values))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def in_chunks(own: OwnLogits, ids_BT: torch.Tensor, size: int) -> torch.Tensor:
    states_RD = own.states(input_ids=ids_BT, use_cache=False).flatten(0, 1)
    return torch.cat([own.logits(part).float().clone() for part in states_RD.split(size)])


@pytest.mark.parametrize("name", CASES)
def test_logits_of_chunks_of_rows_are_those_of_the_whole_model(name: str) -> None:
    model = random_model(name)
    ids_BT = torch.tensor([[1, 5, 0, 7, 3], [2, 2, 9, 4, 8]])
    with torch.inference_mode():
        whole_RV = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1).clone()
    own = OwnLogits(model)
    assert own.is_split
    torch.testing.assert_close(in_chunks(own, ids_BT, 3), whole_RV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.whole_logits(ids_BT).flatten(0, 1), whole_RV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "soft-capped", "divided by logits_scaling", "projected before the head"])
def test_logits_of_a_model_in_bfloat16_are_not_rounded_to_it(name: str) -> None:
    own = OwnLogits(random_model(name, torch.bfloat16))
    found_RV = in_chunks(own, torch.tensor([[1, 5, 0, 7, 3]]), 2)
    assert found_RV.dtype == torch.float32 and not torch.equal(found_RV, found_RV.bfloat16().float())


class EighthsHead(torch.nn.Linear):
    """A quantized head, as libraries make them: a linear layer whose weights are counts of a unit of its own."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.weight.to(states.dtype) / 8).T


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_head_that_is_not_a_plain_linear_layer_computes_its_logits_itself(dtype: torch.dtype) -> None:
    model = random_model("untied", torch.bfloat16)
    head = EighthsHead(16, 11, bias=False)
    counts_VD = torch.randint(-64, 64, (11, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    head.weight = torch.nn.Parameter(counts_VD, requires_grad=False)
    model.set_output_embeddings(head)
    ids_BT = torch.tensor([[1, 5, 0, 7, 3]])
    with torch.inference_mode():
        whole_RV = model(input_ids=ids_BT, use_cache=False).logits[0].float()
        own = OwnLogits(model)
        torch.testing.assert_close(own.whole_logits(ids_BT)[0].float(), whole_RV)
    torch.testing.assert_close(in_chunks(own, ids_BT, 5), whole_RV)


def test_a_model_whose_trunk_cannot_be_replaced_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("tied")
    usual = type(model).forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        """Add to each logit what depends on the ids, which the second half does not know."""
        output = usual(self, *arguments, **named)
        output.logits = output.logits + named["input_ids"][..., None]
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    ids_BT = torch.tensor([[1, 5, 0, 7, 3]])
    own = OwnLogits(model)
    assert not own.is_split
    with torch.inference_mode():
        torch.testing.assert_close(in_chunks(own, ids_BT, 2), model(input_ids=ids_BT, use_cache=False).logits[0])
