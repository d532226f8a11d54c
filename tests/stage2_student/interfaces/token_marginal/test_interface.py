"""The token-marginal interface against the teacher's covering and a differentiable brute force."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.covering.covering import Covering
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas import END, NUM_SYMBOLS
from schemas.record import Segment
from stage2_student.data.examples import NO_LABEL, Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate, empty_micro_batch
from stage2_student.data.spans import token_spans
from stage2_student.interfaces import StudentShape
from stage2_student.interfaces.token_marginal import cells as marginal_cells
from stage2_student.interfaces.token_marginal import cells_numba
from stage2_student.interfaces.token_marginal import interface as token_marginal
from stage2_student.interfaces.token_marginal.interface import TokenMarginal
from stage2_student.interfaces.token_marginal.node_sums import Kernels, Memory
from stage2_student.interfaces.token_marginal.plan import Plan
from stage2_student.interfaces.token_marginal.positions import NEVER, Distributions
from stage2_student.model.student import Student
from stage2_student.training.building.student import build_student
from tests.pipeline.covering.test_covering import random_tokens, random_vocabulary
from tests.support.small_dumps import make_recipe, make_record
from tests.support.tiny import tiny_model

Documents = Sequence[tuple[list[int], list[Segment] | None]]


class Case:
    """A vocabulary, documents in its tokens, and logits for every state of the padded batch.

    By default the head is the identity.
    """

    def __init__(
        self,
        seed: int,
        documents: Documents,
        token_bytes: list[bytes | None],
        end: int,
        prefix: bytes = b"",
        padding: int = 3,
        by_nodes: tuple[Kernels, Memory] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.token_bytes, self.end, self.width = token_bytes, end, len(token_bytes) + padding  # rows of the head
        self.interface = TokenMarginal(StudentShape(8, self.width, tuple(token_bytes), prefix, (end,)), 0.05)
        if by_nodes is not None:
            self.interface.use_nodes(*by_nodes)
        self.encoded = [self._encoded(f"d{i}", *d, prefix, rng) for i, d in enumerate(documents)]
        examples = [make_example(e, end, end, None, Masks(1.0, 1.0)) for e in self.encoded]
        micro = collate(examples) if examples else empty_micro_batch(end)
        self.batch = replace(micro, extra=self.interface.prepare(self.encoded, examples, micro))
        logits = rng.normal(size=(*self.batch.tokens_BL.shape, self.width)) * 3
        self.logits_BLV = torch.tensor(logits, requires_grad=True)

    def _encoded(
        self, name: str, tokens: list[int], segments: list[Segment] | None, prefix: bytes, rng: np.random.Generator
    ) -> Encoded:
        spelled = [self.token_bytes[t] or b"" for t in tokens]
        document = b"".join(spelled)[len(prefix) :]
        spans = token_spans(spelled, document, prefix)
        record = make_record(name, document, rng, segments)
        starts, ends = (
            np.array([s.start for s in spans], dtype=np.int64),
            np.array([s.stop for s in spans], dtype=np.int64),
        )
        return Encoded(record, np.array(tokens, dtype=np.int64), starts, ends)

    def marginals(self) -> tuple[Distributions, Tensor]:
        return self.interface.marginals(self.logits_BLV, self.batch, lambda logits: logits)


def random_case(seed: int, lengths: Sequence[int], by_nodes: tuple[Kernels, Memory] | None = None) -> Case:
    rng = np.random.default_rng(seed)
    token_bytes = random_vocabulary(rng)
    end = token_bytes.index(None)
    documents = [(random_tokens(rng, token_bytes, end, n), None) for n in lengths]
    return Case(seed, documents, token_bytes, end, by_nodes=by_nodes)


def positions(batch: MicroBatch, encoded: Sequence[Encoded], cut: int = 0) -> list[tuple[int, int]]:
    """Return (document, byte offset) of each supervised position."""
    length = batch.tokens_BL.shape[1]
    found = []
    for state, offset in zip(batch.state_P.tolist(), batch.offset_P.tolist(), strict=True):
        document, state = divmod(state, length)
        starts = np.append(encoded[document].starts, len(encoded[document].record.document))
        found.append((document, cut + int(starts[state]) + offset))
    return found


def brute_force(case: Case, prefix: bytes = b"") -> Tensor:
    """Return P x V log-probabilities from every (row, token) pair; -inf if no token continues so."""
    rows = []
    for b, encoded in enumerate(case.encoded):
        logprobs_LV = case.logits_BLV[b].log_softmax(-1)
        offset, weight, of_document = 0, logprobs_LV.new_zeros(()), []
        for state, token in enumerate([*encoded.tokens.tolist(), None]):
            of_document.append((offset, weight, logprobs_LV[state]))
            if token is not None:
                offset, weight = offset + len(case.token_bytes[token] or b""), weight + logprobs_LV[state, token]
        rows.append(of_document)
    found = []
    for b, position in positions(case.batch, case.encoded, len(prefix)):
        document = prefix + case.encoded[b].record.document
        terms: list[list[Tensor]] = [[] for _ in range(NUM_SYMBOLS)]
        for offset, weight, logprobs_V in rows[b]:
            known = document[offset:position]
            if offset == position:
                terms[END].append(weight + logprobs_V[case.end])
            for token, spelled in enumerate(case.token_bytes if offset <= position else []):
                if token != case.end and spelled and END not in spelled and spelled[: len(known)] == known != spelled:
                    terms[spelled[len(known)]].append(weight + logprobs_V[token])
        nothing = torch.tensor(-torch.inf, dtype=torch.float64)
        log_mass_V = torch.stack([torch.stack(t).logsumexp(0) if t else nothing for t in terms])
        found.append(log_mass_V - log_mass_V.logsumexp(0))
    return torch.stack(found)


def check_against_brute_force(case: Case, prefix: bytes = b"", rtol: float = 1e-9) -> None:
    found, token_nats_N = case.marginals()
    expected_PV = brute_force(case, prefix)
    is_possible_PV = expected_PV > -torch.inf
    assert (found.logprobs_PV[~is_possible_PV] == NEVER).all()
    torch.testing.assert_close(found.logprobs_PV[is_possible_PV], expected_PV[is_possible_PV], rtol=rtol, atol=1e-12)
    labels_BL = case.batch.labels_BL
    logprobs_N = case.logits_BLV.log_softmax(-1)[labels_BL != NO_LABEL]
    expected_nats_N = -logprobs_N.gather(-1, labels_BL[labels_BL != NO_LABEL][:, None])[:, 0]
    torch.testing.assert_close(token_nats_N, expected_nats_N, rtol=rtol, atol=1e-12)

    generator = torch.Generator().manual_seed(0)
    cotangent_PV = torch.randn(expected_PV.shape, generator=generator, dtype=torch.float64)[is_possible_PV]
    cotangent_N = torch.randn(token_nats_N.shape, generator=generator, dtype=torch.float64)
    ours = (found.logprobs_PV[is_possible_PV] * cotangent_PV).sum() + (token_nats_N * cotangent_N).sum()
    twin = (expected_PV[is_possible_PV] * cotangent_PV).sum() + (expected_nats_N * cotangent_N).sum()
    [gradient_BLV] = torch.autograd.grad(ours, case.logits_BLV)
    [expected_BLV] = torch.autograd.grad(twin, case.logits_BLV)
    torch.testing.assert_close(gradient_BLV, expected_BLV, rtol=rtol, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_values_and_gradients_are_those_of_brute_force(seed: int, lengths: list[int]) -> None:
    check_against_brute_force(random_case(seed, lengths))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_distributions_and_shares_are_those_of_the_covering(seed: int, lengths: list[int]) -> None:
    case = random_case(seed, lengths)
    found, _ = case.marginals()
    vocabulary = case.interface.vocabulary
    targets = []
    for b, encoded in enumerate(case.encoded):
        covering = Covering(vocabulary, encoded.tokens.tolist(), encoded.record.document)
        logits_RV = case.logits_BLV[b, : len(covering.offsets)].detach().numpy()[:, vocabulary.order]
        probs_RC = np.pad(np.exp(logits_RV), ((0, 0), (0, 1)))
        targets.append(covering.targets(covering.reduce_rows(covering.offsets, probs_RC)))
    at = positions(case.batch, case.encoded)
    probs_PV = np.stack([targets[b].probs_PV[position] for b, position in at])
    np.testing.assert_allclose(
        np.where(probs_PV > 0, found.logprobs_PV.detach().exp().numpy(), 0), probs_PV, atol=1e-12
    )
    np.testing.assert_allclose(found.token_end_P, [targets[b].token_end_P[p] for b, p in at], atol=1e-9)
    np.testing.assert_allclose(found.dropped_P, [targets[b].dropped_P[p] for b, p in at], atol=1e-9)


def test_masses_of_1e_30_have_finite_logs_and_gradients_that_are_right() -> None:
    case = random_case(5, [6, 3])
    with torch.no_grad():
        for b, encoded in enumerate(case.encoded):
            for state, token in enumerate(encoded.tokens.tolist()):
                case.logits_BLV[b, state] *= 20  # 1e-30 and less for most tokens
                case.logits_BLV[b, state, token] = case.logits_BLV[b, state].max() - 69 * (state % 2)
    expected_PV = brute_force(case)
    assert (expected_PV[expected_PV > -torch.inf] < -69).sum() > 20
    check_against_brute_force(case, rtol=1e-6)


@pytest.mark.parametrize("segment", [(0, 4, False), (3, 5, True), (6, 0, True), (9, 7, True)])
def test_a_segment_inside_a_document_has_the_distributions_of_the_whole(segment: tuple[int, int, bool]) -> None:
    rng = np.random.default_rng(11)
    token_bytes = random_vocabulary(rng)
    end = token_bytes.index(None)
    tokens = random_tokens(rng, token_bytes, end, 12)
    check_against_brute_force(Case(11, [(tokens, [Segment(*segment)]), (tokens[:3], None)], token_bytes, end))


def test_neighbouring_segments_share_a_position() -> None:
    token_bytes: list[bytes | None] = [b"a", b"b", b"ab", b"ba", None]
    segments = [Segment(0, 2, True), Segment(2, 3, True)]
    check_against_brute_force(Case(0, [([2, 0, 1, 0], segments)], token_bytes, 4))


def test_what_a_tokenizer_puts_first_is_known_and_not_predicted() -> None:
    token_bytes: list[bytes | None] = [b" ", b" a", b"a", b"b", b"ab", b" ab", None]
    for tokens in ([1, 3, 0, 2], [0, 4, 3], [0], [5]):
        check_against_brute_force(Case(1, [(tokens, None)], token_bytes, 6, prefix=b" "), prefix=b" ")


def test_a_student_of_bytes_is_its_own_softmax_over_the_bytes_and_end() -> None:
    token_bytes: list[bytes | None] = [*(bytes([i]) for i in range(255)), None]
    case = Case(2, [(list(b"some text"), None), (list(b"more"), None)], token_bytes, 255)
    found, _ = case.marginals()
    expected_PV = case.logits_BLV[..., :256].log_softmax(-1).flatten(0, 1)[case.batch.state_P]
    torch.testing.assert_close(found.logprobs_PV, expected_PV)
    assert (found.token_end_P == 0).all()


def test_no_token_reaches_across_a_control_token() -> None:
    token_bytes: list[bytes | None] = [b"a", b"b", b"ab", None, None]
    joined = Case(3, [([0, 1, 4, 2, 0], [Segment(0, 5, True)])], token_bytes, 3)
    found, _ = joined.marginals()
    apart = Case(3, [([0, 1], [Segment(0, 2, False)]), ([2, 0], None)], token_bytes, 3)
    with torch.no_grad():
        apart.logits_BLV[0, :3], apart.logits_BLV[1, :3] = joined.logits_BLV[0, :3], joined.logits_BLV[0, 3:]
    expected, _ = apart.marginals()
    torch.testing.assert_close(found.logprobs_PV, expected.logprobs_PV)


def test_a_rank_without_documents_gives_the_head_a_zero_gradient() -> None:
    head = torch.nn.Linear(8, 8)
    case = Case(4, [], [b"a", b"b", b"ab", None, None], 3)
    scores = case.interface(torch.randn(1, 1, 8, requires_grad=True), case.batch, head)
    assert scores.logits_PV.shape == (0, NUM_SYMBOLS) and scores.token_nats_N is not None
    (scores.logits_PV.sum() + scores.token_nats_N.sum()).backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernels_are_the_twins_of_the_plain_ones(dtype: torch.dtype) -> None:
    case = random_case(6, [7, 5, 0])
    plan = Plan(**case.batch.extra)
    labels_R = case.batch.labels_BL.flatten()[plan.state_R]
    cells = marginal_cells.Cells(
        plan.num_cells_R, plan.first_I, plan.last_I, torch.stack([plan.next_R, labels_R], dim=-1)
    )
    columns = case.interface.columns
    logits_RV = case.logits_BLV.detach().flatten(0, 1)[plan.state_R].to(dtype)
    sums, log_total_R = cells_numba.sum_cells(logits_RV, cells, columns)
    expected, expected_log_total_R = marginal_cells.sum_cells(logits_RV.double(), cells, columns)
    torch.testing.assert_close((*sums, log_total_R), (*expected, expected_log_total_R), rtol=1e-5, atol=1e-6)
    wanted = marginal_cells.Sums(*(torch.randn_like(part) for part in expected))
    wanted = wanted._replace(logprob_R2=wanted.logprob_R2.where(cells.tokens_R2 >= 0, 0.0))
    plain, _ = marginal_cells.sum_cells(logits_RV, cells, columns)
    torch.testing.assert_close(tuple(plain), tuple(expected), rtol=1e-5, atol=1e-6)
    rest = (log_total_R, wanted, torch.randn(len(logits_RV), dtype=torch.float64), cells, columns)
    gradient_RV = cells_numba.softmax_sums_backward(logits_RV, *rest)
    expected_RV = marginal_cells.softmax_sums_backward(logits_RV.double(), *rest).to(dtype)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 1e-6}
    torch.testing.assert_close(gradient_RV, expected_RV, **tolerance)
    torch.testing.assert_close(marginal_cells.softmax_sums_backward(logits_RV, *rest), expected_RV, **tolerance)


def test_many_chunks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_marginal, "CHUNK_ROWS", 3)
    check_against_brute_force(random_case(8, [6, 1, 4]))


def test_each_rows_sums_are_made_once_its_gradient_included(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_marginal, "CHUNK_ROWS", 4)
    summed, plain = list[int](), marginal_cells.sum_cells

    def counted(logits_RV: torch.Tensor, *rest: Any) -> Any:
        summed.append(len(logits_RV))
        return plain(logits_RV, *rest)

    monkeypatch.setattr(marginal_cells, "sum_cells", counted)
    case = random_case(8, [6, 1, 4])
    num_rows = len(case.batch.extra["state_R"])
    check_against_brute_force(case)
    assert sum(summed) == num_rows and len(summed) == -(-num_rows // 4) > 1


def test_positions_where_the_student_dropped_too_much_are_not_counted() -> None:
    case = random_case(9, [9, 9])
    token_end_P = case.marginals()[0].token_end_P
    case.interface.max_dropped = float(token_end_P[token_end_P > 0].median())
    scores = case.interface(case.logits_BLV, case.batch, torch.nn.Identity())
    assert scores.logits_PV.dtype == torch.float32
    assert torch.equal(scores.counted_P, token_end_P <= case.interface.max_dropped)
    assert scores.counted_P.any() and not scores.counted_P.all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def tiny_student(folder: Path, run: Path, documents: list[bytes], **train: Any) -> tuple[Student, Case]:
    """Make a student as the trainer builds it, and a case over its own tokenizer."""
    tokenizer = ByteTokenizer.load(str(folder))
    if not (run / "start").exists():
        (run / "start").symlink_to(folder)
    student = build_student(
        make_recipe(run, folder, run, train, interface="token_marginal", max_dropped=0.1),
        tokenizer,
        SpecialIds(268, (268,)),
    )
    assert isinstance(student.interface, TokenMarginal) and student.interface.max_dropped == 0.1
    case = Case(0, [(tokenizer.encode(d), None) for d in documents], list(tokenizer.token_bytes), 268, padding=0)
    return student, case


@pytest.mark.parametrize(("tied", "frozen", "softcap"), [(True, False, None), (False, True, None), (False, False, 1.5)])
def test_gradients_of_a_students_weights_are_those_of_brute_force(
    tied: bool, frozen: bool, softcap: float | None, tiny: Path, tmp_path: Path
) -> None:
    student, case = tiny_student(tiny, tmp_path, [b"the thing and", b"in the"])
    lm = student.lm.double()
    if not tied:
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone(), requires_grad=not frozen)
    student.logit_softcap = softcap
    hidden_BLD = lm.base_model(input_ids=case.batch.tokens_BL, use_cache=False).last_hidden_state
    case.logits_BLV = student.token_logits(hidden_BLD)
    expected_PV = brute_force(case)
    found, _ = case.interface.marginals(hidden_BLD, case.batch, student.token_logits)
    cotangent_PV = torch.randn_like(expected_PV)
    weights = [p for p in lm.parameters() if p.requires_grad]
    is_possible_PV = expected_PV > -torch.inf
    twin = torch.where(is_possible_PV, expected_PV * cotangent_PV, 0.0)[is_possible_PV].sum()
    ours = (found.logprobs_PV * cotangent_PV)[is_possible_PV].sum()
    expected = torch.autograd.grad(twin, weights, retain_graph=True)
    for one, other in zip(torch.autograd.grad(ours, weights), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_under_bfloat16_the_loss_and_its_gradient_are_those_of_float32_within_its_digits(
    tiny: Path, tmp_path: Path
) -> None:
    objectives = {"ce": 0.3, "byte_ce": 1.0, "kl": 1.0, "alm": 0.0}
    losses, gradients = [], []
    for dtype in ("float32", "bfloat16"):
        student, case = tiny_student(
            tiny, tmp_path, [b"the thing and", b"in the", b"er"], dtype=dtype, objectives=objectives
        )
        nats, _ = student(case.batch)
        nats.backward()
        losses.append(nats.item())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
