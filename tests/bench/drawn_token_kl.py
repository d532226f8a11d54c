"""Sparse Logit Sampling (arXiv 2503.16870): as `dense_token_kl.py`, from 12 draws of the teacher's next token."""

import runpy
from pathlib import Path

import torch
from torch import Tensor

from stage2_student.losses.objectives import ObjectiveInputs

DRAWS = 12
_DENSE = runpy.run_path(str(Path(__file__).with_name("dense_token_kl.py")))


def _shares(logprobs_nV: Tensor) -> Tensor:
    """Draw from each distribution, and return each token's share of the draws."""
    drawn_nK = torch.multinomial(logprobs_nV.exp(), DRAWS, replacement=True)
    ones_nK = logprobs_nV.new_full(drawn_nK.shape, 1 / DRAWS)
    return torch.zeros_like(logprobs_nV).scatter_add_(-1, drawn_nK, ones_nK)


def objective(inputs: ObjectiveInputs) -> Tensor:
    """Compute the divergence from the draws; they differ at each step, and not between a step's two passes."""
    return _DENSE["divergence"](inputs, _shares)  # type: ignore[no-any-return]
