"""Several dumps of one corpus, read side by side and joined by content, whatever their names, shards and windows.

Dumps that list their documents in the same order, as dumps of one corpus do, are each read once from front to back. Any
other order is joined too, but its shards are reopened again and again. In memory: 28 bytes per document of each dump,
twice that while they are compared.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import islice

import numpy as np

from schemas.record import Record
from schemas.shard import read_shard
from schemas.storage.locations import Location
from stage2_student.data.align import overlapping, whole_document
from stage2_student.data.contents.by_id import contents_of
from stage2_student.data.contents.opened import OpenDump
from stage2_student.data.contents.table import Contents, documents

# A record, and for each other dump the windows that overlap with it.
Joined = tuple[Record, tuple[tuple[Record, ...], ...]]


class Join:
    """The documents that all of the dumps hold.

    Attributes:
        remarks: sentences about documents that are left out because a dump lacks them, or of which dumps supervise
            different positions; each names the dumps, and has the number of these documents.
    Raises:
        ValueError: no document is in all dumps.
    """

    def __init__(self, dumps: Sequence[OpenDump]) -> None:
        self.first = dumps[0]
        contents = contents_of(dumps)
        self._common = reduce(np.intersect1d, [table.keys_N for table in contents])
        self.remarks = _remarks([dump.path for dump in dumps], contents)
        if not len(self._common):
            raise ValueError(
                f"no document is in all of {', '.join(str(dump.path) for dump in dumps)}; "
                "student.dumps must name dumps of one corpus"
            )
        self._own = contents[0]
        self._others = [(dump, ContentIndex(table)) for dump, table in zip(dumps[1:], contents[1:], strict=True)]

    def shard(self, index: int) -> Iterator[Joined]:
        """Yield the joined records of one of the first dump's shards.

        Each comes with the windows of every other dump that overlap with it.
        """
        keys = self._own.keys_N[self._own.shard_N == index]
        in_turn = documents(read_shard(self.first.shards[index], small_buffers=True))
        # Reopened for each shard: which of several equal documents is taken must not depend on what was read before.
        others = [_Lookup(*other) for other in self._others]
        for key, is_common, (_, windows) in zip(keys, np.isin(keys, self._common), in_turn, strict=True):
            if not is_common:
                continue
            other_windows = [other.find(key, whole_document(windows)) for other in others]
            for record in windows:
                parts = tuple(overlapping(record, theirs) for theirs in other_windows)
                if all(parts):
                    yield record, parts


class ContentIndex:
    """An index of a dump's documents by content: shard, row and number of records, ascending."""

    def __init__(self, contents: Contents) -> None:
        order = np.lexsort((contents.row_N, contents.shard_N, contents.keys_N))
        self._keys = contents.keys_N[order]
        self._locations = np.stack([contents.shard_N, contents.row_N, contents.count_N], axis=1)[order]

    def of(self, key: np.uint64) -> list[tuple[int, int, int]]:
        """Return the (shard, row, number of records) of each document with this key."""
        first, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        return [tuple(location) for location in self._locations[first:end].tolist()]


class _Lookup:
    """A dump's documents by content; a shard is read on from where the last document ended."""

    def __init__(self, dump: OpenDump, index: ContentIndex) -> None:
        self._dump, self._index = dump, index
        self._at = (-1, -1)  # shard and row of the next record
        self._records: Iterator[Record] = iter(())

    def find(self, key: np.uint64, document: bytes) -> list[Record]:
        """Return this dump's records of the document.

        Of several equal documents it takes the next one, so that reading goes forward.
        """
        locations = self._index.of(key)
        shard, row, count = next((location for location in locations if location[:2] >= self._at), locations[0])
        windows = self._read(shard, row, count)
        if whole_document(windows) != document:
            raise ValueError(f"{self._dump.path}: document {windows[0].doc_id} has the same key as another document")
        return windows

    def _read(self, shard: int, row: int, count: int) -> list[Record]:
        if shard != self._at[0] or row < self._at[1]:
            self._at, self._records = (shard, 0), read_shard(self._dump.shards[shard], small_buffers=True)
        skipped = row - self._at[1]
        self._at = (shard, row + count)
        return list(islice(self._records, skipped, skipped + count))


def _remarks(paths: Sequence[Location], contents: Sequence[Contents]) -> dict[str, int]:
    """Describe what the dumps do not have in common.

    Returns:
        The number of documents for each remark; the remark continues the sentence after that number.
    """
    remarks: dict[str, int] = {}
    for path, table in zip(paths, contents, strict=True):
        for other_path, other in zip(paths, contents, strict=True):
            lacking = int((~np.isin(table.keys_N, other.keys_N)).sum())
            remarks[f"in {path} but not in {other_path}: left out"] = lacking
    order = np.argsort(contents[0].keys_N, kind="stable")
    keys, supervised_N = contents[0].keys_N[order], contents[0].supervised_N[order]
    for path, table in zip(paths[1:], contents[1:], strict=True):
        # Of several equal documents the last, as in `ContentIndex`.
        last = np.searchsorted(keys, table.keys_N, side="right") - 1
        common = (last >= 0) & (keys[last] == table.keys_N)
        differing = int((supervised_N[last[common]] != table.supervised_N[common]).sum())
        remark = f"with other positions supervised in {path} than in {paths[0]}: those that both supervise are mixed"
        remarks[remark] = differing
    return {remark: count for remark, count in remarks.items() if count}
