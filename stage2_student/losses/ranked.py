"""Objectives that compare sorted probabilities, where tokens of the two vocabularies have nothing in common: ULD, GOLD.

Both compare chunks, the shortest runs of tokens of both models over the same bytes: the distribution of a run's last
token, times the probability of its earlier ones (the chain rule). TRL's default merge reads each distribution one token
late (`uld_token_merge_strategy: observed`); this is its `bayesian`.

A dump stores a teacher's most probable tokens, so sorted probabilities beyond those are one class on both sides. The
text's own token is stored whatever its rank: it counts as a rank only where it must have that one.

Shape legend: C chunks, K alternatives of the teacher's last token in a chunk (padded), V the student's vocabulary, N
supervised tokens, B rows, L tokens.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.config import TrainConfig
from schemas.token_alternatives import TokenAlternatives
from stage2_student.data.examples import NO_LABEL, NO_SYMBOL, Encoded
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.inputs import ObjectiveInputs
from stage2_student.losses.token_alignment import Chunks, chunks
from stage2_student.losses.token_objective import (
    Alternatives,
    TokenObjective,
    in_batch,
    padded_alike,
    stored_tokens,
)
from stage2_student.losses.vocabulary_map import NO_TOKEN, TokenizerPair, translated

_NO_CHUNK = -1
_FLOOR = 1e-8  # minimum probability under a logarithm (TRL's)


class ChunkObjective(TokenObjective):
    """An objective on chunks: a state that predicts each one's last token, and the tokens before that."""

    uses_nats = True

    def _of_chunks(self, documents: Sequence[Encoded], found: Sequence[Chunks], layout: Layout) -> dict[str, Tensor]:
        """Return the student's side of chunks, and the teacher's log-probability of what comes before the last token.

        Returns:
            NAME_state_C: the state that predicts a chunk's last token.
            NAME_before_BL: the chunk of each token that is not its chunk's last, else -1.
            NAME_teacher_before_C: float32 nats.
        """
        before_BL = np.full(layout.shape, _NO_CHUNK, dtype=np.int64)
        before_S, count = before_BL.reshape(-1), 0
        earlier = [np.empty(0)]
        for encoded, of_document, first in zip(documents, found, layout.firsts, strict=True):
            logprobs = stored_tokens(encoded).token_log_probs.astype(np.float64)
            sums = np.cumsum(np.append(0.0, logprobs))
            earlier.append(sums[of_document.teacher_C2[:, 1] - 1] - sums[of_document.teacher_C2[:, 0]])
            lengths_C = np.diff(of_document.student_C2)[:, 0] - 1
            of_token = np.repeat(np.arange(len(of_document)), lengths_C)
            place = np.arange(len(of_token)) - np.repeat(np.cumsum(lengths_C) - lengths_C, lengths_C)
            before_S[first + of_document.student_C2[of_token, 0] + place] = of_token + count
            count += len(of_document)
        return {
            f"{self.name}_state_C": in_batch([one.student_C2[:, 1] - 1 for one in found], layout),
            f"{self.name}_before_BL": torch.from_numpy(before_BL),
            f"{self.name}_teacher_before_C": torch.from_numpy(np.concatenate(earlier).astype(np.float32)),
        }

    def _student_before(self, inputs: ObjectiveInputs, num_chunks: int) -> Tensor:
        """Return C: the student's log-probability of each chunk's tokens before its last."""
        assert inputs.nats_N is not None
        chunk_N = inputs.batch.extra[f"{self.name}_before_BL"][inputs.batch.labels_BL != NO_LABEL]
        inside_N = chunk_N != _NO_CHUNK
        nats_N = inputs.nats_N.float()
        return nats_N.new_zeros(num_chunks).index_add(0, chunk_N[inside_N], -nats_N[inside_N])


