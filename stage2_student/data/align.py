"""Alignment of several dumps' records of the same bytes: only positions that all dumps supervise are kept.

Teachers cut long documents where their own context ends, and begin a turn of a chat where their own tokens do. So a
position is identified by its place in the whole document: by the byte that follows it, and by whether its target is
that byte or END.

Shape legend: P positions of a record, K positions that all dumps supervise, E entries at these K positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import numpy as np

from schemas.record import Record, RecordOutline, RecordText, Segment, common_measures

AnyWindow = TypeVar("AnyWindow", Record, RecordOutline)


def position_keys(record: RecordText | RecordOutline | Record) -> np.ndarray:
    """Return a key per position: twice its byte offset in the whole document, plus 1 if its target is a byte.

    END sorts before the byte at the same offset, because that byte belongs to another turn.

    Returns:
        P, int64, ascending.
    """
    parts = [np.empty(0, dtype=np.int64)]
    for segment in record.segments:
        start = record.window_start + segment.start
        parts.append(2 * (start + np.arange(segment.length)) + 1)
        parts.append(2 * np.array([start + segment.length] * segment.has_end, dtype=np.int64))
    return np.concatenate(parts)


def whole_document(windows: Sequence[RecordText | Record]) -> bytes:
    """Rebuild a document from its windows; each starts inside an earlier one, or where it ends."""
    document = bytearray()
    for window in windows:
        document[window.window_start :] = window.document
    return bytes(document)


def speakers(windows: Sequence[RecordText | RecordOutline | Record]) -> bytes:
    """Describe who says what in a whole chat: the offset and role of each message; empty for plain text."""
    roles = {}
    for window in windows:
        offset = window.window_start
        for role, length in zip(window.message_roles, window.message_lengths, strict=True):
            roles[offset] = role
            offset += length
    return "".join(f"{offset} {role}\n" for offset, role in sorted(roles.items())).encode()


@overload
def with_segments(record: Record, kept: Sequence[bool]) -> Record: ...
@overload
def with_segments(record: RecordText | Record, kept: Sequence[bool]) -> RecordText | Record: ...
def with_segments(record: RecordText | Record, kept: Sequence[bool]) -> RecordText | Record:
    """Return a copy with only the selected segments and their targets."""
    segments = tuple(segment for segment, keep in zip(record.segments, kept, strict=True) if keep)
    if isinstance(record, RecordText):
        return record._replace(segments=segments)
    sizes = [segment.num_positions for segment in record.segments]
    rows = np.flatnonzero(np.repeat(np.array(kept, dtype=bool), sizes))
    return replace(record, segments=segments, **_rows([record], rows))


def overlapping(record: Record | RecordText, windows: Sequence[AnyWindow]) -> tuple[AnyWindow, ...]:
    """Return the windows of another dump that supervise at least one position of this record."""
    return tuple(window for window in windows if np.isin(position_keys(record), position_keys(window)).any())


def aligned(record: Record, others: Sequence[Sequence[Record]]) -> list[Record]:
    """Cut `record` to the positions that all dumps supervise.

    Args:
        others: for each other dump, its windows of the same document that overlap with the record.
    Returns:
        The record once per dump: first with its own targets, then with those of each other dump.
    """
    kept_P = _kept(record, others)
    segments, kept_K = tuple(_cut(record.segments, kept_P)), position_keys(record)[kept_P]
    return [replace(record, segments=segments, **_columns(windows, kept_K)) for windows in ([record], *others)]


def common_segments(
    record: Record | RecordText, others: Sequence[Sequence[Record | RecordOutline]]
) -> tuple[Segment, ...]:
    """Return the segments that the records from `aligned` have."""
    return tuple(_cut(record.segments, _kept(record, others)))


def _kept(record: Record | RecordText, others: Sequence[Sequence[Record | RecordOutline]]) -> np.ndarray:
    """Return P, bool: True at positions that all dumps supervise."""
    keys_P = position_keys(record)
    kept_P = np.ones(len(keys_P), dtype=bool)
    for windows in others:
        kept_P &= np.isin(keys_P, np.concatenate([position_keys(window) for window in windows]))
    return kept_P


def _cut(segments: Sequence[Segment], kept_P: np.ndarray) -> Iterator[Segment]:
    """Yield the parts of the segments that are kept.

    If a segment's END is kept, it ends the part before it; where that is not kept, it is a part of its own without
    bytes.
    """
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
    """Return a record's columns at the positions with these keys."""
    keys_P = np.concatenate([position_keys(window) for window in windows])
    order = np.argsort(keys_P, kind="stable")
    return _rows(windows, order[np.searchsorted(keys_P[order], kept_K)])


def _rows(windows: Sequence[Record], rows_K: np.ndarray) -> dict[str, Any]:
    """Return a record's columns at these positions, numbered through all windows in turn."""
    counts_P = np.concatenate([window.entry_counts for window in windows]).astype(np.int64)
    counts_K, firsts_K = counts_P[rows_K], (np.cumsum(counts_P) - counts_P)[rows_K]
    entries_E = np.arange(counts_K.sum()) + np.repeat(firsts_K - (np.cumsum(counts_K) - counts_K), counts_K)
    measures = {
        name: None if columns is None else np.concatenate(columns)[rows_K]
        for name, columns in common_measures(windows).items()
    }
    entries = {n: np.concatenate([getattr(w, n) for w in windows])[entries_E] for n in ("symbols", "logprobs")}
    return {"entry_counts": counts_K.astype(np.uint16), **measures, **entries}
