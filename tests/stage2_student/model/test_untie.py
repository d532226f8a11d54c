"""Heads of their own: the same model, also when it is saved and loaded, trained with adapters, or cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stage2_student.model.untie import ALWAYS_TIED, is_tied, untie
from tests.zoo.models import tiny_model

TOKENS_BL = torch.tensor([[3, 1, 4, 1, 5, 9]])


def tied(family: str) -> Any:
    """Make a model whose head is its embedding."""
    model = tiny_model(family, 40, tie_word_embeddings=True).eval()
    assert is_tied(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3", "granite", "opt"])
@torch.no_grad()
def test_an_untied_model_is_the_same_until_its_head_changes_and_is_read_back_untied(
    family: str, tmp_path: Path
) -> None:
    model = tied(family)
    before_BLV = model(TOKENS_BL, use_cache=False).logits
    untie(model)
    assert not is_tied(model)
    assert torch.equal(model(TOKENS_BL, use_cache=False).logits, before_BLV)
    model.resize_token_embeddings(44, mean_resizing=False)
    model.tie_weights()
    model.get_output_embeddings().weight[7] += 1
    after_BLV = model(TOKENS_BL, use_cache=False).logits
    assert not torch.equal(after_BLV[..., 7], before_BLV[..., 7])
    torch.testing.assert_close(after_BLV[..., :7], before_BLV[..., :7])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not is_tied(loaded) and not loaded.config.get_text_config().tie_word_embeddings
    torch.testing.assert_close(loaded(TOKENS_BL, use_cache=False).logits, after_BLV)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_family_that_engines_read_as_tied_is_refused_with_the_way_out(family: str) -> None:
    assert family in ALWAYS_TIED
    with pytest.raises(ValueError, match=rf"type {family} cannot have a head of its own.*student\.transfer\.tie=keep"):
        untie(tied(family))


def test_a_model_with_a_head_of_its_own_stays_as_it_is() -> None:
    model = tiny_model("llama", 40, tie_word_embeddings=False)
    head = model.get_output_embeddings().weight
    untie(model)
    assert model.get_output_embeddings().weight is head
