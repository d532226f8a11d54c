"""Chunks against a slow search, and their loss against a float64 twin."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.config import TrainConfig
from schemas import END
from schemas.record import Record, Segment
from schemas.token_alternatives import TokenAlternatives
from stage2_student.data.examples import Encoded
from stage2_student.data.micro_batch import Layout, empty_micro_batch
from stage2_student.losses.alm import (
    MIN_CUT,
    NO_CHUNK,
    approximate_likelihood,
    chunk_bounds,
    chunk_loss,
    chunk_tensors,
    cut_tensors,
)
from stage2_student.losses.inputs import ObjectiveInputs
from tests.support.small_dumps import make_record, make_text
from tests.support.token_records import tiled


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


def with_tokens(encoded: Encoded, seed: int) -> Encoded:
    """Give the record what a dump stores of the teacher's end token: where its segments end."""
    record, rng = encoded.record, np.random.default_rng(seed)
    count = len(record.teacher_token_lengths)
    end_logprobs = -rng.exponential(2, count + 1).astype(np.float32)
    stops = [s.start + s.length for s in record.segments]
    end_logprobs[1:][~np.isin(np.cumsum(record.teacher_token_lengths), stops)] = np.nan
    none = np.empty(0, dtype=np.float32)
    tokens = TokenAlternatives(
        offsets=np.zeros(count + 1, dtype=np.int64),
        ids=none.astype(np.int32),
        log_probs=none,
        token_ids=np.zeros(count, dtype=np.int32),
        token_log_probs=record.teacher_token_logprobs,
        end_log_probs=end_logprobs,
    )
    return replace(encoded, record=replace(record, tokens=tokens))


@pytest.mark.parametrize("debias", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(4))
def test_what_follows_a_chunk_and_the_end_of_a_text_count_as_defined(seed: int, debias: float) -> None:
    encoded = with_tokens(tiled(seed), seed)
    record, rng = encoded.record, np.random.default_rng(seed)
    vocabulary = [b" a", b"b", b"\n", None, b"", b"\tx", b"end"]
    length, end_id, tau = len(encoded.ends) + 1, 3, 10.0
    layout = Layout.of([length])
    tensors = chunk_tensors([encoded], layout, debias, end_id)
    tensors |= cut_tensors([encoded], layout, debias, vocabulary, end_id)
    logits = torch.tensor(rng.normal(0, 1, (length, 9)), requires_grad=True)  # two rows of padding
    nats_L = torch.tensor(rng.exponential(1, length))
    labels_BL = torch.zeros(1, length, dtype=torch.long)
    batch = replace(empty_micro_batch(0), layout=layout, labels_BL=labels_BL, extra=tensors)
    train = TrainConfig.model_validate({"objectives": {"ce": 0, "kl": 0, "alm": 1}, "alm_tau": tau})
    inputs = ObjectiveInputs(batch, None, nats_L.float(), train, logits.float()[None], lambda logits_nV: logits_nV)
    loss = approximate_likelihood(inputs)

    logprobs = logits.log_softmax(-1)
    twin, position = logits.sum() * 0, 0
    ends_T = np.cumsum(record.teacher_token_lengths)
    for segment, bounds in zip(record.segments, chunk_bounds(encoded, debias), strict=True):
        stop = segment.start + segment.length
        for start, end in pairwise(bounds.tolist()):
            inside_L = (encoded.starts >= start) & (encoded.ends <= end)
            inside_T = (ends_T > start) & (ends_T <= end)
            s = -nats_L[:-1][torch.from_numpy(inside_L)].sum()
            t = float(record.teacher_token_logprobs[inside_T].astype(np.float64).sum())
            if end < stop or segment.has_end:
                s = s + logprobs[int(np.flatnonzero(inside_L)[-1]) + 1, [0, 2, 5, end_id]].exp().sum().log()
                t += math.log(max(cut_prob(record, position + end - segment.start), MIN_CUT))
            twin = twin + binary_cross_entropy(s / tau, torch.tensor(t, dtype=torch.float64) / tau)
        position += segment.num_positions
        if segment.has_end and stop in encoded.ends and stop in ends_T:
            state = int(np.flatnonzero(encoded.ends == stop)[0]) + 1
            before = int(np.flatnonzero(ends_T == stop)[0]) + 1
            t = float(record.tokens.end_log_probs[before])  # type: ignore[union-attr]
            twin = twin + binary_cross_entropy(-nats_L[state] / tau, torch.tensor(t, dtype=torch.float64) / tau)
    torch.testing.assert_close(loss.double(), twin, rtol=1e-4, atol=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(twin, logits)
    assert theirs.any() or debias
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def binary_cross_entropy(log_s: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    return -(log_t.exp() * log_s + (1 - log_t.exp()) * (1 - log_s.exp()).log())
