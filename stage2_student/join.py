"""Several dumps of one corpus, read side by side: records joined by content, whatever their names and shards.

Dumps that list their documents in one order, as dumps of one corpus do, are each read once from front to back; another
order is joined too, but its shards are opened again and again. Held in memory: 16 bytes per record of each dump.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from schemas.manifest import Manifest
from schemas.shard import Record, read_contents, read_shard


class OpenDump:
    """A complete dump.

    Raises ValueError where a planned shard is missing, or none is planned.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.load(path)
        self.shards = [shard.path(path) for shard in self.manifest.shards]
        missing = [shard.name for shard in self.shards if not shard.exists()]
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{path} is not complete: {len(missing)} of {len(self.shards)} shards are missing ({names}); "
                "run `bld teacher` again with the same recipe, it goes on where it stopped"
            )
        if not self.shards:
            raise ValueError(
                f"{path} plans no shard: its corpus held no usable document ({self.manifest.corpus_counts})"
            )


@dataclass(frozen=True)
class Contents:
    """What a dump asks about, record by record (N of them), in its order."""

    keys_N: np.ndarray  # uint64, of document and segments
    windows_N: np.ndarray  # bool: a window of a longer document
    shard_N: np.ndarray  # int32
    row_N: np.ndarray  # int32, in the shard

    @classmethod
    def of(cls, dump: OpenDump) -> "Contents":
        rows = [
            (content.key, content.is_window, shard, row)
            for shard, path in enumerate(dump.shards)
            for row, content in enumerate(read_contents(path))
        ]
        kinds = (np.uint64, np.bool_, np.int32, np.int32)
        return cls(*(np.array([r[i] for r in rows], dtype=kind) for i, kind in enumerate(kinds)))


class Join:
    """The records that all of the dumps hold.

    `unmatched` counts the others, by the dump that has them and the one that does not; they are left out.
    Raises ValueError where no record is in all dumps.
    """

    def __init__(self, dumps: Sequence[OpenDump]) -> None:
        self.first = dumps[0]
        contents = [Contents.of(dump) for dump in dumps]
        self._common = reduce(np.intersect1d, [table.keys_N for table in contents])
        self.unmatched = _unmatched([dump.path for dump in dumps], contents)
        if not len(self._common):
            raise ValueError(
                f"no record is in all of {', '.join(str(dump.path) for dump in dumps)} ({dict(self.unmatched)}); student.dumps "
                "names dumps of one corpus"
            )
        self._own = contents[0]
        self._others = [(dump, Places(table)) for dump, table in zip(dumps[1:], contents[1:], strict=True)]

    def shard(self, index: int) -> Iterator[tuple[Record, ...]]:
        """The joined records of one of the first dump's shards, each with those of the other dumps behind it."""
        keys = self._own.keys_N[self._own.shard_N == index]
        # Opened for each shard anew: which of several equal records is taken must not depend on what was read before.
        others = [_Lookup(*other) for other in self._others]
        for key, is_common, record in zip(
            keys, np.isin(keys, self._common), read_shard(self.first.shards[index]), strict=True
        ):
            if is_common:
                yield (record, *(other.find(key, record) for other in others))


class Places:
    """Where a dump has a content: shard and row, ascending."""

    def __init__(self, contents: Contents) -> None:
        order = np.lexsort((contents.row_N, contents.shard_N, contents.keys_N))
        self._keys, self._shards, self._rows = (a[order] for a in (contents.keys_N, contents.shard_N, contents.row_N))

    def of(self, key: np.uint64) -> list[tuple[int, int]]:
        first, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        return list(zip(self._shards[first:end].tolist(), self._rows[first:end].tolist(), strict=True))


class _Lookup:
    """A dump's records by content; a shard is read on from where the last record stood."""

    def __init__(self, dump: OpenDump, places: Places) -> None:
        self._dump, self._places = dump, places
        self._at = (-1, -1)  # shard and row of the next record
        self._records: Iterator[Record] = iter(())

    def find(self, key: np.uint64, wanted: Record) -> Record:
        """This dump's record of the same content: of several the next one, so that reading goes on."""
        places = self._places.of(key)
        record = self._read(*next((place for place in places if place >= self._at), places[0]))
        if (record.document, record.segments) != (wanted.document, wanted.segments):
            raise ValueError(f"{self._dump.path}: {record.doc_id} has the key of {wanted.doc_id}, but another content")
        return record

    def _read(self, shard: int, row: int) -> Record:
        if shard != self._at[0] or row < self._at[1]:
            self._at, self._records = (shard, 0), read_shard(self._dump.shards[shard])
        while True:
            record, self._at = next(self._records), (shard, self._at[1] + 1)
            if self._at[1] > row:
                return record


def _unmatched(paths: Sequence[Path], contents: Sequence[Contents]) -> Counter[str]:
    """How many records one dump has and another has not, by reason."""
    found: Counter[str] = Counter()
    for path, table in zip(paths, contents, strict=True):
        for other_path, other in zip(paths, contents, strict=True):
            lacking_N = ~np.isin(table.keys_N, other.keys_N)
            found[f"in {path} but not in {other_path}"] += int((lacking_N & ~table.windows_N).sum())
            # Windows end where their teacher's context does.
            found[f"windows of long documents in {path}, cut elsewhere in {other_path}"] += int(
                (lacking_N & table.windows_N).sum()
            )
    return +found
