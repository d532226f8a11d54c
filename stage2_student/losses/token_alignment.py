"""Alignment of the teacher's and the student's tokens of a record, by the bytes that they cover.

All that compares tokens of both models stands on this module: offsets where tokens of both end, chunks between them,
and the chunks of one token each. Offsets are exact; nothing is decoded or compared as text.

Shape legend: L student tokens (without the start token), T teacher tokens, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stage2_student.data.examples import Encoded, end_positions

# The token's bytes, by id; None for a token that spells nothing.
TokenBytes = Sequence[bytes | None]


@dataclass(frozen=True)
class Chunks:
    """Shortest runs of tokens of both models over the same supervised bytes, in order.

    Attributes:
        student_C2: the first token of each run, and the one after its last, of `Encoded.tokens`.
        teacher_C2: the same of `Record.teacher_token_lengths`.
        spans_C2: byte offsets of each run.
    """

    student_C2: np.ndarray
    teacher_C2: np.ndarray
    spans_C2: np.ndarray

    def __len__(self) -> int:
        return len(self.spans_C2)

    def where(self, kept_C: np.ndarray) -> "Chunks":
        """Return the selected chunks."""
        return Chunks(self.student_C2[kept_C], self.teacher_C2[kept_C], self.spans_C2[kept_C])

    @property
    def is_one_to_one(self) -> np.ndarray:
        """Return C, bool: the chunk is one token of each model."""
        return (np.diff(self.student_C2)[:, 0] == 1) & (np.diff(self.teacher_C2)[:, 0] == 1)


def teacher_ends(encoded: Encoded) -> np.ndarray:
    """Return T, the byte offsets where the teacher's tokens end."""
    return np.cumsum(encoded.record.teacher_token_lengths.astype(np.int64))


def shared_offsets(encoded: Encoded) -> list[np.ndarray]:
    """Return for each segment the byte offsets where tokens of both models end, ascending.

    The segment's start is included if no token straddles it. For a piece of a record, they are the whole record's,
    inside the bytes that the piece supervises.
    """
    first, last = _supervised_bytes(encoded)
    shared = np.intersect1d(np.append(0, encoded.ends), np.append(0, teacher_ends(encoded)))
    shared = shared[(shared >= first) & (shared <= last)]
    return [shared[(shared >= s.start) & (shared <= s.start + s.length)] for s in encoded.record.segments]


def _supervised_bytes(encoded: Encoded) -> tuple[int, int]:
    """Return the first and last byte offset that a piece supervises; for a whole record, of all bytes."""
    if not len(encoded.ends):
        return 0, 0
    return int(encoded.starts[encoded.num_context]), int(encoded.ends[-1])


def chunks(encoded: Encoded) -> Chunks:
    """Return the chunks of a record or a piece.

    A token without bytes belongs to the chunk after it; what a chat's template writes belongs to none.
    """
    ends_T = teacher_ends(encoded)
    teacher = _Tokens.of(ends_T - encoded.record.teacher_token_lengths, ends_T, only_bytes=False)
    offsets = shared_offsets(encoded)
    spans_C2 = np.concatenate([np.empty((0, 2), np.int64), *(np.stack([b[:-1], b[1:]], 1) for b in offsets)])
    return Chunks(student_tokens(encoded, spans_C2), teacher.between(spans_C2), spans_C2)


def student_tokens(encoded: Encoded, spans_C2: np.ndarray) -> np.ndarray:
    """Return the student's tokens that cover spans of bytes: C x 2, the first, and the one after the last."""
    return _Tokens.of(encoded.starts, encoded.ends, only_bytes=encoded.turn_ends is not None).between(spans_C2)


@dataclass(frozen=True)
class _Tokens:
    """Tokens by their first byte, and their numbers."""

    starts: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, starts: np.ndarray, ends: np.ndarray, only_bytes: bool) -> "_Tokens":
        numbers = np.flatnonzero(ends > starts) if only_bytes else np.arange(len(starts))
        return cls(starts[numbers], np.append(numbers, len(starts)))

    def between(self, spans_C2: np.ndarray) -> np.ndarray:
        """Return the tokens that start inside each span: C x 2, the first, and the one after the last."""
        first_C, after_C = np.searchsorted(self.starts, spans_C2, side="left").T
        return np.stack([self.numbers[first_C], self.numbers[np.maximum(after_C - 1, 0)] + 1], axis=1)


def prefix_lengths(tokens_C: np.ndarray, spans_C: np.ndarray, token_bytes: TokenBytes) -> np.ndarray:
    """Return C: how many bytes a token has before those that it covers, put there by its tokenizer (a dummy prefix).

    Args:
        tokens_C: ids.
        spans_C: number of bytes that each covers in the document.
    """
    lengths = [len(token_bytes[token] or b"") for token in tokens_C.tolist()]
    return np.array(lengths, dtype=np.int64) - spans_C


def ends_of_segments(encoded: Encoded, end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places that predict the END of segments: the student's state, and the teacher tokens before it.

    Only where the student supervises the END, and a token of the teacher's ends at its offset too.
    """
    states, segments = end_positions(encoded, end_id)
    stops = np.array([s.start + s.length for s in encoded.record.segments], dtype=np.int64)[segments]
    ends_T = teacher_ends(encoded)
    counts = np.searchsorted(ends_T, stops, side="left") + 1
    padded_T = np.append(ends_T, -1)
    # A segment without bytes at the very start has at most a dummy prefix before it.
    counts = np.where(stops == 0, np.searchsorted(ends_T, 0, side="right"), counts)
    known = (stops == 0) | (padded_T[np.minimum(counts - 1, len(ends_T))] == stops)
    return states[known], counts[known]
