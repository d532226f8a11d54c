"""X-Token's projection KL: the student's probabilities, carried into the teacher's vocabulary by a sparse matrix.

Shape legend: C chunks, R student tokens in chunks, K the teacher's stored tokens of a chunk (padded), V the student's
vocabulary, T the teacher's, J teacher's tokens of one of the student's.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from stage2_student.data.examples import NO_SYMBOL, Encoded
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.divergences import MIN_TAIL, divergence_of_classes
from stage2_student.losses.inputs import ObjectiveInputs
from stage2_student.losses.token_alignment import chunks
from stage2_student.losses.token_objective import (
    Alternatives,
    TokenObjective,
    in_batch,
    padded_alike,
    stored_tokens,
)
from stage2_student.losses.vocabulary_map import TokenizerPair

_FLOOR = 1e-10  # minimum probability under a logarithm (the authors')


class ProjectionKL(TokenObjective):
    """KL(t_c || q_c) for each chunk c, over the teacher's vocabulary.

    t_c is the mean of the teacher's distributions at the chunk's tokens of its own; q_c(u) the mean over the student's
    tokens in it of sum over v of q(v) W(v, u), with W the projection of `TokenizerPair.projection`. Classes are the
    tokens that the dump stores for the chunk; the rest is one class, or both sides are normalised without it
    (`train.token_tail: drop`, which is nearest to the authors' top 8,192 of a micro-batch).

    The authors take the mean of the teacher's log-probabilities; of stored ones that would need those that are not
    stored, so here it is the mean of the probabilities. For a chunk of one token each the two are the same.

    Source: X-Token's P-KL (arXiv 2605.21699), as its authors' code has it (NVIDIA NeMo-RL,
    `CrossTokenizerDistillationLossFn._compute_p_kl`).
    """

    name: ClassVar[str] = "xtoken_kl"

    def __init__(self, pair: TokenizerPair, train: TrainConfig) -> None:
        super().__init__(pair, train)
        ids_VJ, weights_VJ = pair.projection
        padding = ((0, pair.student_rows - len(ids_VJ)), (0, 0))  # of the head
        self.ids_VJ = torch.from_numpy(np.pad(ids_VJ, padding))
        self.weights_VJ = torch.from_numpy(np.pad(weights_VJ, padding))

    def tensors(self, documents: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
        """Implement `TokenObjective.tensors`.

        Returns:
            xtoken_kl_state_R, xtoken_kl_chunk_R: the state of each student token in a chunk, and its chunk.
            xtoken_kl_ids_CK, xtoken_kl_logprobs_CK: the teacher's mean distribution in each chunk.
        """
        states, numbers, ids, logprobs, count = [], [np.empty(0, np.int64)], [], [], 0
        for encoded in documents:
            found = chunks(encoded)
            lengths_C, teacher_C = np.diff(found.student_C2)[:, 0], np.diff(found.teacher_C2)[:, 0]
            of_token = np.repeat(np.arange(len(found)), lengths_C)
            place = np.arange(len(of_token)) - np.repeat(np.cumsum(lengths_C) - lengths_C, lengths_C)
            states.append(found.student_C2[of_token, 0] + place)
            numbers.append(of_token + count)
            count += len(found)
            of_teacher = np.repeat(np.arange(len(found)), teacher_C)
            first_C = np.cumsum(teacher_C) - teacher_C
            tokens_R = found.teacher_C2[of_teacher, 0] + np.arange(len(of_teacher)) - first_C[of_teacher]
            stored = Alternatives.of(stored_tokens(encoded), tokens_R, self.train.token_top_k)
            row_A, id_A, logprob_A = stored.mapped(self.pair.one_of_twins)
            chunk_A = of_teacher[row_A]
            ids_CK, logprobs_CK = Alternatives(chunk_A, id_A, logprob_A - np.log(teacher_C[chunk_A])).padded(len(found))
            ids.append(ids_CK)
            logprobs.append(logprobs_CK)
        width = max((part.shape[1] for part in ids), default=1)
        return {
            "xtoken_kl_state_R": in_batch(states, layout),
            "xtoken_kl_chunk_R": torch.from_numpy(np.concatenate(numbers)),
            "xtoken_kl_ids_CK": torch.from_numpy(padded_alike(ids, width, NO_SYMBOL)),
            "xtoken_kl_logprobs_CK": torch.from_numpy(padded_alike(logprobs, width, 0).astype(np.float32)),
        }

    def __call__(self, inputs: ObjectiveInputs) -> Tensor:
        """Implement `TokenObjective.__call__`."""
        extra, train = inputs.batch.extra, inputs.train
        ids_CK, teacher_CK = extra["xtoken_kl_ids_CK"], extra["xtoken_kl_logprobs_CK"]
        chunk_R, num_chunks = extra["xtoken_kl_chunk_R"], len(ids_CK)
        ids_VJ, weights_VJ = (values_VJ.to(ids_CK.device) for values_VJ in (self.ids_VJ, self.weights_VJ))
        num_teacher_tokens = len(self.pair.teacher.token_bytes)

        def projected(logits_rV: Tensor, ids_rK: Tensor) -> Tensor:
            """Keep the projected probabilities of a chunk's classes."""
            probs_rV = logits_rV.softmax(-1)
            probs_rT = probs_rV.new_zeros(len(probs_rV), num_teacher_tokens)
            for place in range(ids_VJ.shape[1]):
                probs_rT = probs_rT.index_add(1, ids_VJ[:, place], probs_rV * weights_VJ[:, place])
            return probs_rT.gather(-1, ids_rK.clamp(min=0))

        probs_RK = inputs.rows_of_head(extra["xtoken_kl_state_R"], projected, ids_CK[chunk_R])
        sizes_C1 = torch.bincount(chunk_R, minlength=num_chunks)[:, None]
        probs_CK = probs_RK.new_zeros(num_chunks, probs_RK.shape[1]).index_add(0, chunk_R, probs_RK) / sizes_C1
        is_class_CK = ids_CK != NO_SYMBOL
        probs_CK = probs_CK.where(is_class_CK, 0.0)
        student_CK = probs_CK.clamp(min=_FLOOR).log()
        if train.token_tail == "class":
            ours_C1 = (1 - probs_CK.sum(-1, keepdim=True)).clamp(min=MIN_TAIL).log()
            stored_C1 = teacher_CK.double().exp().where(is_class_CK, 0.0).sum(-1, keepdim=True)
            student_CK = torch.cat([student_CK, ours_C1], dim=-1)
            teacher_CK = torch.cat([teacher_CK, (1 - stored_C1).clamp(min=MIN_TAIL).log().float()], dim=-1)
            is_class_CK = torch.cat([is_class_CK, torch.ones_like(is_class_CK[:, :1])], dim=-1)
        return divergence_of_classes(student_CK, teacher_CK, is_class_CK, train.kl_direction, train.kl_temperature)
