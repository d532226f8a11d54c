"""Objectives on tokens against float64 twins that follow the definitions position by position."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.token_alternatives import TokenAlternatives
from stage2_student.data.micro_batch import Layout, MicroBatch
from stage2_student.losses.divergences import MIN_TAIL
from stage2_student.losses.edit_distance import edit_distance
from stage2_student.losses.inputs import CHUNK_ROWS
from stage2_student.losses.objectives import ON_TOKENS, objectives_on_tokens
from stage2_student.losses.ranked import _has_rank
from stage2_student.losses.token_divergence import TokenKL
from stage2_student.losses.token_objective import Alternatives, TokenObjective
from stage2_student.losses.vocabulary_map import TokenizerPair
from tests.support.tiny import MERGES
from tests.support.token_records import (
    TEACHER_MERGES,
    HeadAlone,
    Taught,
    micro_batch,
    pair_of,
    slow_chunks,
    taught,
)
from tests.zoo.spellings import small

ACROSS = tuple(name for name in ON_TOKENS if name != "token_kl")


def train_of(name: str, **values: object) -> TrainConfig:
    return TrainConfig.model_validate({"objectives": {"ce": 0.0, "kl": 0.0, name: 1.0}, "cdm_candidates": 6, **values})


@dataclass(frozen=True)
class Case:
    """Documents in a micro-batch, a student's next-token distributions, and the settings."""

    pair: TokenizerPair
    documents: Sequence[Taught]
    batch: MicroBatch
    train: TrainConfig
    student: HeadAlone

    def stored(self, document: Taught, token: int) -> dict[int, float]:
        """Return the stored probabilities of the teacher's token by id; at most `token_top_k`, the largest."""
        tokens = document.encoded.record.tokens
        assert tokens is not None
        inside = slice(int(tokens.offsets[token]), int(tokens.offsets[token + 1]))
        pairs = list(zip(tokens.ids[inside].tolist(), tokens.log_probs[inside].tolist(), strict=True))
        return {token: math.exp(logprob) for token, logprob in pairs[: self.train.token_top_k]}

    def ranked(self, document: Taught, token: int) -> dict[int, float]:
        """Return the stored probabilities without the text's own, if a token that is not stored may be above it."""
        tokens, stored = document.encoded.record.tokens, self.stored(document, token)
        assert tokens is not None
        inside = slice(int(tokens.offsets[token]), int(tokens.offsets[token + 1]))
        ids, probs = tokens.ids[inside].tolist(), np.exp(tokens.log_probs[inside].astype(np.float64))
        own = int(tokens.token_ids[token])
        if len(ids) > 1 and ids[-1] == own and 1 - probs.sum() > probs[-1]:
            stored.pop(own, None)
        return stored

    def spelled(self, token: int) -> bytes | None:
        """Return the bytes of one of the teacher's tokens; None for control tokens."""
        return self.pair.teacher.token_bytes[token]

    def kl(self, logprobs_V: Tensor, target: dict[int, float], with_tail: bool | None = None) -> Tensor:
        """Compute the divergence over the classes of a target and the tail."""
        with_tail = self.train.token_tail == "class" if with_tail is None else with_tail
        ids = list(target)
        teacher, student = list(target.values()), [logprobs_V[i].exp() for i in ids]
        if with_tail:
            rest = [i for i in range(len(logprobs_V)) if i not in target]
            teacher.append(max(1 - sum(teacher), MIN_TAIL))
            student.append(logprobs_V[rest].exp().sum())
        if not student:
            return logprobs_V.sum() * 0
        temperature, direction = self.train.kl_temperature, self.train.kl_direction
        t, q = (v ** (1 / temperature) for v in (torch.tensor(teacher, dtype=torch.float64), torch.stack(student)))
        t, q = t / t.sum(), q / q.sum()
        m = (t + q) / 2
        kinds = {"forward": [(1.0, t, q)], "reverse": [(1.0, q, t)], "jensen_shannon": [(0.5, t, m), (0.5, q, m)]}
        return temperature**2 * sum(w * (a * (a / b).log()).sum() for w, a, b in kinds[direction])  # type: ignore[return-value]

    def states(self) -> list[tuple[Taught, Tensor]]:
        """Return each document with its states' log-probabilities: L x V."""
        logprobs_SV = self.student.logprobs()
        firsts = self.batch.layout.firsts
        return [(one, logprobs_SV[first:]) for one, first in zip(self.documents, firsts, strict=True)]


