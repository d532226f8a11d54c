"""The losses against slow float64 twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.reduction.sparsify import sparsify
from stage1_teacher.targets.dense_float32 import exact_entries
from stage1_teacher.targets.rounding import round_entries
from stage2_student.data.examples import NO_SYMBOL
from stage2_student.losses.divergences import (
    MIN_TAIL,
    Direction,
    class_divergence,
    symbol_cross_entropy,
    token_cross_entropy,
)

DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse", "jensen_shannon")


def divergence_twin(
    logits_PV: torch.Tensor,
    symbols_PE: torch.Tensor,
    logprobs_PE: torch.Tensor,
    counted_P: torch.Tensor,
    direction: Direction,
    temperature: float,
) -> torch.Tensor:
    """Compute the definition, position by position and class by class, in float64."""
    nats = logits_PV.sum() * 0
    for p in counted_P.nonzero().flatten().tolist():
        probs_V = torch.softmax(logits_PV[p], -1)
        stored = {int(s): math.exp(float(t)) for s, t in zip(symbols_PE[p], logprobs_PE[p], strict=True) if s >= 0}
        teacher, student = [*stored.values()], [probs_V[s] for s in stored]
        if len(stored) < 256:
            teacher.append(max(1 - sum(stored.values()), MIN_TAIL))
            student.append(torch.stack([probs_V[s] for s in range(256) if s not in stored]).sum())
        t, q = (values ** (1 / temperature) for values in (torch.tensor(teacher).double(), torch.stack(student)))
        t, q = t / t.sum(), q / q.sum()
        m = (t + q) / 2
        kinds = {"forward": [(1, t, q)], "reverse": [(1, q, t)], "jensen_shannon": [(0.5, t, m), (0.5, q, m)]}
        nats = nats + sum(w * (a * (a.log() - b.log())).sum() for w, a, b in kinds[direction]) * temperature**2
    return nats


def random_case(seed: int, num_entries: int, mass: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    logits_PV = torch.tensor(rng.normal(0, 3, (7, 256)), dtype=torch.float32)
    symbols_PE = torch.tensor(np.stack([rng.permutation(256)[:num_entries] for _ in range(7)]))
    probs_PE = rng.dirichlet(np.ones(num_entries), 7) * mass
    return logits_PV, symbols_PE, torch.tensor(np.log(np.maximum(probs_PE, 1e-7)), dtype=torch.float16).float()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 16, 255, 256]),
    st.sampled_from([0.2, 0.9, 0.999, 1.0, 1.004]),
    st.sampled_from(DIRECTIONS),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)
def test_a_divergence_and_its_gradient_are_the_definition_and_not_negative(
    seed: int, num_entries: int, mass: float, direction: Direction, temperature: float
) -> None:
    logits_PV, symbols_PE, logprobs_PE = random_case(seed, num_entries, mass)
    counted_P = torch.tensor([True, False, True, True, True, False, True])
    ours_PV, theirs_PV = logits_PV.requires_grad_(), logits_PV.detach().double().requires_grad_()
    nats = class_divergence(ours_PV, symbols_PE, logprobs_PE, counted_P, direction, temperature)
    twin = divergence_twin(theirs_PV, symbols_PE, logprobs_PE, counted_P, direction, temperature)
    assert nats > -1e-5 and math.isclose(nats.item(), twin.item(), rel_tol=1e-4, abs_tol=1e-4)
    (ours,), (theirs,) = torch.autograd.grad(nats, ours_PV), torch.autograd.grad(twin, theirs_PV)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_the_divergence_of_a_distribution_to_itself_is_zero(direction: Direction, temperature: float) -> None:
    logits_PV, _, _ = random_case(1, 4, 0.5)
    logprobs_PE, symbols_PE = logits_PV.log_softmax(-1).topk(9)
    every_P = torch.ones(7, dtype=torch.bool)
    assert abs(float(class_divergence(logits_PV, symbols_PE, logprobs_PE, every_P, direction, temperature))) < 1e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_divergence_does_not_depend_on_padding_or_order(direction: Direction) -> None:
    logits_PV, symbols_PE, logprobs_PE = random_case(2, 6, 0.8)
    every_P = torch.ones(7, dtype=torch.bool)
    plain = class_divergence(logits_PV, symbols_PE, logprobs_PE, every_P, direction, 2.0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    symbols_padded_PE = torch.nn.functional.pad(symbols_PE[:, order], (0, 3), value=NO_SYMBOL)
    logprobs_padded_PE = torch.nn.functional.pad(logprobs_PE[:, order], (0, 3))
    padded = class_divergence(logits_PV, symbols_padded_PE, logprobs_padded_PE, every_P, direction, 2.0)
    torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_divergence_and_its_gradient_are_finite_at_the_edges(direction: Direction) -> None:
    every_P = torch.ones(7, dtype=torch.bool)
    for num_entries, mass, temperature in [(256, 1.0, 1.0), (1, 1.0, 3.0), (1, 1e-6, 1.0), (255, 1.004, 0.5)]:
        logits_PV, symbols_PE, logprobs_PE = random_case(3, num_entries, mass)
        logits_PV = (logits_PV * 20).requires_grad_()
        nats = class_divergence(logits_PV, symbols_PE, logprobs_PE, every_P, direction, temperature)
        (gradient_PV,) = torch.autograd.grad(nats, logits_PV)
        assert torch.isfinite(nats) and torch.isfinite(gradient_PV).all()


def test_the_mean_of_tempered_gradients_keeps_its_size() -> None:
    """Times T^2: without it the gradient at T = 4 would be about a sixteenth."""
    logits_PV, _, _ = random_case(5, 256, 1.0)
    teacher_PE = (logits_PV + torch.randn(7, 256, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    symbols_PE, every_P = torch.arange(256).expand(7, 256), torch.ones(7, dtype=torch.bool)
    logits_PV = (logits_PV / 50).requires_grad_()  # near uniform, where the argument is exact
    norms = []
    for temperature in (8.0, 16.0):
        nats = class_divergence(logits_PV, symbols_PE, teacher_PE / 50, every_P, "forward", temperature)
        norms.append(float(torch.autograd.grad(nats, logits_PV)[0].norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_a_position_that_is_not_counted_has_no_gradient() -> None:
    logits_PV, symbols_PE, logprobs_PE = random_case(4, 5, 0.9)
    logits_PV.requires_grad_()
    counted_P = torch.tensor([True, False] * 3 + [True])
    (gradient_PV,) = torch.autograd.grad(class_divergence(logits_PV, symbols_PE, logprobs_PE, counted_P), logits_PV)
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


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_that_is_the_teacher_loses_nothing_to_targets_that_are_stored_whole(direction: Direction) -> None:
    """Levels, which any other dump is rounded to, cost it some 1e-3 nats a position."""
    rng = np.random.default_rng(0)
    logits_PV = np.concatenate([rng.normal(size=(20, 256)) * scale for scale in (0.1, 2.0, 5.0)])
    probs_PV = np.exp(logits_PV) / np.exp(logits_PV).sum(axis=1, keepdims=True)
    entries = sparsify(probs_PV, np.zeros(60, np.uint8), 256, 0.0)
    whole, rounded = exact_entries(entries), round_entries(entries)
    nats = [
        class_divergence(
            torch.from_numpy(logits_PV).float(),
            torch.from_numpy(stored.symbols_E.reshape(60, 256).astype(np.int64)),
            torch.from_numpy(stored.logprobs_E.reshape(60, 256)),
            torch.ones(60, dtype=torch.bool),
            direction,
        )
        for stored in (whole, rounded)
    ]
    assert abs(float(nats[0])) / 60 < 1e-6 and float(nats[1]) / 60 > 1e-4
