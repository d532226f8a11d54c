"""Smaller students: layers removed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.config import StudentConfig
from stage2_student.model.drop_layers import drop_layers

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "head_dim": 8}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
KINDS = ["sliding_attention", "full_attention"] * 3


def make(family: str, **values: Any) -> Any:
    torch.manual_seed(0)
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **values)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**SMALL, sliding_window=2, layer_types=KINDS, rope_local_base_freq=100.0, **values)
        ),
        "qwen3": lambda: Qwen3ForCausalLM(
            Qwen3Config(**SMALL, sliding_window=2, use_sliding_window=True, layer_types=KINDS, **values)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_embd=16, n_layer=6, n_head=2, n_positions=32, initializer_range=0.3)
        ),
    }
    return models[family]().eval()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt2"])
def test_the_kept_layers_work_as_they_did_and_the_folder_loads(family: str, tmp_path: Path) -> None:
    model = make(family)
    smaller = drop_layers(model, [1, 2, 3])
    assert smaller.config.num_hidden_layers == 3
    if family in ("gemma3", "qwen3"):
        assert smaller.config.layer_types == [KINDS[layer] for layer in (0, 4, 5)]
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_BL = torch.tensor([[7, 3, 9, 1, 30, 2, 11]])
    names = ("model.layers", "transformer.h")
    whole, cut = (
        next(dict(m.named_modules())[n] for n in names if n in dict(m.named_modules())) for m in (model, loaded)
    )
    for new, old in enumerate((0, 4, 5)):
        ours, theirs = cut[new].state_dict(), whole[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens_BL).logits, smaller(tokens_BL).logits)
        with_cache = loaded.generate(tokens_BL, max_new_tokens=4, do_sample=False, pad_token_id=0)
        without = loaded.generate(tokens_BL, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(with_cache, without)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


def test_layers_that_are_not_there_and_all_of_them_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names layers outside 0 \.\. 5, which the model has"):
        drop_layers(make("llama"), [2, 6])
    with pytest.raises(ValueError, match="names all 6 layers; leave at least one"):
        drop_layers(make("llama"), range(6))


def test_a_layer_named_twice_or_counted_from_the_end_is_refused_in_the_recipe() -> None:
    assert StudentConfig(model="m", path="p", drop_layers=[5, 1]).drop_layers == (1, 5)
    for layers, named in [([1, 2, 1], r"\[1\]"), ([-1], r"\[-1\]")]:
        with pytest.raises(ValidationError, match=f"{named} are not: name each layer once"):
            StudentConfig(model="m", path="p", drop_layers=layers)


def test_a_model_whose_smaller_form_would_differ_is_refused() -> None:
    model = make("llama")
    model.model.layers[0].register_forward_hook(lambda layer, args, output: output * 2)  # not in any configuration
    with pytest.raises(
        ValueError, match=r"cannot cut it: the model of fewer layers differs .* layers \[3\] are passed over"
    ):
        drop_layers(model, [3])
