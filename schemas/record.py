"""What a shard is a list of: records, and what each of them asks about.

Shape legend: as in `schemas.shard`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from schemas.columns import MEASURES

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
    """One entry of a shard; see `schemas.columns` for units. None: a column that its dump does not store."""

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
    conversation: str = ""  # JSON, of a chat with more than contents

    @property
    def messages(self) -> list[dict[str, str]]:
        """Role and content of each message of a chat; empty for plain text."""
        return _messages(self)

    @property
    def num_positions(self) -> int:
        return sum(segment.num_positions for segment in self.segments)

    @property
    def measures(self) -> dict[str, np.ndarray]:
        """What is said of each position beside its distribution, by the column's name; P values each."""
        return {name: value_P for name in _MEASURES if (value_P := getattr(self, name)) is not None}

    def realised(self) -> np.ndarray:
        """P, uint8: the symbol that the document really has at each position."""
        parts = [self.document[s.start : s.start + s.length] + (b"\xff" if s.has_end else b"") for s in self.segments]
        return np.frombuffer(b"".join(parts), dtype=np.uint8)

    def entry_positions(self) -> np.ndarray:
        """E, int64: the position of each entry."""
        return np.repeat(np.arange(self.num_positions), self.entry_counts)

    def per_position(self, values_E: np.ndarray) -> np.ndarray:
        """P, float64: the sum of these values of a position's entries."""
        return np.bincount(self.entry_positions(), values_E, self.num_positions)

    def probs(self) -> np.ndarray:
        """E, float64: the stored probabilities."""
        return np.exp(self.logprobs.astype(np.float64))


class Question(NamedTuple):
    """What a record asks about, without the answers."""

    doc_id: str
    window_start: int
    document: bytes
    segments: tuple[Segment, ...]
    message_roles: tuple[str, ...] = ()
    message_lengths: tuple[int, ...] = ()
    conversation: str = ""
    teacher_token_lengths: np.ndarray = np.empty(0, dtype=np.int32)  # T; empty where it was not asked for

    @property
    def messages(self) -> list[dict[str, str]]:
        """As of `Record`."""
        return _messages(self)


def common_measures(records: Sequence[Record]) -> dict[str, list[np.ndarray] | None]:
    """Return the columns of each measure, record by record; None for one that not all of the records have."""
    found = [record.measures for record in records]
    lacking = {name for name in _MEASURES if any(name not in measures for measures in found)}
    return {name: None if name in lacking else [measures[name] for measures in found] for name in _MEASURES}


def _messages(asked: Question | Record) -> list[dict[str, str]]:
    ends = list(accumulate(asked.message_lengths))
    contents = [asked.document[start:end].decode("utf-8") for start, end in pairwise([0, *ends])]
    return [{"role": r, "content": c} for r, c in zip(asked.message_roles, contents, strict=True)]