def mapped(case: Case, stored: dict[int, float], find: Callable[[bytes], int | None]) -> dict[int, float]:
    target: dict[int, float] = {}
    for token, prob in stored.items():
        spelled = case.spelled(token)
        ours = case.pair.student_end if token in case.pair.teacher_ends else find(spelled) if spelled else None
        if ours is not None:
            target[ours] = target.get(ours, 0.0) + prob
    return target


def twin_of(case: Case, spelled: bytes) -> int | None:
    ours = case.pair.student.token_bytes
    return ours.index(spelled) if spelled in ours else None


def longest_prefix(case: Case, spelled: bytes) -> int | None:
    ours = case.pair.student.token_bytes
    return max((i for i, one in enumerate(ours) if one and spelled.startswith(one)), key=lambda i: len(ours[i] or b""))


def ends(case: Case, with_tail: bool | None = None) -> Tensor:
    """Compute the divergence at each document's end: END, or anything else."""
    end = case.pair.teacher_ends[0]
    return torch.stack(
        [
            case.kl(
                states[len(one.encoded.tokens)], {case.pair.student_end: math.exp(one.logprobs_TV[-1, end])}, with_tail
            )
            for one, states in case.states()
        ]
    ).sum()


def strict_kl(case: Case) -> Tensor:
    total = ends(case)
    for one, states in case.states():
        for _, _, ours, theirs in slow_chunks(one.encoded):
            if len(ours) == len(theirs) == 1:
                target = mapped(case, case.stored(one, theirs[0]), lambda spelled: twin_of(case, spelled))
                total = total + case.kl(states[ours[0]], target)
    return total


def bpm_kl(case: Case) -> Tensor:
    total = ends(case)
    for one, states in case.states():
        for start, _, ours, theirs in slow_chunks(one.encoded):
            if one.encoded.record.document[start : start + 2] != b"  ":
                target = mapped(case, case.stored(one, theirs[0]), lambda spelled: longest_prefix(case, spelled))
                total = total + case.kl(states[ours[0]], target)
    return total


def mined(case: Case) -> Tensor:
    total = ends(case, with_tail=True)
    nearest = case.pair.nearest_teacher.tolist()
    for one, states in case.states():
        for _, _, ours, theirs in slow_chunks(one.encoded):
            if len(ours) == len(theirs) == 1:
                stored = case.stored(one, theirs[0])
                masses = {token: stored[near] for token, near in enumerate(nearest) if near in stored}
                whole = sum(masses.values()) + 1 - sum(stored.values())
                target = {token: mass / whole for token, mass in masses.items()}
                total = total + case.kl(states[ours[0]], target, with_tail=True)
            else:
                for token in ours:
                    certain = {int(one.encoded.tokens[token]): 1.0}
                    total = total + case.kl(states[token], certain, with_tail=True)
    return total


