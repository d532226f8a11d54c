"""Approximate likelihood matching (arXiv 2503.20083): chunks of bytes that begin and end on tokens of both models.

A chunk's likelihood is the product of its tokens' probabilities, and they say "these bytes, and a token ends here".
What the tokenizer knows of the end is a bias that differs between the two. So a chunk ends only where the teacher
thinks it likely that a space, a line break or END comes next, before which tokenizers cut whatever their vocabulary;
shorter chunks are joined until one does.

Shape legend: B rows, L tokens (start tokens included), S = B x L states, N supervised tokens, C chunks.
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
MIN_NATS = 1e-6  # of a chunk: one that is certain would make ln(1 - p) infinite
_CUTS = np.array([*b" \n\r\t", END], dtype=np.uint8)  # before these, tokens end


def chunk_bounds(encoded: Encoded, debias: float) -> list[np.ndarray]:
    """For each segment the byte offsets between its chunks, ascending: tokens of both models end there.

    The segment's start is one of them if no token straddles it; any other only where the teacher's next symbol is a cut
    with a probability of at least `debias`. The end of a segment without END has no stored position, so no probability.
    Of a piece of a record they are those of the whole record that lie in what it supervises.
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
    """Byte offsets that a piece supervises; of a whole record all of them."""
    if not len(encoded.ends):
        return 0, 0
    return int(encoded.starts[encoded.num_context]), int(encoded.ends[-1])


def _cut_probs(record: Record) -> np.ndarray:
    """P + 1: what the teacher's stored symbols give to a space, a line break or END; 0 at the last, which is NO_ROW."""
    return np.append(record.per_position(record.probs() * np.isin(record.symbols, _CUTS)), 0.0)


def chunk_tensors(documents: Sequence[Encoded], layout: Layout, debias: float) -> dict[str, Tensor]:
    """The chunks of a micro-batch, as part of its `extra`.

    Returns:
        alm_chunk_BL: int64, the chunk of each label, NO_CHUNK where it is in none.
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
            ours, theirs = (
                _chunk_of(encoded.starts, encoded.ends, bounds),
                _chunk_of(teacher_starts, teacher_ends, bounds),
            )
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
    """The chunk between two bounds that each token lies in; NO_CHUNK outside. A token without bytes is in the one after
    it.
    """
    chunk = np.searchsorted(bounds, starts, side="right") - 1
    return np.where((chunk >= 0) & (chunk < len(bounds) - 1), chunk, NO_CHUNK)


def chunk_loss(token_nats_N: Tensor, chunk_N: Tensor, teacher_C: Tensor, tau: float) -> Tensor:
    """Sum over chunks of -[t ln s + (1 - t) ln(1 - s)], where t = p_teacher^(1/tau), s = p_student^(1/tau); nats, a
    scalar.

    Args:
        token_nats_N: -ln p of the supervised tokens.
        chunk_N: int64, the chunk of each, NO_CHUNK where it is in none.
        teacher_C: ln p of the chunks under the teacher.
    """
    inside_N = chunk_N != NO_CHUNK
    student_C = torch.zeros_like(teacher_C).index_add(0, chunk_N[inside_N], -token_nats_N[inside_N].float())
    log_t_C, log_s_C = teacher_C.clamp(max=-MIN_NATS) / tau, student_C.clamp(max=-MIN_NATS) / tau
    # 1 - p^(1/tau) as -expm1: at tau 100 p^(1/tau) is near 1, and a float32 difference would hold 2 digits of it.
    return -(log_t_C.exp() * log_s_C - torch.expm1(log_t_C) * torch.log(-torch.expm1(log_s_C))).sum()
