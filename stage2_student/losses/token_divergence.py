"""Divergences of the student's next token from the teacher's, by what each knows of the other's vocabulary.

All share one form: rows where a state of the student stands beside a token of the teacher's, classes that are tokens of
the student's, and the rest of both distributions as one class (`train.token_tail`). They differ in the rows, and in how
the teacher's tokens become the student's.

Shape legend: as in `stage2_student.losses.token_objective`; C chunks.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from stage2_student.data.examples import NO_SYMBOL, Encoded
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.divergences import classes, divergence_of_classes
from stage2_student.losses.inputs import ObjectiveInputs
from stage2_student.losses.token_alignment import Chunks, chunks, ends_of_segments, prefix_lengths
from stage2_student.losses.token_objective import (
    Alternatives,
    Rows,
    TokenObjective,
    in_batch,
    joined,
    stored_tokens,
)
from stage2_student.losses.vocabulary_map import NO_TOKEN, TokenizerPair


class RowDivergence(TokenObjective):
    """The divergence of rows of the student's next-token distribution from targets over its own vocabulary."""

    always_tail: ClassVar[bool] = False  # whatever `train.token_tail` says

    @abstractmethod
    def rows(self, encoded: Encoded) -> Rows:
        """Return the rows of a document and their targets."""

    def tensors(self, documents: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
        """Implement `TokenObjective.tensors`."""
        parts = [self.rows(encoded) for encoded in documents]
        _, ids_RK, logprobs_RK = joined(parts)
        return {
            f"{self.name}_state_R": in_batch([rows.state_R for rows in parts], layout),
            f"{self.name}_ids_RK": torch.from_numpy(ids_RK),
            f"{self.name}_logprobs_RK": torch.from_numpy(logprobs_RK),
        }

    def __call__(self, inputs: ObjectiveInputs) -> Tensor:
        """Implement `TokenObjective.__call__`."""
        train, with_tail = inputs.train, self.always_tail or inputs.train.token_tail == "class"

        def nats(logits_rV: Tensor, ids_rK: Tensor, logprobs_rK: Tensor) -> Tensor:
            is_stored_rK = ids_rK != NO_SYMBOL
            both_rC = classes(logits_rV.log_softmax(-1), ids_rK, logprobs_rK, is_stored_rK)
            # Without the tail it is biased: what is stored is scaled up, and the rest may be anything.
            kept = (..., slice(None)) if with_tail else (is_stored_rK.any(-1), slice(-1))
            student_rC, teacher_rC, is_class_rC = (values_rC[kept] for values_rC in both_rC)
            how = train.kl_direction, train.kl_temperature
            return divergence_of_classes(student_rC, teacher_rC, is_class_rC, *how).reshape(1)

        state_R, ids_RK, logprobs_RK = (
            inputs.batch.extra[f"{self.name}_{part}"] for part in ("state_R", "ids_RK", "logprobs_RK")
        )
        return inputs.rows_of_head(state_R, nats, ids_RK, logprobs_RK).sum()

    def _mapped(self, encoded: Encoded, state_R: np.ndarray, teacher_R: np.ndarray, map_V: np.ndarray) -> Rows:
        """Return rows whose classes are the teacher's alternatives, mapped to the student's tokens."""
        found = Alternatives.of(stored_tokens(encoded), teacher_R, self.train.token_top_k).mapped(map_V)
        return Rows(state_R, *found.padded(len(state_R)))

    def _ends(self, encoded: Encoded) -> Rows:
        """Return a row for each END that both models know, of two classes: END, and anything else."""
        states, counts = ends_of_segments(encoded, self.pair.student_end)
        logprobs = stored_tokens(encoded).end_log_probs[counts]
        known = np.isfinite(logprobs)
        ids_RK = np.full((int(known.sum()), 1), self.pair.student_end, dtype=np.int64)
        return Rows(states[known], ids_RK, logprobs[known, None].astype(np.float32))

    def _begin_alike(self, encoded: Encoded, found: Chunks) -> np.ndarray:
        """Return C, bool: the first tokens of a chunk begin with the same byte, a dummy prefix included."""
        student_C, teacher_C = found.student_C2[:, 0], found.teacher_C2[:, 0]
        ours, theirs = encoded.tokens[student_C], stored_tokens(encoded).token_ids[teacher_C]
        covered = (encoded.ends - encoded.starts)[student_C], encoded.record.teacher_token_lengths[teacher_C]
        ours_C = prefix_lengths(ours, covered[0], self.pair.student.token_bytes)
        return ours_C == prefix_lengths(theirs, covered[1].astype(np.int64), self.pair.teacher.token_bytes)


class StrictKL(RowDivergence):
    """KL where both models have one token over the same bytes, over the tokens that both vocabularies have.

    For chunk c of one token each: KL(t_c || q_c) with t_c(v) the teacher's stored probability of the token with v's
    bytes, and q_c the student's. Tokens that the student's vocabulary lacks belong to the tail, with what is not
    stored. Two ways to write the end of a text count as one token.

    Source: strict 1:1 alignment (arXiv 2610.08448), whose text was not at hand: built from a summary (1:1 positions,
    shared vocabulary, top 16). Whether it renormalises what is shared (`train.token_tail: drop`), the summary leaves
    open.
    """

    name: ClassVar[str] = "strict_kl"

    def __init__(self, pair: TokenizerPair, train: TrainConfig) -> None:
        super().__init__(pair, train)
        self.student_of_V = pair.exact  # the student's token of each of the teacher's

    def rows(self, encoded: Encoded) -> Rows:
        """Implement `RowDivergence.rows`."""
        found = chunks(encoded)
        found = found.where(found.is_one_to_one)
        found = found.where(self._begin_alike(encoded, found))
        mapped = self._mapped(encoded, found.student_C2[:, 0], found.teacher_C2[:, 0], self.student_of_V)
        return mapped.joined(self._ends(encoded))


class TokenKL(StrictKL):
    """KL of the next token for a student with the teacher's tokenizer: every position is one token of each.

    Top-k with the tail as a class, or renormalised (`train.token_tail`); forward, reverse or Jensen-Shannon
    (`train.kl_direction`). If a dump's alternatives are draws (counts over their number, which sum to 1), this is
    Sparse Logit Sampling. A dump stores the k most probable tokens, from which no draw of another token can be made.

    Sources: Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2; Sparse Logit Sampling, arXiv 2503.16870.
    """

    name: ClassVar[str] = "token_kl"

    def __init__(self, pair: TokenizerPair, train: TrainConfig) -> None:
        super().__init__(pair, train)
        if not pair.same_tokenizer:
            raise ValueError(
                "train.objectives.token_kl needs a student with the teacher's tokenizer, but the two spell their ids "
                "differently; leave student.tokenizer out, or use an objective across tokenizers (strict_kl, bpm_kl)"
            )
        # Each is itself, also of several that spell the same bytes (a byte token beside a letter).
        is_text_V = (pair.exact != NO_TOKEN) & ~np.isin(np.arange(len(pair.exact)), pair.teacher_ends)
        self.student_of_V = np.where(is_text_V, np.arange(len(pair.exact)), pair.exact)


class RootProjectionKL(RowDivergence):
    """KL wherever tokens of both begin at the same byte; a teacher's token counts as the longest student's in it.

    For a byte offset c where both models begin a token: KL(t_c || q_c), t_c(v) = the sum of p(u) over the teacher's
    stored tokens u whose longest prefix among the student's tokens is v. Rows where either token is a run of two or
    more spaces are left out: there the longest prefix says more than the teacher did.

    Source: BPM's root projection (arXiv 2607.22334), whose text was not at hand: built from a summary, which names the
    longest byte prefix, and the mask of runs of spaces.
    """

    name: ClassVar[str] = "bpm_kl"

    def rows(self, encoded: Encoded) -> Rows:
        """Implement `RowDivergence.rows`."""
        found = chunks(encoded)
        found = found.where(self._begin_alike(encoded, found))
        student_C, teacher_C = found.student_C2[:, 0], found.teacher_C2[:, 0]
        ours, theirs = encoded.tokens[student_C], stored_tokens(encoded).token_ids[teacher_C]
        blank_C = _runs_of_spaces(ours, self.pair.student.token_bytes)
        blank_C |= _runs_of_spaces(theirs, self.pair.teacher.token_bytes)
        kept = ~blank_C
        mapped = self._mapped(encoded, student_C[kept], teacher_C[kept], self.pair.longest_prefix)
        return mapped.joined(self._ends(encoded))


def _runs_of_spaces(tokens: np.ndarray, token_bytes: Sequence[bytes | None]) -> np.ndarray:
    spelled = [token_bytes[token] or b"" for token in tokens.tolist()]
    return np.array([len(one) > 1 and not one.strip(b" ") for one in spelled], dtype=bool)


class MinEditDistance(RowDivergence):
    """KL at 1:1 positions, each token of the student's standing for the nearest of the teacher's; CE elsewhere.

    For chunk c of one token each: KL(t_c || q_c), t_c(v) proportional to p(m(v)), with m(v) the teacher's token nearest
    to v by edit distance (v itself where both have it); every other supervised token counts as certain.

    Here the softmax over the student's tokens knows the stored tokens only: the teacher's tail is one more class. Edits
    are of bytes.

    Source: MinED (FuseLLM, arXiv 2401.10491), as tokenkit runs it (`compute_baseline_mined_loss`).
    """

    name: ClassVar[str] = "mined"
    always_tail: ClassVar[bool] = True  # a row that is certain has one class and the rest

    def __init__(self, pair: TokenizerPair, train: TrainConfig) -> None:
        super().__init__(pair, train)
        student_V = np.flatnonzero(pair.nearest_teacher != NO_TOKEN)
        teacher_V = pair.nearest_teacher[student_V]
        order = np.argsort(teacher_V, kind="stable")
        self.students = student_V[order]  # of the teacher's tokens in turn
        self.counts_V = np.bincount(teacher_V, minlength=len(pair.teacher.token_bytes))
        self.firsts_V = np.cumsum(self.counts_V) - self.counts_V

    def rows(self, encoded: Encoded) -> Rows:
        """Implement `RowDivergence.rows`."""
        found = chunks(encoded)
        is_one_C = found.is_one_to_one & self._begin_alike(encoded, found)
        ones, others = found.where(is_one_C), found.where(~is_one_C)
        certain = np.concatenate([np.empty(0, np.int64), *(np.arange(*pair) for pair in others.student_C2)])
        certain_rows = Rows(
            certain, encoded.tokens[certain][:, None].astype(np.int64), np.zeros((len(certain), 1), np.float32)
        )
        matched = self._matched(encoded, ones.student_C2[:, 0], ones.teacher_C2[:, 0])
        return matched.joined(certain_rows, self._ends(encoded))

    def _matched(self, encoded: Encoded, state_R: np.ndarray, teacher_R: np.ndarray) -> Rows:
        """Return rows whose classes are all student's tokens that stand for one of the teacher's alternatives."""
        stored = Alternatives.of(stored_tokens(encoded), teacher_R, self.train.token_top_k)
        row_A, id_A, logprob_A = stored.mapped(self.pair.one_of_twins)
        counts_A = self.counts_V[id_A]
        at = np.arange(counts_A.sum()) - np.repeat(np.cumsum(counts_A) - counts_A, counts_A)
        spread = Alternatives(
            np.repeat(row_A, counts_A),
            self.students[np.repeat(self.firsts_V[id_A], counts_A) + at],
            np.repeat(logprob_A, counts_A),
        )
        num_rows = len(state_R)
        tail_R = np.maximum(1 - np.bincount(row_A, np.exp(logprob_A), num_rows), 0.0)
        total_R = np.bincount(spread.row_A, np.exp(spread.logprob_A), num_rows) + tail_R
        ids_RK, logprobs_RK = spread.padded(num_rows)
        shares_RK = np.where(ids_RK != NO_SYMBOL, logprobs_RK - np.log(np.maximum(total_R, 1e-30))[:, None], 0.0)
        return Rows(state_R, ids_RK, shares_RK.astype(np.float32))
