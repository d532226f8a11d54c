"""Weights of objectives by how strongly each one pulls, instead of fixed ones.

Both kinds weigh a micro-batch by itself: with another `train.micro_batch_tokens` the weights are others.

Shape legend: B rows, L tokens, D hidden width, O objectives.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

_LEAST = 1e-12  # below this an objective has nothing to compare


def balanced(
    weighted: Mapping[str, Tensor], how: Literal["none", "gradient", "loss"], hidden_BLD: Tensor | None
) -> Tensor:
    """Combine weighted sums in nats to one.

    `none`: their sum. `gradient`: the sum of loss / |gradient| over the sum of 1 / |gradient|, by which all pull alike.
    The gradient is that by the last hidden states; ALM's authors take that by the weights of the last layer. `loss`:
    each objective but `ce` is scaled to the size of ce. Weights of the recipe cancel out, up to a common factor.

    Sources: GradMag (ALM, arXiv 2503.20083, appendix; tokenkit's `approx_gradmag_preserve_mag`); X-Token's
    `dynamic_loss_scaling` (NVIDIA NeMo-RL).

    Args:
        hidden_BLD: the states that all objectives are computed from; None if `how` is not `gradient`.
    """
    values_O = torch.stack(list(weighted.values()))
    if how == "none" or not torch.is_grad_enabled():
        return values_O.sum()
    if how == "loss":
        size = weighted["ce"].detach().abs()
        scales = [size / value.detach().abs().clamp(min=_LEAST) for value in weighted.values()]
        scales = [torch.ones_like(size) if name == "ce" else s for name, s in zip(weighted, scales, strict=True)]
        return (torch.stack(scales) * values_O).sum()
    assert hidden_BLD is not None
    norm_O = torch.stack([_gradient_norm(value, hidden_BLD) for value in weighted.values()])
    inverse_O = torch.where(norm_O > _LEAST, 1 / norm_O.clamp(min=_LEAST), 0.0)
    return (inverse_O * values_O).sum() / inverse_O.sum().clamp(min=_LEAST)


def _gradient_norm(value: Tensor, hidden_BLD: Tensor) -> Tensor:
    """Return the norm of a sum's gradient by the hidden states."""
    if not value.requires_grad:
        return value.new_zeros(())
    [gradient] = torch.autograd.grad(value, hidden_BLD, retain_graph=True, allow_unused=True)
    return value.new_zeros(()) if gradient is None else gradient.float().norm()
