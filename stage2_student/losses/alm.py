"""Approximate likelihood matching (arXiv 2503.20083): chunks of bytes that begin and end on tokens of both models.

A chunk's likelihood is the product of its tokens' probabilities; it is the probability of "these bytes, and a token
ends here". What a tokenizer knows of that end is a bias that differs between the two. So a chunk ends only where the
teacher finds it likely that a space, a line break or END comes next, before which tokenizers cut whatever their
vocabulary; shorter chunks are joined until one does.

Shape legend: B rows, L tokens (including start tokens), S = B x L states, N supervised tokens, C chunks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from schemas import END
from schemas.record import Record
from stage2_student.data.examples import NO_ROW, Encoded, position_rows
from stage2_student.data.micro_batch import Layout

NO_CHUNK = -1
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
    first, last = _supervised_bytes(encoded)
    shared = np.intersect1d(np.append(0, encoded.ends), np.append(0, np.cumsum(record.teacher_token_lengths)))
    cut_probs = _cut_probs(record)
    row_of_byte, row_of_end = position_rows(record)
    bounds = []
    for segment, row in zip(record.segments, row_of_end, strict=True):
        stop = segment.start + segment.length
        inside = shared[(shared >= segment.start) & (shared <= stop)]
        rows = np.where(inside == stop, row, np.append(row_of_byte, NO_ROW)[inside])
        kept = (inside == segment.start) | (cut_probs[rows] >= debias)
        bounds.append(inside[kept & (inside >= first) & (inside <= last)])
    return bounds


def _supervised_bytes(encoded: Encoded) -> tuple[int, int]:
    """Return the first and last byte offset that a piece supervises; for a whole record, of all bytes."""
    if not len(encoded.ends):
        return 0, 0
    return int(encoded.starts[encoded.num_context]), int(encoded.ends[-1])


def _cut_probs(record: Record) -> np.ndarray:
    """Return P + 1: the teacher's stored probability of a space, a line break or END.

    The last is 0, for index NO_ROW.
    """
    return np.append(record.per_position(record.probs() * np.isin(record.symbols, _CUTS)), 0.0)


def chunk_tensors(documents: Sequence[Encoded], layout: Layout, debias: float) -> dict[str, Tensor]:
    """Return the chunks of a micro-batch, as part of its `extra`.

    Returns:
        alm_chunk_BL: int64, the chunk of each label, NO_CHUNK if it is in none.
        alm_teacher_C: float32 nats, the chunk's log-likelihood under the teacher.
    """
    chunk_BL = np.full(layout.shape, NO_CHUNK, dtype=np.int64)
    chunk_S = chunk_BL.reshape(-1)
    teacher: list[np.ndarray] = [np.empty(0)]
    count = 0
    for encoded, first in zip(documents, layout.firsts, strict=True):
        record = encoded.record
        teacher_ends = np.cumsum(record.teacher_token_lengths)
        teacher_starts = teacher_ends - record.teacher_token_lengths
        for bounds in chunk_bounds(encoded, debias):
            if len(bounds) < 2:
                continue
            ours = _chunk_of(encoded.starts, encoded.ends, bounds)
            theirs = _chunk_of(teacher_starts, teacher_ends, bounds)
            own_S = chunk_S[first : first + len(ours)]
            own_S[ours >= 0] = ours[ours >= 0] + count
            inside = theirs >= 0
            sums = np.bincount(
                theirs[inside], record.teacher_token_logprobs[inside].astype(np.float64), len(bounds) - 1
            )
            teacher.append(sums)
            count += len(bounds) - 1
    return {
        "alm_chunk_BL": torch.from_numpy(chunk_BL),
        "alm_teacher_C": torch.from_numpy(np.concatenate(teacher).astype(np.float32)),
    }


def _chunk_of(starts: np.ndarray, ends: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the chunk that each token lies in, counted from the first bound; NO_CHUNK outside.

    A token without bytes is in the chunk after it.
    """
    chunk = np.searchsorted(bounds, starts, side="right") - 1
    return np.where((chunk >= 0) & (chunk < len(bounds) - 1), chunk, NO_CHUNK)


def chunk_loss(token_nats_N: Tensor, chunk_N: Tensor, teacher_C: Tensor, tau: float) -> Tensor:
    """Sum the binary cross-entropies of chunk likelihoods: -[t ln s + (1 - t) ln(1 - s)].

    There t = p_teacher^(1/tau) and s = p_student^(1/tau).

    Args:
        token_nats_N: -ln p of the supervised tokens.
        chunk_N: int64, the chunk of each, NO_CHUNK if it is in none.
        teacher_C: ln p of the chunks under the teacher.
    Returns:
        nats, a scalar.
    """
    inside_N = chunk_N != NO_CHUNK
    student_C = torch.zeros_like(teacher_C).index_add(0, chunk_N[inside_N], -token_nats_N[inside_N].float())
    log_t_C, log_s_C = teacher_C.clamp(max=-MIN_NATS) / tau, student_C.clamp(max=-MIN_NATS) / tau
    # 1 - p^(1/tau) as -expm1: with tau = 100, p^(1/tau) is near 1, and a float32 difference would keep 2 digits.
    return -(log_t_C.exp() * log_s_C - torch.expm1(log_t_C) * torch.log(-torch.expm1(log_s_C))).sum()
