"""Several dumps of one corpus, read side by side and joined by content, whatever their names, shards and windows.

Dumps that list their documents in the same order, as dumps of one corpus do, are each read once from front to back. Any
other order is joined too, but its shards are reopened again and again. In memory: 28 bytes per document of each dump,
twice that while they are compared.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from schemas.record import Record, RecordOutline, RecordText
from schemas.shard import read_outlines, read_record_texts, read_shard
from schemas.storage.locations import Location
from stage2_student.data.align import overlapping, whole_document
from stage2_student.data.contents.join_table import ContentIndex, JoinTable, Keep
from stage2_student.data.contents.opened import OpenDump
from stage2_student.data.contents.table import documents

# A record, and for each other dump the windows that overlap with it.
Joined = tuple[Record, tuple[tuple[Record, ...], ...]]
Own = TypeVar("Own", Record, RecordText)
Other = TypeVar("Other", Record, RecordOutline)


class Join:
    """The documents that all of the dumps hold.

    Args:
        keep: where the table of documents is kept, so that it is made once; None: it is made anew, in memory.
    Attributes:
        remarks: those of the table.
    Raises:
        ValueError: no document is in all dumps.
    """

    def __init__(self, dumps: Sequence[OpenDump], keep: Keep | None = None) -> None:
        self.first = dumps[0]
        table = JoinTable.of(dumps) if keep is None else keep.table(dumps)
        self._table, self.remarks = table, table.remarks
        self._others = list(zip(dumps[1:], table.others, strict=True))

    def shard(self, index: int) -> Iterator[Joined]:
        """Yield the joined records of one of the first dump's shards.

        Each comes with the windows of every other dump that overlap with it.
        """

        def windows_of(lookup: _Lookup[Record], key: np.uint64, windows: Sequence[Record]) -> list[Record]:
            found = lookup.find(key)
            if whole_document(found) != whole_document(windows):
                raise ValueError(f"{lookup.path}: document {found[0].doc_id} has the same key as another document")
            return found

        return self._shard(index, _records, _records, windows_of)

    def texts(self, index: int) -> Iterator[tuple[RecordText, tuple[tuple[RecordOutline, ...], ...]]]:
        """Yield the same records without targets; of the other dumps no text is read, so that it is not compared."""
        return self._shard(index, read_record_texts, read_outlines, lambda lookup, key, _: lookup.find(key))

    def _shard(
        self,
        index: int,
        read: Callable[[Location], Iterator[Own]],
        read_other: Callable[[Location], Iterator[Other]],
        find: "Callable[[_Lookup[Other], np.uint64, Sequence[Own]], list[Other]]",
    ) -> Iterator[tuple[Own, tuple[tuple[Other, ...], ...]]]:
        keys = self._table.keys_of(index)
        in_turn = documents(read(self.first.shards[index]))
        # Reopened for each shard: which of several equal documents is taken must not depend on what was read before.
        others = [_Lookup(*other, read_other) for other in self._others]
        for key, is_common, (_, windows) in zip(keys, self._table.are_common(keys), in_turn, strict=True):
            if not is_common:
                continue
            other_windows = [find(other, key, windows) for other in others]
            for record in windows:
                parts = tuple(overlapping(record, theirs) for theirs in other_windows)
                if all(parts):
                    yield record, parts


def _records(path: Location) -> Iterator[Record]:
    return read_shard(path, small_buffers=True)


class _Lookup(Generic[Other]):
    """A dump's documents by content; a shard is read on from where the last document ended."""

    def __init__(self, dump: OpenDump, index: ContentIndex, read: Callable[[Location], Iterator[Other]]) -> None:
        self.path, self._shards, self._index = dump.path, dump.shards, index
        self._read_shard: Callable[[Location], Iterator[Other]] = read
        self._at = (-1, -1)  # shard and row of the next record
        self._records: Iterator[Other] = iter(())

    def find(self, key: np.uint64) -> list[Other]:
        """Return this dump's records of the document.

        Of several equal documents it takes the next one, so that reading goes forward.
        """
        locations = self._index.of(key)
        shard, row, count = next((location for location in locations if location[:2] >= self._at), locations[0])
        return self._read(shard, row, count)

    def _read(self, shard: int, row: int, count: int) -> list[Other]:
        if shard != self._at[0] or row < self._at[1]:
            self._at, self._records = (shard, 0), self._read_shard(self._shards[shard])
        skipped = row - self._at[1]
        self._at = (shard, row + count)
        return list(islice(self._records, skipped, skipped + count))