def xtoken_kl(case: Case) -> Tensor:
    ids_VJ, weights_VJ = case.pair.projection
    total = torch.zeros((), dtype=torch.float64)
    for one, states in case.states():
        for _, _, ours, theirs in slow_chunks(one.encoded):
            teacher: dict[int, float] = {}
            for token in theirs:
                for known, prob in case.stored(one, token).items():
                    teacher[known] = teacher.get(known, 0.0) + prob / len(theirs)
            projected = torch.zeros(len(case.pair.teacher.token_bytes), dtype=torch.float64)
            for token in ours:
                probs_V = states[token].exp() / len(ours)
                for v in range(len(ids_VJ)):
                    for known, weight in zip(ids_VJ[v].tolist(), weights_VJ[v].tolist(), strict=True):
                        if weight and known in teacher:
                            projected = projected.index_add(0, torch.tensor([known]), (probs_V[v] * weight)[None])
            rest = [1 - projected[list(teacher)].sum()] if case.train.token_tail == "class" else []
            left = [max(1 - sum(teacher.values()), MIN_TAIL)] if case.train.token_tail == "class" else []
            q = torch.stack([projected[i].clamp(min=1e-10) for i in teacher] + [r.clamp(min=MIN_TAIL) for r in rest])
            t = torch.tensor([*teacher.values(), *left], dtype=torch.float64)
            t, q = (v ** (1 / case.train.kl_temperature) for v in (t, q))
            t, q = t / t.sum(), q / q.sum()
            total = total + case.train.kl_temperature**2 * (t * (t / q).log()).sum()
    return total


def chain(case: Case, one: Taught, states: Tensor, ours: list[int], theirs: list[int]) -> tuple[Tensor, float]:
    """Return the probability of a chunk's tokens before its last, by student and teacher."""
    student = [states[token, int(one.encoded.tokens[token])] for token in ours[:-1]]
    tokens = one.encoded.record.tokens
    assert tokens is not None
    teacher = float(tokens.token_log_probs[theirs[:-1]].astype(np.float64).sum())
    return torch.stack(student).sum().exp() if student else torch.ones((), dtype=torch.float64), math.exp(teacher)


def uld(case: Case) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one, states in case.states():
        for _, _, ours, theirs in slow_chunks(one.encoded):
            before, teacher_before = chain(case, one, states, ours, theirs)
            stored = sorted(case.ranked(one, theirs[-1]).values(), reverse=True)
            largest = states[ours[-1]].exp().sort(descending=True).values[: len(stored)]
            t = torch.tensor(stored, dtype=torch.float64)
            total = total + (before * largest - teacher_before * t).abs().sum()
            total = total + (before * (1 - largest.sum()) - teacher_before * (1 - t.sum())).abs()
    return total


def gold(case: Case) -> Tensor:
    matched = sorted({int(v) for v in case.pair.exact if v >= 0})
    unmatched = [v for v in range(case.pair.student_rows) if v not in matched]
    share = float((case.pair.exact >= 0).mean())
    total = torch.zeros((), dtype=torch.float64)
    for one, states in case.states():
        for _, _, ours, theirs in slow_chunks(one.encoded):
            before, teacher_before = chain(case, one, states, ours, theirs)
            probs_V, stored = states[ours[-1]].exp(), case.stored(one, theirs[-1])
            twins = mapped(case, stored, lambda spelled: twin_of(case, spelled))
            ranked = case.ranked(one, theirs[-1])
            others = sorted((p for token, p in ranked.items() if case.pair.exact[token] < 0), reverse=True)
            q = torch.stack([*(probs_V[v] for v in twins), probs_V[[v for v in matched if v not in twins]].sum()])
            t = torch.tensor([*twins.values(), 1 - sum(stored.values())], dtype=torch.float64)
            q, t = (before * q).clamp(min=1e-8), (teacher_before * t).clamp(min=1e-8)
            m = (q + t) / 2
            divergence = ((q * (q / m).log()).sum() + (t * (t / m).log()).sum()) / 2
            largest = probs_V[unmatched].sort(descending=True).values[: len(others)]
            distance = (before * largest - teacher_before * torch.tensor(others, dtype=torch.float64)).abs().sum()
            total = total + share * divergence + (1 - share) * distance
    return total


