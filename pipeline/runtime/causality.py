"""Check that a model predicts each token from earlier tokens only.

transformers also loads encoders and permutation models (BERT, XLNet) as causal language models, and these attend to
later tokens unless their config says otherwise.
"""

from typing import Any

import torch

_TOKENS = 16
# As a share of the largest logit. Both texts have one shape, so rounding differs little: below 1e-4 in float32, even in
# a chunked scan or where experts receive other tokens. 16-bit dtypes keep 2 or 3 digits, and a model that does look
# ahead changes by more than that.
_MAX_CHANGE_FLOAT32, _MAX_CHANGE = 1e-3, 0.05


@torch.no_grad()
def check_causal(model: Any, name: str) -> None:
    """Raise ValueError if a model's predictions change with the tokens that follow, as those of BERT's encoder do.

    Args:
        model: a loaded transformers model, on any device.
        name: its name in errors.
    """
    width = int(model.config.get_text_config().vocab_size)
    half = _TOKENS // 2
    tokens_BL = torch.arange(_TOKENS, device=model.device)[None] % width
    others_BL = tokens_BL.clone()
    others_BL[:, half:] = (tokens_BL[:, half:] + width // 2) % width
    first_LV, second_LV = (
        model(input_ids=ids_BL, use_cache=False).logits[0, :half].float() for ids_BL in (tokens_BL, others_BL)
    )
    change, largest = float((first_LV - second_LV).abs().max()), float(first_LV.abs().max())
    if change > (_MAX_CHANGE_FLOAT32 if model.dtype == torch.float32 else _MAX_CHANGE) * largest:
        raise ValueError(
            f"{name}: {type(model).__name__} looks ahead: its logits after {half} tokens change by up to {change:.3g} "
            f"with the tokens that follow (largest logit: {largest:.3g}). It is not a causal language model; give one "
            "that is, or set is_decoder to true in its config, if it has that key"
        )
