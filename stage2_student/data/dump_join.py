"""Several dumps of one corpus, read side by side: documents joined by content, whatever their names, shards and
windows.

Dumps that list their documents in one order, as dumps of one corpus do, are each read once from front to back; another
order is joined too, but its shards are opened again and again. Held in memory: 28 bytes per document of each dump,
twice that while they are compared.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import TypeVar

import numpy as np

from schemas import dump_files
from schemas.manifest import Manifest
from schemas.record import Question, Record
from schemas.shard import read_questions, read_shard
from schemas.storage.locations import Location, names
from stage2_student.data.align import overlapping, places, speakers, whole_document

Joined = tuple[
    Record, tuple[tuple[Record, ...], ...]
]  # a record, and of each other dump the windows that overlap with it


class OpenDump:
    """A complete dump.

    Raises ValueError where a planned shard is missing, or none is planned.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        self.manifest = Manifest.load(path)
        self.shards = [shard.path(path) for shard in self.manifest.shards]
        there = names(path / dump_files.SHARDS)
        missing = [shard.name for shard in self.shards if shard.name not in there]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{path} is not complete: {len(missing)} of {len(self.shards)} shards are missing ({listed}); "
                "run `bld teacher` again with the same recipe, it goes on where it stopped"
            )
        if not self.shards:
            raise ValueError(
                f"{path} plans no shard: its corpus held no usable document ({self.manifest.corpus_counts})"
            )


@dataclass(frozen=True)
class Contents:
    """What a dump asks about, document by document (N of them), in its order."""

    keys_N: np.ndarray  # uint64, of the document's bytes and, of a chat, of who says which
    asked_N: np.ndarray  # uint64, of the positions that are supervised
    shard_N: np.ndarray  # int32
    row_N: np.ndarray  # int32, of its first record in the shard
    count_N: np.ndarray  # int32, records: more than one where it was cut into windows

    @classmethod
    def of(cls, dump: OpenDump) -> "Contents":
        parts = [cls._of_shard(shard, path) for shard, path in enumerate(dump.shards)]
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    @staticmethod
    def _of_shard(shard: int, path: Location) -> list[np.ndarray]:
        """The columns of one shard: as tuples of Python's numbers they would take seven times as much, so never of all
        at once.
        """
        rows = [
            (
                _key(whole_document(group) + speakers(group)),
                _key(b"".join(places(q).tobytes() for q in group)),
                shard,
                row,
                len(group),
            )
            for row, group in _documents(read_questions(path))
        ]
        kinds = (np.uint64, np.uint64, np.int32, np.int32, np.int32)
        return [np.array([r[i] for r in rows], dtype=kind) for i, kind in enumerate(kinds)]


def _key(content: bytes) -> int:
    """The first 8 bytes of a SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


Asked = TypeVar("Asked", Question, Record)


def _documents(records: Iterable[Asked]) -> Iterator[tuple[int, list[Asked]]]:
    """A shard's records by document, with the row of the first: windows of one document stand together, the first at
    byte 0.
    """
    group: list[Asked] = []
    row = 0
    for record in records:
        if group and record.window_start == 0:
            yield row, group
            row, group = row + len(group), []
        group.append(record)
    if group:
        yield row, group


class Join:
    """The documents that all of the dumps hold.

    `remarks`: how many others there are, which are left out, and of how many the dumps supervise different positions,
    each with the dumps' names. Raises ValueError where no document is in all dumps.
    """

    def __init__(self, dumps: Sequence[OpenDump]) -> None:
        self.first = dumps[0]
        contents = [Contents.of(dump) for dump in dumps]
        self._common = reduce(np.intersect1d, [table.keys_N for table in contents])
        self.remarks = _remarks([dump.path for dump in dumps], contents)
        if not len(self._common):
            raise ValueError(
                f"no document is in all of {', '.join(str(dump.path) for dump in dumps)}; student.dumps names dumps of one corpus"
            )
        self._own = contents[0]
        self._others = [(dump, Places(table)) for dump, table in zip(dumps[1:], contents[1:], strict=True)]

    def shard(self, index: int) -> Iterator[Joined]:
        """The joined records of one of the first dump's shards, each with the windows of the other dumps that overlap
        with it.
        """
        keys = self._own.keys_N[self._own.shard_N == index]
        documents = _documents(read_shard(self.first.shards[index], beside_others=True))
        # Opened for each shard anew: which of several equal documents is taken must not depend on what was read before.
        others = [_Lookup(*other) for other in self._others]
        for key, is_common, (_, windows) in zip(keys, np.isin(keys, self._common), documents, strict=True):
            if not is_common:
                continue
            found = [other.find(key, whole_document(windows)) for other in others]
            for record in windows:
                parts = tuple(overlapping(record, theirs) for theirs in found)
                if all(parts):
                    yield record, parts


class Places:
    """Where a dump has a content: shard, row and number of records, ascending."""

    def __init__(self, contents: Contents) -> None:
        order = np.lexsort((contents.row_N, contents.shard_N, contents.keys_N))
        self._keys = contents.keys_N[order]
        self._places = np.stack([contents.shard_N, contents.row_N, contents.count_N], axis=1)[order]

    def of(self, key: np.uint64) -> list[tuple[int, int, int]]:
        first, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        return [tuple(place) for place in self._places[first:end].tolist()]


class _Lookup:
    """A dump's documents by content; a shard is read on from where the last document ended."""

    def __init__(self, dump: OpenDump, places: Places) -> None:
        self._dump, self._places = dump, places
        self._at = (-1, -1)  # shard and row of the next record
        self._records: Iterator[Record] = iter(())

    def find(self, key: np.uint64, document: bytes) -> list[Record]:
        """This dump's records of the document: of several equal ones the next, so that reading goes on."""
        found = self._places.of(key)
        shard, row, count = next((place for place in found if place[:2] >= self._at), found[0])
        windows = self._read(shard, row, count)
        if whole_document(windows) != document:
            raise ValueError(f"{self._dump.path}: document {windows[0].doc_id} has the key of another document")
        return windows

    def _read(self, shard: int, row: int, count: int) -> list[Record]:
        if shard != self._at[0] or row < self._at[1]:
            self._at, self._records = (shard, 0), read_shard(self._dump.shards[shard], beside_others=True)
        skipped = row - self._at[1]
        self._at = (shard, row + count)
        return list(islice(self._records, skipped, skipped + count))


def _remarks(paths: Sequence[Location], contents: Sequence[Contents]) -> dict[str, int]:
    """What the dumps do not have in common: a sentence each that goes on after a number of documents."""
    found: dict[str, int] = {}
    for path, table in zip(paths, contents, strict=True):
        for other_path, other in zip(paths, contents, strict=True):
            lacking = int((~np.isin(table.keys_N, other.keys_N)).sum())
            found[f"in {path} but not in {other_path}: left out"] = lacking
    order = np.argsort(contents[0].keys_N, kind="stable")
    keys, asked = contents[0].keys_N[order], contents[0].asked_N[order]
    for path, table in zip(paths[1:], contents[1:], strict=True):
        # Of several equal documents the last, as `Places` lists them.
        last = np.searchsorted(keys, table.keys_N, side="right") - 1
        common = (last >= 0) & (keys[last] == table.keys_N)
        differing = int((asked[last[common]] != table.asked_N[common]).sum())
        found[f"with other positions supervised in {path} than in {paths[0]}: those that both supervise are mixed"] = (
            differing
        )
    return {remark: count for remark, count in found.items() if count}