def cdm(case: Case) -> Tensor:
    ours_bytes, theirs_bytes = case.pair.student.token_bytes, case.pair.teacher.token_bytes
    teacher_twin = {int(s): t for t, s in reversed(list(enumerate(case.pair.exact.tolist()))) if s >= 0}

    def apart(student: int, teacher: int) -> float:
        a = (ours_bytes[student] or b"" if student < len(ours_bytes) else b"").replace(b" ", b"")
        b = (theirs_bytes[teacher] or b"").replace(b" ", b"")
        return edit_distance(a, b) / len(a + b) if a and b else 1.0

    def nearest(candidates: list[int], distance: Callable[[int], float]) -> int | None:
        best = min(candidates, key=distance, default=None)
        return best if best is not None and distance(best) < case.train.cdm_max_distance else None

    total = torch.zeros((), dtype=torch.float64)
    for one, states in case.states():
        for _, _, ours, theirs in slow_chunks(one.encoded):
            if not len(ours) == len(theirs) == 1:
                continue
            stored = case.stored(one, theirs[0])
            likely = states[ours[0]].topk(case.train.cdm_candidates).indices.tolist()
            lone_students = [v for v in likely if v not in teacher_twin]
            lone_teachers = [v for v in sorted(stored) if case.pair.exact[v] < 0]
            pairs: list[tuple[int | None, int | None]] = []
            for teacher in stored:
                twin = int(case.pair.exact[teacher])
                student = twin if twin >= 0 else nearest(lone_students, lambda v, t=teacher: apart(v, t))  # type: ignore[misc]
                pairs.append((student, teacher))
            for student in likely:
                twin_there = teacher_twin.get(student)
                partner = nearest(lone_teachers, lambda v, s=student: apart(s, v)) if twin_there is None else twin_there  # type: ignore[misc]
                pairs.append((student, partner if partner in stored else None))
            known = [(s, t) for s, t in pairs if s is not None and t is not None]
            t = torch.tensor([stored[t] for _, t in known], dtype=torch.float64)
            q = torch.stack([states[ours[0], s].exp() for s, _ in known])
            total = total + (t / t.sum() * ((t / t.sum()) / (q / q.sum())).log()).sum()
    return total


TWINS = {
    "strict_kl": strict_kl,
    "bpm_kl": bpm_kl,
    "mined": mined,
    "xtoken_kl": xtoken_kl,
    "uld": uld,
    "gold": gold,
    "cdm": cdm,
}
SETTINGS: dict[str, dict[str, object]] = {
    "as it is": {},
    "few, renormalised": {"token_top_k": 2, "token_tail": "drop", "cdm_max_distance": 0.6},
    "reverse, tempered": {"kl_direction": "reverse", "kl_temperature": 2.0},
    "jensen_shannon": {"kl_direction": "jensen_shannon"},
}
DIVERGENCES = ("strict_kl", "bpm_kl", "mined")


def case_of(name: str, seed: int, pair: TokenizerPair, settings: dict[str, object]) -> tuple[Case, TokenObjective]:
    train = train_of(name, **settings)
    documents = [taught(pair, seed), taught(pair, seed + 100)]
    batch = micro_batch(pair, [one.encoded for one in documents])
    [objective] = objectives_on_tokens(pair, train).values()
    extra = objective.tensors([one.encoded for one in documents], batch.layout)
    batch = replace(batch, extra=extra)
    return Case(pair, documents, batch, train, HeadAlone.drawn(pair, batch, seed)), objective


@pytest.fixture(scope="module")
def pair() -> TokenizerPair:
    return pair_of()


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, "as it is") for name in ACROSS]
    + [(name, "few, renormalised") for name in ACROSS]
    + [(name, other) for name in DIVERGENCES for other in ("reverse, tempered", "jensen_shannon")],
)
def test_an_objective_and_its_gradient_are_the_definition(pair: TokenizerPair, name: str, settings: str) -> None:
    case, objective = case_of(name, 7, pair, SETTINGS[settings])
    nats, twin = case.student.nats(objective, case.batch, case.train), TWINS[name](case)
    assert nats.ndim == 0 and twin > 0.05
    torch.testing.assert_close(nats.double(), twin, rtol=2e-5, atol=1e-4)
    for ours, theirs in zip(case.student.gradients(nats), case.student.gradients(twin), strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ACROSS)
