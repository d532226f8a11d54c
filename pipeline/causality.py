"""Does a model look ahead? What it says after some tokens may not depend on the tokens that come later.

transformers builds encoders and permutation models (BERT, XLNet) as causal language models too, and they attend to what follows unless
their config says otherwise. Their log-probabilities of a text would be those of somebody who has read it.

Shape legend: L tokens of the probe, V token ids.
"""

from typing import Any

import torch

_LENGTH = 12
# Nats. The same shapes give the same rounding, but for experts that are given other tokens: 1e-5 in float32, up to 0.1 a logit in
# bfloat16. A random model of 2 layers that looks ahead changes by 0.05 and more, a trained one by several.
_LIMIT_FLOAT32, _LIMIT = 0.01, 1.0


@torch.no_grad()
def check_causal(model: Any, name: str) -> None:
    """Raise ValueError where other tokens later in a text change what the model says of earlier ones.

    Args:
        model: of transformers, on any device, in evaluation mode.
        name: what the error calls it.
    """
    width = model.get_input_embeddings().weight.shape[0]
    tokens_L = (3 + 37 * torch.arange(_LENGTH, device=model.device)) % width
    others_L = tokens_L.clone()
    others_L[_LENGTH // 2 :] = (tokens_L[_LENGTH // 2 :] + width // 2) % width
    first_LV, second_LV = (
        model(input_ids=ids_L[None], use_cache=False).logits[0, : _LENGTH // 2].float().log_softmax(-1)
        for ids_L in (tokens_L, others_L)
    )
    limit = _LIMIT_FLOAT32 if model.dtype == torch.float32 else _LIMIT
    apart = float((first_LV - second_LV).abs().amax())
    if apart > limit:
        raise ValueError(
            f"{name} ({model.config.model_type}): it looks ahead. Other tokens later in a text change its log-probabilities of earlier ones by "
            f"{apart:.3g} nats, so it does not predict them. Take a causal language model, or a checkpoint whose config makes it one "
            "(is_decoder: true)"
        )
