"""Records, the rows of a shard, and their text without the targets.

Shape legend: as in `schemas.shard`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from schemas.columns import MEASURES
from schemas.token_alternatives import TokenAlternatives

_MEASURES = tuple(column.name for column in MEASURES)


@dataclass(frozen=True)
class Segment:
    """Bytes `start .. start + length` of a record are supervised; with `has_end`, so is the END after them."""

    start: int
    length: int
    has_end: bool

    @property
    def num_positions(self) -> int:
        return self.length + self.has_end


@dataclass(frozen=True)
class Record:
    """One row of a shard; see `schemas.columns` for units. None: a column that its dump does not store.

    The entries of a position are in any order, the document's symbol among them.
    """

    doc_id: str
    window_start: int
    document: bytes
    segments: tuple[Segment, ...]
    teacher_token_lengths: np.ndarray  # T, int32
    teacher_token_logprobs: np.ndarray  # T, float32
    entry_counts: np.ndarray  # P, uint16
    dropped: np.ndarray  # P, float32
    token_end: np.ndarray  # P, float32
    doubt: np.ndarray  # P, float32
    symbols: np.ndarray  # E, uint8
    logprobs: np.ndarray  # E, float32
    message_roles: tuple[str, ...] = ()  # M
    message_lengths: tuple[int, ...] = ()  # M
    conversation: str = ""  # JSON, for a chat with more than contents
    tokens: TokenAlternatives | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """Role and content of each message of a chat; empty for plain text."""
        return _messages(self)

    @property
    def num_positions(self) -> int:
        return sum(segment.num_positions for segment in self.segments)

    @property
    def measures(self) -> dict[str, np.ndarray]:
        """Values per position besides its distribution, by column name; P values each."""
        return {name: value_P for name in _MEASURES if (value_P := getattr(self, name)) is not None}

    def realised(self) -> np.ndarray:
        """Return the symbol that the document really has at each position: P, uint8."""
        parts = [self.document[s.start : s.start + s.length] + (b"\xff" if s.has_end else b"") for s in self.segments]
        return np.frombuffer(b"".join(parts), dtype=np.uint8)

    def entry_positions(self) -> np.ndarray:
        """Return the position of each entry: E, int64."""
        return np.repeat(np.arange(self.num_positions), self.entry_counts)

    def per_position(self, values_E: np.ndarray) -> np.ndarray:
        """Sum the values of each position's entries: P, float64."""
        return np.bincount(self.entry_positions(), values_E, self.num_positions)

    def probs(self) -> np.ndarray:
        """Return the stored probabilities: E, float64."""
        return np.exp(self.logprobs.astype(np.float64))


class RecordText(NamedTuple):
    """A record without its targets: the text and what of it is supervised."""

    doc_id: str
    window_start: int
    document: bytes
    segments: tuple[Segment, ...]
    message_roles: tuple[str, ...] = ()
    message_lengths: tuple[int, ...] = ()
    conversation: str = ""
    teacher_token_lengths: np.ndarray = np.empty(0, dtype=np.int32)  # T; empty unless requested

    @property
    def messages(self) -> list[dict[str, str]]:
        """Role and content of each message of a chat; empty for plain text."""
        return _messages(self)


class RecordOutline(NamedTuple):
    """A record without its text and its targets: where it lies in its document, and what of it is supervised."""

    doc_id: str
    window_start: int
    segments: tuple[Segment, ...]
    teacher_token_lengths: np.ndarray  # T; bytes, which sum to those of the text
    message_roles: tuple[str, ...] = ()
    message_lengths: tuple[int, ...] = ()


def common_measures(records: Sequence[Record]) -> dict[str, list[np.ndarray] | None]:
    """Return each measure's columns, record by record; None for a measure that some record lacks."""
    per_record = [record.measures for record in records]
    lacking = {name for name in _MEASURES if any(name not in measures for measures in per_record)}
    return {name: None if name in lacking else [measures[name] for measures in per_record] for name in _MEASURES}


def _messages(record: RecordText | Record) -> list[dict[str, str]]:
    ends = list(accumulate(record.message_lengths))
    contents = [record.document[start:end].decode("utf-8") for start, end in pairwise([0, *ends])]
    return [{"role": r, "content": c} for r, c in zip(record.message_roles, contents, strict=True)]
