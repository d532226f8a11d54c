"""Chunks against a slow search, and their loss against a float64 twin."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from schemas import END
from schemas.record import Record, Segment
from stage2_student.data.examples import Encoded
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.alm import NO_CHUNK, chunk_bounds, chunk_loss, chunk_tensors
from tests.support.small_dumps import make_record, make_text


def random_tiling(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    cuts = np.sort(rng.choice(np.arange(1, size), rng.integers(1, size // 2), replace=False))
    bounds = np.concatenate([[0], cuts, [size]])
    return bounds[:-1], bounds[1:]


def random_encoded(seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    document = make_text(rng, 12)
    size = len(document)
    third = size // 3
    segments = [
        Segment(0, third, False),
        Segment(third + 2, third, True),
        Segment(2 * third + 2, size - 2 * third - 2, True),
    ]
    record = make_record("d", document, rng, segments)
    starts, ends = random_tiling(rng, size)
    record = replace(
        record,
        teacher_token_lengths=(ends - starts).astype(np.int32),
        teacher_token_logprobs=-rng.exponential(2, len(ends)).astype(np.float32),
    )
    starts, ends = random_tiling(rng, size)
    return Encoded(record, np.arange(len(starts)), starts, ends)


def cut_prob(record: Record, position: int) -> float:
    first = int(record.entry_counts[:position].sum())
    entries = range(first, first + int(record.entry_counts[position]))
    return sum(math.exp(float(record.logprobs[e])) for e in entries if record.symbols[e] in (*b" \n\r\t", END))


@pytest.mark.parametrize("debias", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("seed", range(8))
def test_chunks_are_those_found_byte_by_byte(seed: int, debias: float) -> None:
    encoded = random_encoded(seed)
    record = encoded.record
    ours, theirs = {0, *encoded.ends.tolist()}, {0, *np.cumsum(record.teacher_token_lengths).tolist()}
    position, found = 0, []
    for segment in record.segments:
        bounds = []
        for offset in range(segment.length + 1):
            stored = offset < segment.length or segment.has_end
            sure = cut_prob(record, position + offset) >= debias if stored else debias == 0
            at = segment.start + offset
            if at in ours and at in theirs and (offset == 0 or sure):
                bounds.append(at)
        position += segment.num_positions
        found.append(bounds)
    assert [bounds.tolist() for bounds in chunk_bounds(encoded, debias)] == found
    tensors = chunk_tensors([encoded], Layout.of([len(encoded.ends) + 3]), debias)
    chunk_L, teacher_C = tensors["alm_chunk_BL"][0].tolist(), tensors["alm_teacher_C"].tolist()
    spans = [(a, b) for bounds in found for a, b in pairwise(bounds)]
    for token, (start, end) in enumerate(zip(encoded.starts, encoded.ends, strict=True)):
        chunk = [i for i, (a, b) in enumerate(spans) if a <= start and end <= b]
        assert chunk_L[token] == (chunk[0] if chunk else NO_CHUNK)
    assert chunk_L[len(encoded.ends) :] == [NO_CHUNK] * 3
    their_ends = np.cumsum(record.teacher_token_lengths)
    for (a, b), teacher in zip(spans, teacher_C, strict=True):
        inside = (their_ends > a) & (their_ends <= b)
        assert teacher == pytest.approx(float(record.teacher_token_logprobs[inside].sum()), rel=1e-5)


def test_chunks_of_documents_side_by_side_are_numbered_on() -> None:
    items = [random_encoded(seed) for seed in range(3)]
    length = max(len(item.ends) for item in items) + 1
    alone = [chunk_tensors([item], Layout.of([length]), 0.02) for item in items]
    together = chunk_tensors(items, Layout.of([length] * 3), 0.02)
    teacher = torch.cat([tensors["alm_teacher_C"] for tensors in alone])
    torch.testing.assert_close(together["alm_teacher_C"], teacher)
    for row, tensors in enumerate(alone):
        mine_L, alone_L = together["alm_chunk_BL"][row], tensors["alm_chunk_BL"][0]
        assert ((mine_L == NO_CHUNK) == (alone_L == NO_CHUNK)).all()
        torch.testing.assert_close(
            teacher[mine_L[mine_L != NO_CHUNK]], tensors["alm_teacher_C"][alone_L[alone_L != NO_CHUNK]]
        )
    assert chunk_tensors([], Layout((1, 1), ()), 0.1)["alm_chunk_BL"].tolist() == [[NO_CHUNK]]


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_the_loss_and_its_gradient_are_the_definition(tau: float) -> None:
    rng = np.random.default_rng(0)
    chunk_N = torch.tensor(rng.integers(-1, 9, 40))
    chunk_N[:9] = torch.arange(9)
    nats_N = torch.tensor(rng.exponential(1, 40)).requires_grad_()
    teacher_C = -torch.tensor(rng.exponential(3, 9))
    s = torch.stack([-nats_N[chunk_N == c].sum() for c in range(9)]).div(tau).exp()
    t = teacher_C.div(tau).exp()
    twin = -(t * s.log() + (1 - t) * (1 - s).log()).sum()
    loss = chunk_loss(nats_N.float(), chunk_N, teacher_C.float(), tau)
    torch.testing.assert_close(loss.double(), twin, rtol=1e-5, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(loss, nats_N), torch.autograd.grad(twin, nats_N)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    assert not ours[chunk_N == NO_CHUNK].any()


def test_the_loss_is_least_where_the_student_is_the_teacher_and_finite_where_it_is_certain() -> None:
    teacher_C, each_C = torch.tensor([-0.5, -3.0, -40.0, 0.0]), torch.arange(4)
    best = chunk_loss(-teacher_C, each_C, teacher_C, 100.0)
    for other in (-teacher_C + 0.1, -teacher_C * 1.2, torch.zeros(4), torch.full((4,), 200.0)):
        nats_N = other.clamp(min=0).requires_grad_()
        loss = chunk_loss(nats_N, each_C, teacher_C, 100.0)
        assert loss > best and torch.isfinite(torch.autograd.grad(loss, nats_N)[0]).all()


def test_no_chunks_are_a_loss_of_zero_with_a_gradient() -> None:
    nats_N = torch.rand(3, requires_grad=True)
    loss = chunk_loss(nats_N, torch.full((3,), NO_CHUNK), torch.empty(0), 100.0)
    assert loss.item() == 0 and not torch.autograd.grad(loss, nats_N)[0].any()
