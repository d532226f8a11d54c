"""The losses against slow float64 twins."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_student.losses import NO_SYMBOL, sparse_kl, symbol_cross_entropy, token_cross_entropy


def kl_twin(
    logits_PV: torch.Tensor, symbols_PE: torch.Tensor, logprobs_PE: torch.Tensor, counted_P: torch.Tensor
) -> float:
    """The definition, symbol by symbol, in Python floats."""
    nats = 0.0
    for p in range(len(counted_P)):
        if not counted_P[p]:
            continue
        student = torch.softmax(logits_PV[p].double(), -1).tolist()
        stored = {int(s): math.exp(float(t)) for s, t in zip(symbols_PE[p], logprobs_PE[p], strict=True) if s >= 0}
        nats += sum(t * (math.log(t) - math.log(student[s])) for s, t in stored.items())
        tail = max(0.0, 1.0 - sum(stored.values()))
        rest = sum(q for s, q in enumerate(student) if s not in stored)
        if tail > 0 and len(stored) < 256:
            nats += tail * (math.log(tail) - math.log(rest))
    return nats


def random_case(seed: int, num_entries: int, mass: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    logits_PV = torch.tensor(rng.normal(0, 3, (7, 256)), dtype=torch.float32)
    symbols_PE = torch.tensor(np.stack([rng.permutation(256)[:num_entries] for _ in range(7)]))
    probs_PE = rng.dirichlet(np.ones(num_entries), 7) * mass
    return logits_PV, symbols_PE, torch.tensor(np.log(np.maximum(probs_PE, 1e-7)), dtype=torch.float16).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 16, 255, 256]), st.sampled_from([0.2, 0.9, 0.999, 1.0]))
def test_kl_is_the_definition_and_not_negative(seed: int, num_entries: int, mass: float) -> None:
    logits_PV, symbols_PE, logprobs_PE = random_case(seed, num_entries, mass)
    counted_P = torch.tensor([True, False, True, True, True, False, True])
    nats = float(sparse_kl(logits_PV, symbols_PE, logprobs_PE, counted_P))
    twin = kl_twin(logits_PV, symbols_PE, logprobs_PE, counted_P)
    assert math.isclose(nats, twin, rel_tol=1e-4, abs_tol=1e-3)
    assert nats > -0.01  # float16 entries may sum to a little more than 1


def test_kl_of_a_distribution_to_itself_is_zero() -> None:
    logits_PV, _, _ = random_case(1, 4, 0.5)
    logprobs_PE, symbols_PE = logits_PV.log_softmax(-1).topk(9)
    assert abs(float(sparse_kl(logits_PV, symbols_PE, logprobs_PE, torch.ones(7, dtype=torch.bool)))) < 1e-5


def test_kl_does_not_depend_on_padding_or_order() -> None:
    logits_PV, symbols_PE, logprobs_PE = random_case(2, 6, 0.8)
    every_P = torch.ones(7, dtype=torch.bool)
    plain = sparse_kl(logits_PV, symbols_PE, logprobs_PE, every_P)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    symbols_padded_PE = torch.nn.functional.pad(symbols_PE[:, order], (0, 3), value=NO_SYMBOL)
    logprobs_padded_PE = torch.nn.functional.pad(logprobs_PE[:, order], (0, 3))
    torch.testing.assert_close(sparse_kl(logits_PV, symbols_padded_PE, logprobs_padded_PE, every_P), plain)


def test_kl_and_its_gradient_are_finite_at_the_edges() -> None:
    every_P = torch.ones(7, dtype=torch.bool)
    for num_entries, mass in [(256, 1.0), (1, 1.0), (1, 1e-6), (255, 1.004)]:
        logits_PV, symbols_PE, logprobs_PE = random_case(3, num_entries, mass)
        logits_PV = (logits_PV * 20).requires_grad_()
        nats = sparse_kl(logits_PV, symbols_PE, logprobs_PE, every_P)
        (gradient_PV,) = torch.autograd.grad(nats, logits_PV)
        assert torch.isfinite(nats) and torch.isfinite(gradient_PV).all()


def test_a_position_that_is_not_counted_has_no_gradient() -> None:
    logits_PV, symbols_PE, logprobs_PE = random_case(4, 5, 0.9)
    logits_PV.requires_grad_()
    counted_P = torch.tensor([True, False] * 3 + [True])
    (gradient_PV,) = torch.autograd.grad(sparse_kl(logits_PV, symbols_PE, logprobs_PE, counted_P), logits_PV)
    assert not gradient_PV[~counted_P].any() and gradient_PV[counted_P].any(-1).all()


def test_chunked_token_cross_entropy_is_that_of_all_logits_at_once() -> None:
    torch.manual_seed(0)
    head, hidden_ND = torch.nn.Linear(16, 50, bias=False), torch.randn(37, 16, requires_grad=True)
    labels_N = torch.randint(0, 50, (37,))
    chunked = token_cross_entropy(hidden_ND, labels_N, head, chunk_tokens=8).sum()
    whole = torch.nn.functional.cross_entropy(head(hidden_ND), labels_N, reduction="sum")
    torch.testing.assert_close(chunked, whole)
    leaves = (hidden_ND, head.weight)
    for ours, theirs in zip(torch.autograd.grad(chunked, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cross_entropies_of_nothing_are_zero_with_a_gradient() -> None:
    head, hidden_ND = torch.nn.Linear(4, 9), torch.empty(0, 4, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    logits_PV = torch.empty(0, 256, requires_grad=True)
    nats = token_cross_entropy(hidden_ND, none, head).sum() + symbol_cross_entropy(logits_PV, none, none.bool())
    nats.backward()
    assert nats.item() == 0 and head.weight.grad is not None
