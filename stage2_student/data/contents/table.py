"""A dump's documents: keys of their content, and where their records are."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from schemas.record import Record, RecordOutline, RecordText
from schemas.shard import read_record_texts
from schemas.storage.locations import Location
from stage2_student.data.align import position_keys, speakers, whole_document
from stage2_student.data.contents.opened import OpenDump


@dataclass(frozen=True)
class Contents:
    """The documents of a dump (N, in its order): keys of their content, and where their records are."""

    keys_N: np.ndarray  # uint64, hash of the document's bytes and, for a chat, of who says which
    supervised_N: np.ndarray  # uint64, hash of the supervised positions
    shard_N: np.ndarray  # int32
    row_N: np.ndarray  # int32, of its first record in the shard
    count_N: np.ndarray  # int32, number of records: more than one if it was cut into windows

    @classmethod
    def of(cls, dump: OpenDump) -> "Contents":
        """Read the whole dump and return its contents."""
        parts = [cls._of_shard(shard, path) for shard, path in enumerate(dump.shards)]
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    @staticmethod
    def _of_shard(shard: int, path: Location) -> list[np.ndarray]:
        """Return the columns of one shard.

        Only one shard at a time is held as tuples of Python numbers, which take seven times as much memory as the
        arrays.
        """
        rows = [
            (
                content_key(group),
                supervised_key(group),
                shard,
                row,
                len(group),
            )
            for row, group in documents(read_record_texts(path))
        ]
        return columns(rows, (np.uint64, np.uint64, np.int32, np.int32, np.int32))


def columns(rows: Sequence[tuple[int, ...]], kinds: Sequence[type]) -> list[np.ndarray]:
    """Turn rows of numbers into an array for each column."""
    return [np.array([row[i] for row in rows], dtype=kind) for i, kind in enumerate(kinds)]


def content_key(windows: Sequence[RecordText]) -> int:
    """Return the hash of a document's bytes and, for a chat, of who says which."""
    return key(whole_document(windows) + speakers(windows))


def supervised_key(windows: Sequence[RecordText | RecordOutline]) -> int:
    """Return the hash of a document's supervised positions."""
    return key(b"".join(position_keys(window).tobytes() for window in windows))


def key(content: bytes) -> int:
    """Return the first 8 bytes of the content's SHA-256, as a little-endian number."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


AnyRecord = TypeVar("AnyRecord", RecordText, RecordOutline, Record)


def documents(records: Iterable[AnyRecord]) -> Iterator[tuple[int, list[AnyRecord]]]:
    """Yield a shard's records by document, each with the row of its first record.

    The windows of a document are consecutive; the first starts at byte 0.
    """
    group: list[AnyRecord] = []
    row = 0
    for record in records:
        if group and record.window_start == 0:
            yield row, group
            row, group = row + len(group), []
        group.append(record)
    if group:
        yield row, group
