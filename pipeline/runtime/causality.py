"""Whether a model's predictions look only at what stands before: of one that looks ahead they are no predictions.

transformers loads encoders and permutation models (BERT, XLNet) as causal language models too, and they attend to what
follows unless their config says otherwise.
"""

from typing import Any

import torch

_TOKENS = 16
# Of the largest logit. Both texts are of one shape, so that little is rounded otherwise: below 1e-4 in float32, also in
# a scan over chunks and where experts are given other tokens. Of 16 bits 2 or 3 digits are left, and a model that is
# worth loading so looks ahead by more.
_MOST_FLOAT32, _MOST = 1e-3, 0.05


@torch.no_grad()
def check_causal(model: Any, name: str) -> None:
    """Raise ValueError where what a model says after some tokens changes with those that follow, as of BERT's encoder.

    Args:
        model: of transformers, loaded, on any device.
        name: what errors call it.
    """
    width = int(model.config.get_text_config().vocab_size)
    half = _TOKENS // 2
    tokens_BL = torch.arange(_TOKENS, device=model.device)[None] % width
    others_BL = tokens_BL.clone()
    others_BL[:, half:] = (tokens_BL[:, half:] + width // 2) % width
    first_LV, second_LV = (
        model(input_ids=ids_BL, use_cache=False).logits[0, :half].float() for ids_BL in (tokens_BL, others_BL)
    )
    apart, largest = float((first_LV - second_LV).abs().max()), float(first_LV.abs().max())
    if apart > (_MOST_FLOAT32 if model.dtype == torch.float32 else _MOST) * largest:
        raise ValueError(
            f"{name}: {type(model).__name__} looks ahead: what it says after {half} tokens changes by up to {apart:.3g} with those "
            f"that follow (its logits: up to {largest:.3g}). It is no causal language model; give one that is, or where its config "
            "has is_decoder, set that to true"
        )
