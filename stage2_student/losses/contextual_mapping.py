"""Contextual dynamic mapping: a token without a twin meets the most similar of the other side's likely tokens.

Shape legend: R rows (1:1 positions), K the teacher's stored tokens (padded), J the student's likely tokens, P pairs of
a row (padded), V the student's vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from stage2_student.data.examples import NO_SYMBOL, Encoded
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.divergences import divergence_of_classes
from stage2_student.losses.edit_distance import edit_distance
from stage2_student.losses.inputs import ObjectiveInputs
from stage2_student.losses.token_alignment import chunks
from stage2_student.losses.token_objective import (
    Alternatives,
    TokenObjective,
    in_batch,
    padded_alike,
    stored_tokens,
)
from stage2_student.losses.vocabulary_map import NO_TOKEN, TokenizerPair


class ContextualMapping(TokenObjective):
    """KL(t || q) over pairs of tokens, found anew at each position; both sides are normalised over the pairs.

    Pairs, teacher's token to student's: each of the teacher's stored tokens with the student's token of the same bytes,
    or else with the nearest of the student's `train.cdm_candidates` most probable tokens there that have no twin
    themselves. And student's to teacher's, likewise: of those most probable ones each with its twin, or with the
    nearest stored token without one. Nearest is by edit distance over both lengths, spaces aside, below
    `train.cdm_max_distance`. A pair of both directions counts twice, as in those ports.

    Positions are those of one token each over the same bytes. The authors align both sequences by dynamic time warping
    with edit distances weighted by entropy, and average logits where tokens do not correspond; bytes give the alignment
    exactly, and averages would need logits that a dump does not store.

    Source: CDM (Chen et al. 2025, arXiv 2502.11104). Text and code were not at hand: built from its abstract and from
    ports of its code.
    """

    name: ClassVar[str] = "cdm"

    def __init__(self, pair: TokenizerPair, train: TrainConfig) -> None:
        super().__init__(pair, train)
        self.teacher_of_V = np.full(pair.student_rows, NO_TOKEN, dtype=np.int64)
        known = np.flatnonzero(pair.exact != NO_TOKEN)
        self.teacher_of_V[pair.exact[known]] = pair.one_of_twins[known]
        self._distance = lru_cache(maxsize=1 << 20)(self._distance_of)

    def tensors(self, documents: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
        """Implement `TokenObjective.tensors`.

        Returns:
            cdm_state_R, and cdm_ids_RK, cdm_logprobs_RK: the teacher's stored tokens, by its own ids.
        """
        states, ids, logprobs = [], [], []
        for encoded in documents:
            found = chunks(encoded)
            found = found.where(found.is_one_to_one)
            stored = Alternatives.of(stored_tokens(encoded), found.teacher_C2[:, 0], self.train.token_top_k)
            ids_RK, logprobs_RK = stored.mapped(self.pair.one_of_twins).padded(len(found))
            states.append(found.student_C2[:, 0])
            ids.append(ids_RK)
            logprobs.append(logprobs_RK)
        width = max((part.shape[1] for part in ids), default=1)
        return {
            "cdm_state_R": in_batch(states, layout),
            "cdm_ids_RK": torch.from_numpy(padded_alike(ids, width, NO_SYMBOL)),
            "cdm_logprobs_RK": torch.from_numpy(padded_alike(logprobs, width, 0).astype(np.float32)),
        }

    def __call__(self, inputs: ObjectiveInputs) -> Tensor:
        """Implement `TokenObjective.__call__`. The head is applied twice: the student's likely tokens decide pairs."""
        extra, train = inputs.batch.extra, inputs.train
        state_R, teacher_RK = extra["cdm_state_R"], extra["cdm_logprobs_RK"]

        def likely(logits_rV: Tensor) -> Tensor:
            return logits_rV.topk(min(train.cdm_candidates, logits_rV.shape[-1])).indices

        with torch.no_grad():
            likely_RJ = inputs.rows_of_head(state_R, likely)
        ours_RP, theirs_RP = self._pairs(likely_RJ.cpu().numpy(), extra["cdm_ids_RK"].cpu().numpy())
        student_ids_RP = torch.from_numpy(ours_RP).to(state_R.device)
        places_RP = torch.from_numpy(theirs_RP).to(state_R.device)

        def kept(logits_rV: Tensor, ids_rP: Tensor) -> Tensor:
            return logits_rV.gather(-1, ids_rP.clamp(min=0))

        student_RP = inputs.rows_of_head(state_R, kept, student_ids_RP)
        is_pair_RP = student_ids_RP != NO_SYMBOL
        some_R = is_pair_RP.any(-1)
        teacher_RP = teacher_RK.gather(-1, places_RP)
        return divergence_of_classes(
            student_RP[some_R], teacher_RP[some_R], is_pair_RP[some_R], train.kl_direction, train.kl_temperature
        )

    def _pairs(self, likely_RJ: np.ndarray, stored_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return R x P: the student's token of each pair, NO_SYMBOL at padding, and the teacher's place among K."""
        rows = [self._pairs_of_row(*row) for row in zip(likely_RJ.tolist(), stored_RK.tolist(), strict=True)]
        width = max((len(row) for row in rows), default=1)
        ours_RP, theirs_RP = np.full((len(rows), max(1, width)), NO_SYMBOL), np.zeros((len(rows), max(1, width)), int)
        for number, row in enumerate(rows):
            for place, (student, stored) in enumerate(row):
                ours_RP[number, place], theirs_RP[number, place] = student, stored
        return ours_RP, theirs_RP

    def _pairs_of_row(self, likely: list[int], stored: list[int]) -> list[tuple[int, int]]:
        place_of = {teacher: place for place, teacher in enumerate(stored) if teacher != NO_SYMBOL}
        lone_students = [student for student in likely if self.teacher_of_V[student] == NO_TOKEN]
        lone_teachers = [teacher for teacher in place_of if self.pair.exact[teacher] == NO_TOKEN]
        pairs = []
        for teacher, place in place_of.items():
            student = int(self.pair.exact[teacher])
            if student == NO_TOKEN:
                student = self._nearest(lone_students, partial(self._distance, teacher=teacher))
            pairs.append((student, place))
        for student in likely:
            teacher = int(self.teacher_of_V[student])
            if teacher == NO_TOKEN:
                teacher = self._nearest(lone_teachers, partial(self._distance, student))
            pairs.append((student if teacher in place_of else NO_TOKEN, place_of.get(teacher, 0)))
        return [(student, place) for student, place in pairs if student != NO_TOKEN]

    def _nearest(self, candidates: Sequence[int], distance: Callable[[int], float]) -> int:
        """Return the first nearest candidate below the limit, or NO_TOKEN."""
        found = [(distance(one), number) for number, one in enumerate(candidates)]
        least, number = min(found, default=(1.0, 0))
        return candidates[number] if least < self.train.cdm_max_distance else NO_TOKEN

    def _distance_of(self, student: int, teacher: int) -> float:
        """Return the edit distance of two tokens without their spaces, over both lengths; 1 if one spells nothing."""
        token_bytes = self.pair.student.token_bytes
        ours = (token_bytes[student] or b"" if student < len(token_bytes) else b"").replace(b" ", b"")
        theirs = (self.pair.teacher.token_bytes[teacher] or b"").replace(b" ", b"")
        if not ours or not theirs or abs(len(ours) - len(theirs)) >= self.train.cdm_max_distance * len(ours + theirs):
            return 1.0
        return edit_distance(ours, theirs) / len(ours + theirs)