def test_documents_of_one_batch_count_as_they_do_alone(pair: TokenizerPair, name: str) -> None:
    case, objective = case_of(name, 3, pair, {})
    whole = case.student.nats(objective, case.batch, case.train)
    alone = []
    for row, one in enumerate(case.documents):
        length = len(one.encoded.tokens) + 1
        batch = micro_batch(pair, [one.encoded])
        batch = replace(batch, extra=objective.tensors([one.encoded], Layout.of([length])))
        student = HeadAlone(case.student.hidden_BLD[row : row + 1, :length], case.student.head_VD)
        alone.append(student.nats(objective, batch, case.train))
    torch.testing.assert_close(whole, torch.stack(alone).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ACROSS)
def test_a_rank_without_documents_gets_a_zero_with_a_gradient(pair: TokenizerPair, name: str) -> None:
    case, objective = case_of(name, 1, pair, {})
    labels_BL = torch.full((1, 1), -100)
    extra = objective.tensors([], Layout((1, 1), ()))
    batch = replace(case.batch, layout=Layout((1, 1), ()), labels_BL=labels_BL, extra=extra)
    student = HeadAlone(case.student.hidden_BLD[:1, :1], case.student.head_VD)
    nats = student.nats(objective, batch, case.train)
    assert nats.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(nats, (student.hidden_BLD, student.head_VD)))


@pytest.mark.parametrize("name", [*ON_TOKENS])
def test_a_dump_without_tokens_is_refused_with_the_way_to_get_them(name: str) -> None:
    pair = pair_of(TEACHER_MERGES, TEACHER_MERGES)
    one = taught(pair, 0).encoded
    [objective] = objectives_on_tokens(pair, train_of(name)).values()
    without = replace(one, record=replace(one.record, tokens=None))
    with pytest.raises(ValueError, match=r"d0: the dump holds no alternatives.*dump\.tokens=\{top_k: 16\}"):
        objective.tensors([without], Layout.of([len(one.tokens) + 1]))


def test_the_next_tokens_divergence_needs_the_teachers_tokenizer(pair: TokenizerPair) -> None:
    with pytest.raises(ValueError, match=r"token_kl needs a student with the teacher's tokenizer.*strict_kl"):
        objectives_on_tokens(pair, train_of("token_kl"))


@pytest.mark.parametrize("merges", [MERGES, TEACHER_MERGES])
def test_with_one_tokenizer_every_position_is_strict_and_everything_stored_is_the_divergence_itself(
    merges: list[str],
) -> None:
    pair = pair_of(merges, merges)
    train = train_of("token_kl")
    one = taught(pair, 5, top_k=10**6)
    [token_kl] = objectives_on_tokens(pair, train).values()
    [strict] = objectives_on_tokens(pair, train_of("strict_kl")).values()
    batch = micro_batch(pair, [one.encoded])
    student = HeadAlone.drawn(pair, batch)
    found = []
    for objective in (token_kl, strict):
        extra = objective.tensors([one.encoded], batch.layout)
        assert len(extra[f"{objective.name}_state_R"]) == len(one.encoded.tokens) + 1  # END too
        found.append(student.nats(objective, replace(batch, extra=extra), train))
    teacher_TV = torch.from_numpy(one.logprobs_TV)
    logprobs_TV = student.logprobs()[: len(teacher_TV)]
    tail_T1 = logprobs_TV[:, teacher_TV.shape[1] :].logsumexp(-1, keepdim=True)  # the head's rows of padding
    dense = (teacher_TV.exp() * (teacher_TV - logprobs_TV[:, : teacher_TV.shape[1]])).sum(-1)[:-1].sum()
    end = teacher_TV[-1, pair.teacher_ends[0]].exp()
    q = logprobs_TV[-1, pair.student_end].exp()
    dense = dense + end * (end / q).log() + (1 - end) * ((1 - end) / (1 - q)).log()
    dense = dense + (MIN_TAIL * (math.log(MIN_TAIL) - tail_T1[:-1])).sum()  # what is not known of nothing
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0].double(), dense, rtol=1e-4, atol=1e-3)