class UniversalLogit(ChunkObjective):
    """The distance of the sorted probabilities: sum over ranks i of |p_(i) - q_(i)|, without regard to what they are.

    For each chunk: the teacher's stored probabilities in descending order beside as many of the student's largest, and
    what is left of both.

    Source: Universal Logit Distillation (Boizard et al. 2024, arXiv 2402.12030: Wasserstein distance of order 1 with a
    uniform cost). That pairs the i-th tokens of both texts, whatever they cover; here chunks are paired,
    as in TRL (`use_extended_uld`).
    """

    name: ClassVar[str] = "uld"

    def tensors(self, documents: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
        """Implement `TokenObjective.tensors`; beside `_of_chunks`, uld_probs_CK: descending, -1 at padding."""
        found = [chunks(encoded) for encoded in documents]
        parts = [self._probs(encoded, one) for encoded, one in zip(documents, found, strict=True)]
        width = max((part.shape[1] for part in parts), default=1)
        wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1.0) for part in parts]
        probs_CK = np.concatenate([np.empty((0, width)), *wide]).astype(np.float32)
        return {**self._of_chunks(documents, found, layout), "uld_probs_CK": torch.from_numpy(probs_CK)}

    def _probs(self, encoded: Encoded, found: Chunks) -> np.ndarray:
        tokens, last_C = stored_tokens(encoded), found.teacher_C2[:, 1] - 1
        stored = Alternatives.of(tokens, last_C, self.train.token_top_k)
        has_rank_A = _has_rank(tokens, last_C, stored)
        return _descending(stored.row_A[has_rank_A], np.exp(stored.logprob_A[has_rank_A]), len(found))

    def __call__(self, inputs: ObjectiveInputs) -> Tensor:
        """Implement `TokenObjective.__call__`."""
        extra = inputs.batch.extra
        teacher_CK, state_C = extra["uld_probs_CK"], extra["uld_state_C"]
        width = teacher_CK.shape[1]

        def largest(logits_rV: Tensor) -> Tensor:
            return logits_rV.softmax(-1).topk(min(width, logits_rV.shape[-1])).values

        student_CK = inputs.rows_of_head(state_C, largest)
        teacher_CK = teacher_CK[:, : student_CK.shape[1]]
        stored_CK = teacher_CK >= 0
        student_CK, teacher_CK = student_CK.where(stored_CK, 0.0), teacher_CK.where(stored_CK, 0.0)
        ours_C1 = self._student_before(inputs, len(state_C)).exp()[:, None]
        theirs_C1 = extra["uld_teacher_before_C"].exp()[:, None]
        apart = (ours_C1 * student_CK - theirs_C1 * teacher_CK).abs().sum()
        tails_C2 = torch.stack([ours_C1[:, 0] * (1 - student_CK.sum(-1)), theirs_C1[:, 0] * (1 - teacher_CK.sum(-1))])
        return apart + (tails_C2[0] - tails_C2[1]).abs().sum()


class GeneralLogit(ChunkObjective):
    """The sum of a Jensen-Shannon divergence of tokens that both vocabularies have, and ULD's distance of the others.

    For each chunk, with M the tokens of the same bytes: w JSD_M(p, q) + (1 - w) sum over ranks i of |p_(i) - q_(i)|
    outside M; w is M's share of the teacher's vocabulary, and JSD_M = (KL_M(p || m) + KL_M(q || m)) / 2 with m the
    mean; p and q are not normalised over M.

    Of a dump's teacher all that is not stored counts as one class of M, and ranks end with the teacher's last stored
    token outside M.

    Source: GOLD (Patino et al. 2025, "Unlocking On-Policy Distillation for Any Model Family"), as TRL computes it
    (`ULDLoss`, `uld_use_hybrid_loss`, beta 0.5, adaptive weights), on stored text instead of the student's own.
    """

    name: ClassVar[str] = "gold"

    def __init__(self, pair: TokenizerPair, train: TrainConfig) -> None:
        super().__init__(pair, train)
        is_matched_V = pair.exact != NO_TOKEN
        self.matched_share = float(is_matched_V.mean())
        self.is_matched_V = torch.zeros(pair.student_rows, dtype=torch.bool)
        self.is_matched_V[torch.from_numpy(np.unique(pair.exact[is_matched_V]))] = True

    def tensors(self, documents: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
        """Implement `TokenObjective.tensors`.

        Returns:
            Beside `_of_chunks`: gold_ids_CK and gold_logprobs_CK, the student's tokens of the stored ones that both
            vocabularies have; gold_others_CK, probabilities of the others, descending, -1 at padding;
            gold_unranked_C, that of the text's own token if it is one of the others and its rank is not known.
        """
        found = [chunks(encoded) for encoded in documents]
        ids, logprobs, others = [], [], []
        unranked: list[np.ndarray] = [np.empty(0)]
        for encoded, one in zip(documents, found, strict=True):
            tokens, last_C = stored_tokens(encoded), one.teacher_C2[:, 1] - 1
            stored = Alternatives.of(tokens, last_C, self.train.token_top_k)
            ids_CK, logprobs_CK = stored.mapped(self.pair.exact).padded(len(one))
            prob_A, has_rank_A = np.exp(stored.logprob_A), _has_rank(tokens, last_C, stored)
            is_other_A = translated(stored.id_A, self.pair.exact) == NO_TOKEN
            ranked_A, unranked_A = is_other_A & has_rank_A, is_other_A & ~has_rank_A
            others.append(_descending(stored.row_A[ranked_A], prob_A[ranked_A], len(one)))
            unranked.append(np.bincount(stored.row_A[unranked_A], prob_A[unranked_A], len(one)))
            ids.append(ids_CK)
            logprobs.append(logprobs_CK)
        width = max((part.shape[1] for part in (*ids, *others)), default=1)
        wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1.0) for part in others]
        return {
            **self._of_chunks(documents, found, layout),
            "gold_ids_CK": torch.from_numpy(padded_alike(ids, width, NO_SYMBOL)),
            "gold_logprobs_CK": torch.from_numpy(padded_alike(logprobs, width, 0).astype(np.float32)),
            "gold_others_CK": torch.from_numpy(np.concatenate([np.empty((0, width)), *wide]).astype(np.float32)),
            "gold_unranked_C": torch.from_numpy(np.concatenate(unranked).astype(np.float32)),
        }

    def __call__(self, inputs: ObjectiveInputs) -> Tensor:
        """Implement `TokenObjective.__call__`."""
        extra = inputs.batch.extra
        ids_CK, others_CK, state_C = extra["gold_ids_CK"], extra["gold_others_CK"], extra["gold_state_C"]
        is_matched_V, width = self.is_matched_V.to(ids_CK.device), ids_CK.shape[1]

        def kept(logits_rV: Tensor, ids_rK: Tensor) -> Tensor:
            """Keep the probabilities of the stored tokens of M, of M as a whole, and the largest outside M."""
            probs_rV = logits_rV.softmax(-1)
            stored_rK = probs_rV.gather(-1, ids_rK.clamp(min=0)).where(ids_rK != NO_SYMBOL, 0.0)
            whole_r1 = probs_rV.where(is_matched_V, 0.0).sum(-1, keepdim=True)
            others_rK = probs_rV.where(~is_matched_V, 0.0).topk(min(width, probs_rV.shape[-1])).values
            return torch.cat([stored_rK, whole_r1, others_rK], dim=-1)

        student_CF = inputs.rows_of_head(state_C, kept, ids_CK)
        ours_C1 = self._student_before(inputs, len(state_C)).exp()[:, None]
        theirs_C1 = extra["gold_teacher_before_C"].exp()[:, None]
        is_stored_CK, is_other_CK = ids_CK != NO_SYMBOL, others_CK >= 0
        teacher_CK = extra["gold_logprobs_CK"].exp().where(is_stored_CK, 0.0)
        teacher_others_CK = others_CK.where(is_other_CK, 0.0)
        teacher_rest_C = 1 - teacher_CK.sum(-1) - teacher_others_CK.sum(-1) - extra["gold_unranked_C"]
        teacher_rest_C1 = teacher_rest_C.clamp(min=0.0)[:, None]
        student_CK, whole_C1 = student_CF[:, :width], student_CF[:, width : width + 1]
        student_rest_C1 = (whole_C1 - student_CK.sum(-1, keepdim=True)).clamp(min=0.0)
        ours_CM = ours_C1 * torch.cat([student_CK, student_rest_C1], dim=-1)
        theirs_CM = theirs_C1 * torch.cat([teacher_CK, teacher_rest_C1], dim=-1)
        is_class_CM = torch.cat([is_stored_CK, torch.ones_like(is_stored_CK[:, :1])], dim=-1)
        divergence = _jensen_shannon(ours_CM, theirs_CM, is_class_CM)
        lacking = width - (student_CF.shape[1] - width - 1)  # of a vocabulary smaller than K
        student_others_CK = pad(student_CF[:, width + 1 :], (0, lacking))
        apart_CK = (ours_C1 * student_others_CK - theirs_C1 * teacher_others_CK).abs()
        distance = apart_CK.where(is_other_CK, 0.0).sum()
        return self.matched_share * divergence + (1 - self.matched_share) * distance


