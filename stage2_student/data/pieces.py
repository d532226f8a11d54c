"""Records of more tokens than a student reads at once, cut into pieces; each supervised token is supervised in one of
them.

A piece is a stretch of the record's own tokens, never encoded anew, so that what is supervised is what the whole record
would supervise. Before it stands an eighth of its tokens as context, supervised in the piece before. It ends where a
token of the teacher ends too, before white space where some is near, so that chunks of both models' tokens stay whole;
in a chat rather between turns.

Shape legend: L tokens of a record, its start token left out; C = L + 1 places between them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_BLANKS = np.frombuffer(b" \n\r\t", dtype=np.uint8)
_BETWEEN, _BEFORE_BLANK, _SHARED, _OWN = range(4)  # how good a place is to end a piece at, best first


class Piece(NamedTuple):
    """The student reads tokens `first .. last` of a record, after a start token; those before `done` are context."""

    first: int
    done: int
    last: int

    @property
    def num_tokens(self) -> int:
        """With the start token: what the student's forward pass sees."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Cuttable:
    """What decides where a record is cut.

    Attributes:
        document: its bytes; token `l` covers `starts_L[l] .. ends_L[l]`.
        used_L: bool, the tokens that are supervised, and those after which an END is.
        teacher_ends: byte offsets where tokens of the teacher end; None where there is no one teacher.
        restarts: of a chat, tokens that its later messages begin with, ascending.
    """

    document: bytes
    starts_L: np.ndarray
    ends_L: np.ndarray
    used_L: np.ndarray
    teacher_ends: np.ndarray | None
    restarts: Sequence[int] = ()

    def places(self) -> np.ndarray:
        """C, int8: how good it is to end a piece before token `c`."""
        edges_C = np.append(self.starts_L, self.ends_L[-1:])
        found_C = np.full(len(edges_C), _SHARED, dtype=np.int8)
        if self.teacher_ends is not None:
            found_C[~np.isin(edges_C, self.teacher_ends)] = _OWN
        text = np.append(np.frombuffer(self.document, dtype=np.uint8), _BLANKS[:1])
        found_C[np.isin(text[edges_C], _BLANKS) & (found_C == _SHARED)] = _BEFORE_BLANK
        inside = np.zeros(len(edges_C), dtype=bool)
        inside[1:-1] = self.used_L[1:] & self.used_L[:-1]
        found_C[~inside] = _BETWEEN
        return found_C

    def splits_character(self, token: int) -> bool:
        """Whether a token starts inside a UTF-8 character."""
        at = int(self.starts_L[token])
        return at < len(self.document) and self.document[at] & 0xC0 == 0x80


def overlap_tokens(max_tokens: int) -> int:
    """Least context before what a later piece supervises."""
    return max_tokens // 8


def cut(record: Cuttable, max_tokens: int) -> Iterator[Piece]:
    """Pieces of at most `max_tokens` tokens, the start token included, of about the same size; none where nothing is
    supervised.

    Args:
        max_tokens: 8 or more.
    """
    assert max_tokens >= 8
    used = np.flatnonzero(record.used_L)
    if not len(used):
        return
    places_C = record.places()
    most, overlap = max_tokens - 1, overlap_tokens(max_tokens)
    done, end = int(used[0]), int(used[-1]) + 1
    while True:
        first = _context(record, done, most, overlap, is_first=done == used[0])
        if end <= first + most:
            yield Piece(first, done, end)
            return
        left = end - done
        aim = done + -(-left // -(-left // (most - overlap)))
        at = _place(places_C, done, min(aim, first + most), first + most, slack=(most - overlap) // 8)
        yield Piece(first, done, int(used[np.searchsorted(used, at) - 1]) + 1)
        done = int(used[np.searchsorted(used, at)])


def _context(record: Cuttable, done: int, most: int, overlap: int, is_first: bool) -> int:
    """The first token of the piece that supervises from `done` on. Half of a piece is context at most."""
    if done <= (most // 2 if is_first else overlap):
        return 0
    near = [restart for restart in record.restarts if done - most // 2 <= restart <= done]
    if near:
        enough = [restart for restart in near if done - restart >= overlap]
        return enough[-1] if enough else near[0]
    first = done - overlap
    while first < done and record.splits_character(first):
        first += 1
    return first


def _place(places_C: np.ndarray, done: int, aim: int, limit: int, slack: int) -> int:
    """Where a piece ends: near `aim` the best place there is, else the nearest that both models share, else `aim`
    itself.
    """
    low, high = max(done + 1, aim - slack), min(limit, aim + slack)
    best = int(places_C[low : high + 1].min())
    if best == _OWN:
        low, high = done + 1, limit
        best = int(places_C[low : high + 1].min())
    if best == _OWN:  # a chunk that reaches over it is left out; all else is as exact as anywhere
        return aim
    found = low + np.flatnonzero(places_C[low : high + 1] == best)
    return int(found[np.abs(found - aim).argmin()])