def with_token(pair: TokenizerPair, spelled: bytes | None) -> tuple[TokenizerPair, int]:
    """Return the pair with another spelling of one token that no document has, in both vocabularies; and its id."""
    token, tokenizer = pair.teacher.token_bytes.index(b"\xc0"), pair.student
    assert isinstance(tokenizer, ByteTokenizer)
    vocabulary = (*tokenizer.token_bytes[:token], spelled, *tokenizer.token_bytes[token + 1 :])
    stand_in = SimpleNamespace(token_bytes=vocabulary, encode_batch=tokenizer.encode_batch, prefix=tokenizer.prefix)
    return replace(pair, teacher=stand_in, student=stand_in), token


@pytest.mark.parametrize("name", [*ON_TOKENS])
@pytest.mark.parametrize("top_k", [1, 5])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str, top_k: int) -> None:
    pair = pair_of(TEACHER_MERGES, TEACHER_MERGES)
    pair = replace(pair, student_rows=len(pair.teacher.token_bytes))
    check_nothing_to_learn(pair, name, top_k)


def test_a_token_that_spells_the_same_as_another_is_still_itself_with_one_tokenizer() -> None:
    pair, _ = with_token(pair_of(TEACHER_MERGES, TEACHER_MERGES), b"the")
    check_nothing_to_learn(replace(pair, student_rows=len(pair.teacher.token_bytes)), "token_kl", 5)


def test_each_of_a_teachers_ends_is_the_students_with_one_tokenizer() -> None:
    pair, other = with_token(pair_of(TEACHER_MERGES, TEACHER_MERGES), None)
    pair = replace(pair, teacher_ends=(pair.student_end, other), student_rows=len(pair.teacher.token_bytes))
    assert (
        TokenKL(pair, train_of("token_kl")).student_of_V[[pair.student_end, other]].tolist() == [pair.student_end] * 2
    )


def test_a_texts_own_token_has_a_rank_unless_it_is_stored_beyond_the_most_probable() -> None:
    logs = np.log(np.array([0.3, 0.5, 0.01, 0.5, 0.4], np.float32))
    own_logs = logs[[0, 2, 4]]
    ids, offsets = np.array([7, 5, 7, 5, 7], np.int32), np.array([0, 1, 3, 5])
    tokens = TokenAlternatives(offsets, ids, logs, np.full(3, 7, np.int32), own_logs, np.zeros(4, np.float32))
    rows = np.arange(3)
    found = _has_rank(tokens, rows, Alternatives.of(tokens, rows))
    # The only one stored is the first; 0.01 may have others of 0.49 before it; 0.4 has at most 0.1 after it.
    assert found.tolist() == [True, True, False, True, True]


def pair_of_kinds(teacher: str, student: str, work: Path) -> TokenizerPair:
    """Load two tokenizers of the zoo's kinds (`tests.zoo.spellings.SMALL`)."""
    loaded = []
    for kind in (teacher, student):
        spelling = small(kind, work)
        tokenizer = ByteTokenizer.load(spelling.folder)
        loaded.append((tokenizer, tokenizer.token_id(spelling.end)))
    (theirs, their_end), (ours, our_end) = loaded
    return TokenizerPair(theirs, ours, (their_end,), our_end, len(ours.token_bytes))


