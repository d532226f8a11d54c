"""Approximate likelihood matching (arXiv 2503.20083): chunks of bytes that begin and end on tokens of both models.

A chunk's likelihood is the product of its tokens' probabilities; it is the probability of "these bytes, and a token
ends here". What a tokenizer knows of that end is a bias that differs between the two. So a chunk ends only where the
teacher finds it likely that a space, a line break or END comes next, before which tokenizers cut whatever their
vocabulary; shorter chunks are joined until one does. So far this is the paper's method as its authors run it
(tokenkit: `alm_unconstrained` with `merge_by_space_prob`, threshold 0.1, tau 100, binary cross-entropy). They also
multiply a chunk's likelihood by that of such a cut after it (`append_space`: `train.alm_space` here), and match the
likelihood of END (`train.alm_end`). They divide by chunks, this project by supervised bytes: some five times as many.
The teacher's probability of a cut is that of the next byte, which counts all ways to spell the text before it.

Shape legend: B rows, L tokens (including start tokens), S = B x L states, N supervised tokens, C chunks, X chunks with
a cut after them, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from schemas import END
from schemas.record import Record
from stage2_student.data.examples import NO_LABEL, NO_ROW, Encoded, position_rows
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.inputs import ObjectiveInputs
from stage2_student.losses.token_alignment import ends_of_segments, shared_offsets, student_tokens, teacher_ends
from stage2_student.losses.token_objective import in_batch, stored_tokens

NO_CHUNK = -1
MIN_CUT = 1e-6  # minimum probability of a cut
MIN_NATS = 1e-6  # minimum of -ln p of a chunk: ln(1 - p) of a certain chunk would be infinite
_CUTS = np.array([*b" \n\r\t", END], dtype=np.uint8)  # tokens end before these


def chunk_bounds(encoded: Encoded, debias: float) -> list[np.ndarray]:
    """Return for each segment the byte offsets between its chunks, ascending; tokens of both models end there.

    The segment's start is included if no token straddles it. Any other offset is included only if the teacher gives the
    next symbol a probability of at least `debias` of being a cut. The end of a segment without END has no stored
    position, hence no probability. For a piece of a record, they are the whole record's bounds inside the bytes that
    the piece supervises.
    """
    record = encoded.record
    cut_probs = _cut_probs(record)
    row_of_byte, row_of_end = position_rows(record)
    bounds = []
    for segment, row, inside in zip(record.segments, row_of_end, shared_offsets(encoded), strict=True):
        stop = segment.start + segment.length
        rows = np.where(inside == stop, row, np.append(row_of_byte, NO_ROW)[inside])
        bounds.append(inside[(inside == segment.start) | (cut_probs[rows] >= debias)])
    return bounds


def _cut_probs(record: Record) -> np.ndarray:
    """Return P + 1: the teacher's stored probability of a space, a line break or END.

    The last is 0, for index NO_ROW.
    """
    return np.append(record.per_position(record.probs() * np.isin(record.symbols, _CUTS)), 0.0)


def chunk_tensors(
    documents: Sequence[Encoded], layout: Layout, debias: float, end_id: int | None = None
) -> dict[str, Tensor]:
    """Return the chunks of a micro-batch, as part of its `extra`.

    Args:
        end_id: the student's END token, if each END is a chunk of its own.
    Returns:
        alm_chunk_BL: int64, the chunk of each label, NO_CHUNK if it is in none.
        alm_teacher_C: float32 nats, the chunk's log-likelihood under the teacher.
    Raises:
        ValueError: with `end_id`, the dump does not store the teacher's tokens.
    """
    chunk_BL = np.full(layout.shape, NO_CHUNK, dtype=np.int64)
    chunk_S = chunk_BL.reshape(-1)
    teacher: list[np.ndarray] = [np.empty(0)]
    count = 0
    for encoded, first in zip(documents, layout.firsts, strict=True):
        record = encoded.record
        ends_T = teacher_ends(encoded)
        starts_T = ends_T - record.teacher_token_lengths
        for bounds in chunk_bounds(encoded, debias):
            if len(bounds) < 2:
                continue
            ours = _chunk_of(encoded.starts, encoded.ends, bounds)
            theirs = _chunk_of(starts_T, ends_T, bounds)
            own_S = chunk_S[first : first + len(ours)]
            own_S[ours >= 0] = ours[ours >= 0] + count
            inside = theirs >= 0
            sums = np.bincount(
                theirs[inside], record.teacher_token_logprobs[inside].astype(np.float64), len(bounds) - 1
            )
            teacher.append(sums)
            count += len(bounds) - 1
    if end_id is not None:  # after all others, whose numbers `cut_tensors` repeats
        for encoded, first in zip(documents, layout.firsts, strict=True):
            states, before = ends_of_segments(encoded, end_id)
            logprobs = stored_tokens(encoded).end_log_probs[before]
            known = np.isfinite(logprobs)
            chunk_S[first + states[known]] = count + np.arange(known.sum())
            teacher.append(logprobs[known])
            count += int(known.sum())
    return {
        "alm_chunk_BL": torch.from_numpy(chunk_BL),
        "alm_teacher_C": torch.from_numpy(np.concatenate(teacher).astype(np.float32)),
    }


def cut_tensors(
    documents: Sequence[Encoded], layout: Layout, debias: float, token_bytes: Sequence[bytes | None], end_id: int
) -> dict[str, Tensor]:
    """Return what the probability of a cut after each chunk needs, for the first chunks of `chunk_tensors`' numbers.

    Args:
        token_bytes: of the student's tokens, by id.
    Returns:
        alm_cut_chunk_X: int64, the chunks that have a cut after them, by their numbers.
        alm_cut_state_X: the state that predicts the token after the chunk.
        alm_cut_teacher_X: float32 nats, of a cut there under the teacher; by the dump's bytes, which count all tokens
            that begin so.
        alm_cut_V: bool, the student's tokens that begin with a space or a line break, and END.
    """
    numbers, states, logprobs, count = [np.empty(0, np.int64)], [], [np.empty(0)], 0
    for encoded in documents:
        cut_probs = _cut_probs(encoded.record)
        row_of_byte, row_of_end = position_rows(encoded.record)
        own = [np.empty(0, np.int64)]
        for segment, row, bounds in zip(
            encoded.record.segments, row_of_end, chunk_bounds(encoded, debias), strict=True
        ):
            ends = bounds[1:]
            rows = np.where(ends == segment.start + segment.length, row, np.append(row_of_byte, NO_ROW)[ends])
            stored = rows != NO_ROW
            numbers.append(count + np.flatnonzero(stored))
            own.append(student_tokens(encoded, np.stack([bounds[:-1], ends], 1)[stored])[:, 1])
            logprobs.append(np.log(np.maximum(cut_probs[rows[stored]], MIN_CUT)))
            count += len(ends)
        states.append(np.concatenate(own))
    cut_bytes = bytes(_CUTS[:-1])
    begins = [spelled is not None and spelled[:1] in cut_bytes and spelled != b"" for spelled in token_bytes]
    begins[end_id] = True
    return {
        "alm_cut_chunk_X": torch.from_numpy(np.concatenate(numbers)),
        "alm_cut_state_X": in_batch(states, layout),
        "alm_cut_teacher_X": torch.from_numpy(np.concatenate(logprobs).astype(np.float32)),
        "alm_cut_V": torch.tensor(begins),
    }


def _chunk_of(starts: np.ndarray, ends: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the chunk that each token lies in, counted from the first bound; NO_CHUNK outside.

    A token without bytes is in the chunk after it.
    """
    chunk = np.searchsorted(bounds, starts, side="right") - 1
    return np.where((chunk >= 0) & (chunk < len(bounds) - 1), chunk, NO_CHUNK)


