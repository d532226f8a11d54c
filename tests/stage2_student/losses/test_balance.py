"""Balanced sums of objectives against their definitions."""

import pytest
import torch

from pipeline.config import TrainConfig
from stage2_student.losses.balance import balanced


def drawn() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    hidden_BLD = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    logits = hidden_BLD @ head
    return hidden_BLD, {"ce": logits.exp().sum(), "alm": 0.01 * (logits**2).sum(), "none": torch.zeros(())}


def test_without_a_balance_it_is_the_sum() -> None:
    hidden_BLD, terms = drawn()
    torch.testing.assert_close(balanced(terms, "none", hidden_BLD), sum(terms.values()))


def test_objectives_balanced_by_gradient_pull_alike_whatever_their_weights() -> None:
    hidden_BLD, terms = drawn()
    norms = {name: torch.autograd.grad(terms[name], hidden_BLD, retain_graph=True)[0].norm() for name in ("ce", "alm")}
    wanted = (terms["ce"] / norms["ce"] + terms["alm"] / norms["alm"]) / (1 / norms["ce"] + 1 / norms["alm"])
    found = balanced(terms, "gradient", hidden_BLD)
    torch.testing.assert_close(found, wanted)
    heavier = balanced({**terms, "alm": 1000 * terms["alm"]}, "gradient", hidden_BLD)
    (ours,), (theirs,) = (torch.autograd.grad(one, hidden_BLD, retain_graph=True) for one in (found, heavier))
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm())


def test_objectives_balanced_by_loss_have_the_size_of_the_cross_entropy() -> None:
    hidden_BLD, terms = drawn()
    found = balanced(terms, "loss", hidden_BLD)
    torch.testing.assert_close(found, 2 * terms["ce"])
    (ours,) = torch.autograd.grad(found, hidden_BLD, retain_graph=True)
    (of_ce,), (of_alm,) = (torch.autograd.grad(terms[name], hidden_BLD, retain_graph=True) for name in ("ce", "alm"))
    torch.testing.assert_close(ours, of_ce + of_alm * (terms["ce"] / terms["alm"]).detach())


def test_an_evaluation_is_not_balanced() -> None:
    hidden_BLD, terms = drawn()
    with torch.no_grad():
        assert balanced(terms, "gradient", hidden_BLD) == sum(terms.values())


def test_a_balance_that_is_not_possible_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give train\.objectives\.ce"):
        TrainConfig.model_validate({"balance": "loss", "objectives": {"ce": 0.0}})
    with pytest.raises(ValueError, match="zero_stage 2 or less"):
        TrainConfig.model_validate({"balance": "gradient", "deepspeed": {"zero_stage": 3}})