def _jensen_shannon(ours_CM: Tensor, theirs_CM: Tensor, is_class_CM: Tensor) -> Tensor:
    """Sum (KL(p || m) + KL(q || m)) / 2 of masses that need not sum to 1, without the terms that normalise."""
    log_p_CM, log_q_CM = ours_CM.clamp(min=_FLOOR).log(), theirs_CM.clamp(min=_FLOOR).log()
    p_CM, q_CM = log_p_CM.exp(), log_q_CM.exp()
    log_m_CM = ((p_CM + q_CM) / 2).log()
    terms_CM = (p_CM * (log_p_CM - log_m_CM) + q_CM * (log_q_CM - log_m_CM)) / 2
    return terms_CM.where(is_class_CM, 0.0).sum()


def _has_rank(tokens: TokenAlternatives, token_C: np.ndarray, stored: Alternatives) -> np.ndarray:
    """Return A, bool: an alternative's place is its rank in the teacher's whole vocabulary.

    False for a text's own token that is its row's last, if a token that is not stored may be more probable.
    """
    own_C = np.exp(tokens.token_log_probs[token_C].astype(np.float64))
    ranks_C = tokens.ranks[token_C]
    is_extra_C = (ranks_C > 0) & (ranks_C == tokens.counts[token_C] - 1) & (tokens.tails[token_C] > own_C)
    found: np.ndarray = ~(is_extra_C[stored.row_A] & (stored.id_A == tokens.token_ids[token_C][stored.row_A]))
    return found


def _descending(row_A: np.ndarray, value_A: np.ndarray, num_rows: int) -> np.ndarray:
    """Return rows x K: each row's values in descending order, -1 at padding."""
    order = np.lexsort((-value_A, row_A))
    counts_R = np.bincount(row_A, minlength=num_rows)
    place = np.arange(len(row_A)) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
    padded_RK = np.full((num_rows, max(1, int(counts_R.max(initial=1)))), -1.0)
    padded_RK[row_A[order], place] = value_A[order]
    return padded_RK
