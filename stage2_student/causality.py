"""Whether a model's predictions look only at what stands before: of one that looks ahead bits per byte mean nothing."""

from typing import Any

import torch

_TOKENS = 16
_MOST = 1e-3  # of the largest logit: rounding in float32 is below 1e-4 of it, also in a scan over chunks


@torch.no_grad()
def check_causal(model: Any, name: str) -> None:
    """Raise ValueError where what a model says after some tokens changes with those that follow, as of BERT's encoder.

    Args:
        model: loaded, in float32.
        name: what errors call it.
    """
    tokens_BL = torch.arange(_TOKENS, device=model.device)[None] % int(model.config.get_text_config().vocab_size)
    half = _TOKENS // 2
    whole_LV, part_LV = (
        model(input_ids=ids_BL, use_cache=False).logits[0, :half].float() for ids_BL in (tokens_BL, tokens_BL[:, :half])
    )
    apart, largest = float((whole_LV - part_LV).abs().max()), float(part_LV.abs().max())
    if apart > _MOST * largest:
        raise ValueError(
            f"{name}: {type(model).__name__} looks ahead: what it says after {half} tokens changes by up to {apart:.3g} with those "
            f"that follow (its logits: up to {largest:.3g}). It is no causal language model; give one that is, or where its config "
            "has is_decoder, set that to true"
        )
