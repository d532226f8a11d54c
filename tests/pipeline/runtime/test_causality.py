"""Models that look ahead are recognised by their predictions."""

import pytest
import torch

from pipeline.runtime.causality import check_causal
from tests.zoo.models import tiny_model


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_a_model_that_looks_ahead_is_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=r"some/model: .* looks ahead.*give one that is"):
        check_causal(tiny_model(family, 300), "some/model")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mamba", "recurrent_gemma", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_model_is_not(family: str, dtype: torch.dtype) -> None:
    check_causal(tiny_model(family, 300).to(dtype), "some/model")


def test_a_decoder_made_of_an_encoder_is_not() -> None:
    check_causal(tiny_model("bert", 300, is_decoder=True), "some/model")