def approximate_likelihood(inputs: ObjectiveInputs) -> Tensor:
    """Compute how the likelihoods of chunks differ from the teacher's, with what follows them if that is prepared."""
    assert inputs.nats_N is not None
    extra, tau = inputs.batch.extra, inputs.train.alm_tau
    chunk_N, teacher_C = extra["alm_chunk_BL"][inputs.batch.labels_BL != NO_LABEL], extra["alm_teacher_C"]
    if "alm_cut_V" not in extra:
        return chunk_loss(inputs.nats_N, chunk_N, teacher_C, tau)
    cut_V, numbers_X = extra["alm_cut_V"], extra["alm_cut_chunk_X"]

    def cut(logits_rV: Tensor) -> Tensor:
        """Keep the log-probability of a token that begins with a cut; rows of a head beyond the vocabulary do not."""
        logprobs_rV = logits_rV.log_softmax(-1)[:, : len(cut_V)]
        return logprobs_rV.masked_fill(~cut_V, -torch.inf).logsumexp(-1, keepdim=True)

    cut_X = inputs.rows_of_head(extra["alm_cut_state_X"], cut)[:, 0]
    after_C = torch.zeros_like(teacher_C).index_add(0, numbers_X, cut_X)
    return chunk_loss(
        inputs.nats_N, chunk_N, teacher_C.index_add(0, numbers_X, extra["alm_cut_teacher_X"]), tau, after_C
    )


def chunk_loss(
    token_nats_N: Tensor, chunk_N: Tensor, teacher_C: Tensor, tau: float, after_C: Tensor | None = None
) -> Tensor:
    """Sum the binary cross-entropies of chunk likelihoods: -[t ln s + (1 - t) ln(1 - s)].

    There t = p_teacher^(1/tau) and s = p_student^(1/tau).

    Args:
        token_nats_N: -ln p of the supervised tokens.
        chunk_N: int64, the chunk of each, NO_CHUNK if it is in none.
        teacher_C: ln p of the chunks under the teacher.
        after_C: ln p of what follows the chunks under the student, if `teacher_C` includes what follows them.
    Returns:
        nats, a scalar.
    """
    inside_N = chunk_N != NO_CHUNK
    student_C = torch.zeros_like(teacher_C).index_add(0, chunk_N[inside_N], -token_nats_N[inside_N].float())
    student_C = student_C if after_C is None else student_C + after_C
    log_t_C, log_s_C = teacher_C.clamp(max=-MIN_NATS) / tau, student_C.clamp(max=-MIN_NATS) / tau
    # 1 - p^(1/tau) as -expm1: with tau = 100, p^(1/tau) is near 1, and a float32 difference would keep 2 digits.
    return -(log_t_C.exp() * log_s_C - torch.expm1(log_t_C) * torch.log(-torch.expm1(log_s_C))).sum()