ODD_DOCUMENTS = (
    b"",
    b"a",
    " \U0001f600".encode(),
    b"\x00 in",
    b"<|endoftext|></s>",
    b"  the\r\n\r\nriver  ",
    b"hill " * 40,
)
KINDS = ("byte-bpe", "sp-bpe", "sp-bpe-no-prefix", "sp-unigram", "bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_odd_documents(kind: str, odd_work: Path) -> None:
    pair = pair_of_kinds(kind, kind, odd_work)
    # Of SentencePiece's byte tokens beside letters, objectives across tokenizers take one: random models favour both.
    for name in ("token_kl", "uld") if kind.startswith("sp-") else ON_TOKENS:
        for document in ODD_DOCUMENTS:
            check_nothing_to_learn(pair, name, 5, document)


@pytest.fixture(scope="module")
def odd_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.mark.parametrize("kinds", [(a, b) for a in KINDS for b in KINDS if a != b], ids="-".join)
def test_odd_documents_have_a_finite_loss_and_gradient_between_all_kinds_of_tokenizers(
    kinds: tuple[str, str], odd_work: Path
) -> None:
    pair = pair_of_kinds(*kinds, odd_work)
    documents = [taught(pair, seed, document=document) for seed, document in enumerate(ODD_DOCUMENTS)]
    encoded = [one.encoded for one in documents]
    for name in ACROSS:
        [objective] = objectives_on_tokens(pair, train_of(name)).values()
        batch = micro_batch(pair, encoded, [3, len(encoded) - 3])
        batch = replace(batch, extra=objective.tensors(encoded, batch.layout))
        student = HeadAlone.drawn(pair, batch)
        nats = student.nats(objective, batch, train_of(name))
        assert torch.isfinite(nats) and nats > 0, name
        assert all(torch.isfinite(gradient).all() for gradient in student.gradients(nats)), name


def check_nothing_to_learn(pair: TokenizerPair, name: str, top_k: int, document: bytes | None = None) -> None:
    one = taught(pair, 3, top_k, document=document)
    [objective] = objectives_on_tokens(pair, train_of(name)).values()
    batch = micro_batch(pair, [one.encoded])
    batch = replace(batch, extra=objective.tensors([one.encoded], batch.layout))
    logits_BLV = torch.from_numpy(one.logprobs_TV)[None].requires_grad_()
    student = HeadAlone(logits_BLV, torch.eye(pair.student_rows, dtype=torch.float64).requires_grad_())
    assert abs(student.nats(objective, batch, train_of(name)).item()) < 1e-4, (name, document)


def test_the_order_in_which_a_teacher_names_its_ends_changes_nothing() -> None:
    pair, other = with_token(pair_of(TEACHER_MERGES, TEACHER_MERGES), None)
    found = []
    for teacher_ends in ((pair.student_end, other), (other, pair.student_end)):
        of_order = replace(pair, teacher_ends=teacher_ends)
        one = taught(of_order, 4)
        [cdm_of_order] = objectives_on_tokens(of_order, train_of("cdm")).values()
        batch = micro_batch(pair, [one.encoded])
        batch = replace(batch, extra=cdm_of_order.tensors([one.encoded], batch.layout))
        found.append(HeadAlone.drawn(pair, batch).nats(cdm_of_order, batch, train_of("cdm")))
    torch.testing.assert_close(found[0], found[1])


def test_draws_in_place_of_the_most_probable_tokens_have_the_dense_gradient_on_average() -> None:
    """Sparse Logit Sampling: counts of draws over their number, which sum to 1, are an unbiased target."""
    pair = pair_of(TEACHER_MERGES, TEACHER_MERGES)
    one, train = taught(pair, 2, top_k=10**6, num_words=3), train_of("token_kl")
    [objective] = objectives_on_tokens(pair, train).values()
    batch = micro_batch(pair, [one.encoded])
    student = HeadAlone.drawn(pair, batch)
    rng = np.random.default_rng(0)

    def gradient(encoded: object) -> Tensor:
        extra = objective.tensors([encoded], batch.layout)  # type: ignore[list-item]
        return student.gradients(student.nats(objective, replace(batch, extra=extra), train))[0]

    drawn = [
        gradient(replace(one.encoded, record=replace(one.encoded.record, tokens=draws(one, rng)))) for _ in range(300)
    ]
    mean, dense = torch.stack(drawn).mean(0), gradient(one.encoded)
    spread = torch.stack(drawn).std(0) / math.sqrt(120)
    assert ((mean - dense).abs() <= 5 * spread + 2e-3).all()
    assert (mean - dense).norm() < 0.3 * (drawn[0] - dense).norm()


def draws(one: Taught, rng: np.random.Generator, count: int = 12) -> object:
    """Return the alternatives of a record as draws from the teacher's distributions."""
    tokens = one.encoded.record.tokens
    assert tokens is not None
    ids, logprobs, sizes = [], [], [0]
    for logprobs_V in one.logprobs_TV[:-1]:
        probs_V = np.exp(logprobs_V)
        found, counts = np.unique(rng.choice(len(probs_V), count, p=probs_V / probs_V.sum()), return_counts=True)
        ids.append(found)
        logprobs.append(np.log(counts / count))
        sizes.append(len(found))
    return replace(
        tokens,
        offsets=np.cumsum(sizes),
        ids=np.concatenate(ids).astype(np.int32),
        log_probs=np.concatenate(logprobs).astype(np.float32),
    )


def test_runs_of_spaces_are_left_out_of_the_root_projection() -> None:
    pair = pair_of(["t h"], ["Ġ Ġ", "ĠĠ ĠĠ"])
    one = taught(pair, 0, document=b"the     in  a th")
    [objective] = objectives_on_tokens(pair, train_of("bpm_kl")).values()
    state_R = objective.tensors([one.encoded], Layout.of([20]))["bpm_kl_state_R"].tolist()
    spelled = [pair.student.token_bytes[int(token)] for token in one.encoded.tokens]
    at_shared = [ours[0] for _, _, ours, _ in slow_chunks(one.encoded)]
    kept = [state for state in at_shared if spelled[state] not in (b"  ", b"    ")]
    assert state_R == [*kept, len(spelled)] and len(kept) < len(at_shared)  # the last is END


def test_a_first_token_with_a_dummy_prefix_is_compared_only_with_one_that_has_it_too(pair: TokenizerPair) -> None:
    one = taught(pair, 0, document=b"the river")
    bytes_of = list(pair.student.token_bytes)
    first = int(one.encoded.tokens[0])
    for text, counts in ((b" the", 0), (b"the", 1)):
        bytes_of[first] = text
        prefixed = SimpleNamespace(token_bytes=tuple(bytes_of), encode_batch=pair.student.encode_batch)
        [objective] = objectives_on_tokens(replace(pair, student=prefixed), train_of("bpm_kl")).values()
        states = objective.tensors([one.encoded], Layout.of([20]))["bpm_kl_state_R"].tolist()
        assert states.count(0) == counts


def test_more_states_than_a_part_of_the_head_count_alike(pair: TokenizerPair) -> None:
    train = train_of("strict_kl")
    one = taught(pair, 11, num_words=120)
    [objective] = objectives_on_tokens(pair, train).values()
    batch = micro_batch(pair, [one.encoded])
    batch = replace(batch, extra=objective.tensors([one.encoded], batch.layout))
    assert len(batch.extra["strict_kl_state_R"]) > CHUNK_ROWS
    student = HeadAlone.drawn(pair, batch)
    nats = student.nats(objective, batch, train)
    case = Case(pair, [one], batch, train, student)
    torch.testing.assert_close(nats.double(), strict_kl(case), rtol=1e-4, atol=1e-3)
