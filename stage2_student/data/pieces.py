"""Pieces of records with more tokens than the student reads at once; each supervised token is supervised in one.

A piece is a run of the record's own tokens, never encoded anew, so that the same tokens are supervised as in the whole
record. It starts with context of an eighth of `max_tokens`, supervised in the piece before. It ends where a teacher
token ends too, before white space if there is some near, so that chunks of both models' tokens stay whole; in a chat
preferably between turns.

Shape legend: L tokens of a record, without its start token; C = L + 1 boundaries around them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_BLANKS = np.frombuffer(b" \n\r\t", dtype=np.uint8)
_BETWEEN, _BEFORE_BLANK, _SHARED, _OWN = range(4)  # ranks of boundaries to end a piece at, best first


class Piece(NamedTuple):
    """A piece of a record: tokens `first .. last` after a start token; those before `done` are context."""

    first: int
    done: int
    last: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the student's forward pass, including the start token."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Cuttable:
    """The parts of a record that decide where it is cut.

    Attributes:
        document: its bytes; token `l` covers `starts_L[l] .. ends_L[l]`.
        used_L: bool, True for tokens that are supervised, or followed by a supervised END.
        teacher_ends: byte offsets where teacher tokens end; None if there is no single teacher.
        restarts: in a chat, the tokens that its later messages begin with, ascending.
    """

    document: bytes
    starts_L: np.ndarray
    ends_L: np.ndarray
    used_L: np.ndarray
    teacher_ends: np.ndarray | None
    restarts: Sequence[int] = ()

    def boundary_ranks(self) -> np.ndarray:
        """Return C, int8: the rank of ending a piece before token `c`; 0 is best."""
        edges_C = np.append(self.starts_L, self.ends_L[-1:])
        ranks_C = np.full(len(edges_C), _SHARED, dtype=np.int8)
        if self.teacher_ends is not None:
            ranks_C[~np.isin(edges_C, self.teacher_ends)] = _OWN
        text = np.append(np.frombuffer(self.document, dtype=np.uint8), _BLANKS[:1])
        ranks_C[np.isin(text[edges_C], _BLANKS) & (ranks_C == _SHARED)] = _BEFORE_BLANK
        inside = np.zeros(len(edges_C), dtype=bool)
        inside[1:-1] = self.used_L[1:] & self.used_L[:-1]
        ranks_C[~inside] = _BETWEEN
        return ranks_C

    def splits_character(self, token: int) -> bool:
        """Return whether a token starts inside a UTF-8 character."""
        at = int(self.starts_L[token])
        return at < len(self.document) and self.document[at] & 0xC0 == 0x80


def overlap_tokens(max_tokens: int) -> int:
    """Return the minimum context before the supervised tokens of a later piece."""
    return max_tokens // 8


def cut(record: Cuttable, max_tokens: int) -> Iterator[Piece]:
    """Yield pieces of about the same size, of at most `max_tokens` tokens including the start token.

    Yields none if nothing is supervised.

    Args:
        max_tokens: at least 8.
    """
    assert max_tokens >= 8
    used = np.flatnonzero(record.used_L)
    if not len(used):
        return
    ranks_C = record.boundary_ranks()
    max_own, overlap = max_tokens - 1, overlap_tokens(max_tokens)
    done, end = int(used[0]), int(used[-1]) + 1
    while True:
        first = _context(record, done, max_own, overlap, is_first=done == used[0])
        if end <= first + max_own:
            yield Piece(first, done, end)
            return
        left = end - done
        aim = done + -(-left // -(-left // (max_own - overlap)))
        at = _boundary(ranks_C, done, min(aim, first + max_own), first + max_own, slack=(max_own - overlap) // 8)
        yield Piece(first, done, int(used[np.searchsorted(used, at) - 1]) + 1)
        done = int(used[np.searchsorted(used, at)])


def _context(record: Cuttable, done: int, max_own: int, overlap: int, is_first: bool) -> int:
    """Return the first token of the piece that supervises from `done` on.

    At most half of a piece is context.
    """
    if done <= (max_own // 2 if is_first else overlap):
        return 0
    near = [restart for restart in record.restarts if done - max_own // 2 <= restart <= done]
    if near:
        enough = [restart for restart in near if done - restart >= overlap]
        return enough[-1] if enough else near[0]
    first = done - overlap
    while first < done and record.splits_character(first):
        first += 1
    return first


def _boundary(ranks_C: np.ndarray, done: int, aim: int, limit: int, slack: int) -> int:
    """Return where a piece ends: the best boundary near `aim`.

    If none there is shared by both models, the nearest one that is, else `aim` itself.
    """
    low, high = max(done + 1, aim - slack), min(limit, aim + slack)
    best = int(ranks_C[low : high + 1].min())
    if best == _OWN:
        low, high = done + 1, limit
        best = int(ranks_C[low : high + 1].min())
    if best == _OWN:  # a chunk that crosses it is left out; everything else is as exact as elsewhere
        return aim
    candidates = low + np.flatnonzero(ranks_C[low : high + 1] == best)
    return int(candidates[np.abs(candidates - aim).argmin()])
