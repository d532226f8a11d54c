"""Records of several dumps that ask about the same bytes, cut to the positions that all of them supervise.

Teachers cut long documents where their own context ends, and begin a chat's turn where their own tokens do. So a
position is known by its place in the whole document: by the byte it stands before, and whether it asks for that byte or
for END.

Shape legend: P positions of a record, K of them that all dumps supervise, E entries of these.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np

from schemas.record import Question, Record, Segment, common_measures


def places(asked: Question | Record) -> np.ndarray:
    """P, int64, ascending: twice the byte offset of each position in the whole document, and one more where it asks for
    a byte.

    END comes before the byte at the same offset: that byte is another turn's.
    """
    parts = [np.empty(0, dtype=np.int64)]
    for segment in asked.segments:
        start = asked.window_start + segment.start
        parts.append(2 * (start + np.arange(segment.length)) + 1)
        parts.append(2 * np.array([start + segment.length] * segment.has_end, dtype=np.int64))
    return np.concatenate(parts)


def whole_document(windows: Sequence[Question | Record]) -> bytes:
    """The document that these windows were cut from; each starts where an earlier one has been, or ends."""
    document = bytearray()
    for window in windows:
        document[window.window_start :] = window.document
    return bytes(document)


def speakers(windows: Sequence[Question | Record]) -> bytes:
    """Who says what of a whole chat: where each message starts, and its role; empty for plain text."""
    roles = {}
    for window in windows:
        offset = window.window_start
        for role, length in zip(window.message_roles, window.message_lengths, strict=True):
            roles[offset] = role
            offset += length
    return "".join(f"{offset} {role}\n" for offset, role in sorted(roles.items())).encode()


@overload
def with_segments(asked: Record, kept: Sequence[bool]) -> Record: ...
@overload
def with_segments(asked: Question | Record, kept: Sequence[bool]) -> Question | Record: ...
def with_segments(asked: Question | Record, kept: Sequence[bool]) -> Question | Record:
    """The same with some of its segments, and their targets alone."""
    segments = tuple(segment for segment, keep in zip(asked.segments, kept, strict=True) if keep)
    if isinstance(asked, Question):
        return asked._replace(segments=segments)
    sizes = [segment.num_positions for segment in asked.segments]
    rows = np.flatnonzero(np.repeat(np.array(kept, dtype=bool), sizes))
    return replace(asked, segments=segments, **_rows([asked], rows))


def overlapping(record: Record, windows: Sequence[Record]) -> tuple[Record, ...]:
    """Those of another dump's windows that supervise a position of this record."""
    return tuple(window for window in windows if np.isin(places(record), places(window)).any())


def aligned(record: Record, others: Sequence[Sequence[Record]]) -> list[Record]:
    """`record` cut to the positions that all supervise, once with its own targets, and once with those of each other
    dump.

    Args:
        others: of each other dump, the windows of the same document that overlap with the record.
    """
    kept_P = _kept(record, others)
    segments, kept_K = tuple(_cut(record.segments, kept_P)), places(record)[kept_P]
    return [replace(record, segments=segments, **_columns(windows, kept_K)) for windows in ([record], *others)]


def common_segments(record: Record, others: Sequence[Sequence[Record]]) -> tuple[Segment, ...]:
    """The segments of the records that `aligned` gives."""
    return tuple(_cut(record.segments, _kept(record, others)))


def _kept(record: Record, others: Sequence[Sequence[Record]]) -> np.ndarray:
    """P, bool: which positions all supervise."""
    kept_P = np.ones(record.num_positions, dtype=bool)
    for windows in others:
        kept_P &= np.isin(places(record), np.concatenate([places(window) for window in windows]))
    return kept_P


def _cut(segments: Sequence[Segment], kept_P: np.ndarray) -> Iterator[Segment]:
    """The parts of the segments that are kept. A part has an END where its segment's is kept, and what is before it."""
    first = 0
    for segment in segments:
        kept = kept_P[first : first + segment.length]
        end = segment.has_end and bool(kept_P[first + segment.length])
        first += segment.num_positions
        edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]])))
        for start, stop in edges.reshape(-1, 2).tolist():
            yield Segment(segment.start + start, stop - start, end and stop == segment.length)
        if end and not (len(kept) and kept[-1]):
            yield Segment(segment.start + segment.length, 0, True)


def _columns(windows: Sequence[Record], kept_K: np.ndarray) -> dict[str, Any]:
    """The columns of a record, at these places of the document."""
    places_P = np.concatenate([places(window) for window in windows])
    order = np.argsort(places_P, kind="stable")
    return _rows(windows, order[np.searchsorted(places_P[order], kept_K)])


def _rows(windows: Sequence[Record], rows_K: np.ndarray) -> dict[str, Any]:
    """The columns of a record, of these of the windows' positions in turn."""
    counts_P = np.concatenate([window.entry_counts for window in windows]).astype(np.int64)
    counts_K, firsts_K = counts_P[rows_K], (np.cumsum(counts_P) - counts_P)[rows_K]
    entries_E = np.arange(counts_K.sum()) + np.repeat(firsts_K - (np.cumsum(counts_K) - counts_K), counts_K)
    measures = {
        name: None if columns is None else np.concatenate(columns)[rows_K]
        for name, columns in common_measures(windows).items()
    }
    entries = {n: np.concatenate([getattr(w, n) for w in windows])[entries_E] for n in ("symbols", "logprobs")}
    return {"entry_counts": counts_K.astype(np.uint16), **measures, **entries}
