"""A complete dump as a student reads it: the texts of its records, and the records that a rank needs.

Several dumps of one corpus are read as one: their records are joined, and their targets mixed.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from pipeline.config import DumpRef
from schemas.record import Record, RecordOutline, RecordText
from schemas.shard import num_records, read_record_texts, read_rows
from schemas.storage.locations import Location, location
from stage2_student.data.align import aligned, common_segments
from stage2_student.data.contents.join_table import Keep
from stage2_student.data.contents.opened import OpenDump
from stage2_student.data.dump_join import Join, Joined
from stage2_student.data.mix import Mix
from stage2_student.data.order import START, Order, Position, RecordRef


class DumpReader:
    """The records of a complete dump; with several dumps, those whose document is in all of them, mixed.

    Args:
        dump: the dump whose shards and records are counted.
        seed: of the order.
        others: dumps of the same corpus; `mix` makes one record from theirs and the first dump's.
        keep: as of `Join`.
    Raises:
        ValueError: a planned shard is missing, or several dumps have no document in common.
    """

    def __init__(
        self,
        dump: Location,
        seed: int,
        others: Sequence[Location] = (),
        mix: Mix | None = None,
        keep: Keep | None = None,
    ) -> None:
        assert bool(others) == (mix is not None)
        self.dumps = [OpenDump(path) for path in (dump, *others)]
        self.seed, self.mix = seed, mix
        self.manifest, self.other_manifests = self.dumps[0].manifest, [other.manifest for other in self.dumps[1:]]
        self.shards = self.dumps[0].shards
        self.join = Join(self.dumps, keep) if others else None

    @classmethod
    def of(
        cls, refs: Sequence[DumpRef], how: Literal["arithmetic", "geometric"], seed: int, keep: Keep | None = None
    ) -> "DumpReader":
        """Open a recipe's dumps; `how` is the kind of mean that several are mixed by, `keep` as of `Join`."""
        paths = [location(ref.path) for ref in refs]
        mix = Mix.of([ref.weight for ref in refs], how) if len(refs) > 1 else None
        return cls(paths[0], seed, paths[1:], mix, keep)

    @property
    def remarks(self) -> dict[str, int]:
        """Number of documents for each remark on what several dumps do not have in common."""
        return {} if self.join is None else self.join.remarks

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def record_texts(self, shard: int) -> Iterator[RecordText]:
        """Yield the text and segments of a shard's records, in turn, reading little more than the text.

        With one teacher, the lengths of its tokens too. With several dumps, the joined records; text of the first
        dump's alone is read.
        """
        if self.join is None:
            return read_record_texts(self.shards[shard], with_tokens=True)
        return (_common_text(*joined) for joined in self.join.texts(shard))

    def lanes(self) -> "Lanes":
        """Return a reader of records by reference."""
        return Lanes(self)

    def records_of(self, shard: int, rows: Iterable[int]) -> Iterator[Record]:
        """Yield the records of a shard at these rows, which ascend.

        `rows` is advanced only when the next record is requested.
        """
        if self.join is None:
            return read_rows(self.shards[shard], rows, small_buffers=True)
        return map(self._mixed, _at(self.join.shard(shard), rows))

    def _mixed(self, joined: Joined) -> Record:
        record, others = joined
        assert self.mix is not None
        return self.mix(aligned(record, others))

    def records(self, start: Position = START) -> Iterator[tuple[Record, Position]]:
        """Yield every record in order, with the position after it, epoch after epoch without end.

        These are the records that all ranks together read.
        """
        lanes = self.lanes()
        for window in Order(self.seed, self._counts()).windows(start):
            columns = np.stack([window.lane_W, window.at_W, window.shard_W, window.unit_W], axis=1).tolist()
            refs = [RecordRef(window.epoch, window.number, *column) for column in columns]
            records = {ref: lanes.record(ref) for ref in sorted(refs)}
            for index, ref in enumerate(refs, window.first):
                record = records.pop(ref)
                if Position(window.epoch, index) >= start:
                    yield record, Position(window.epoch, index + 1)

    def _counts(self) -> np.ndarray:
        if self.join is None:
            return np.array([num_records(shard) for shard in self.shards], dtype=np.int64)
        return np.array([sum(1 for _ in self.join.texts(shard)) for shard in range(self.num_shards)], dtype=np.int64)


class Lanes:
    """Shards read side by side, each lane from front to back; the last record read in each is kept."""

    def __init__(self, reader: DumpReader) -> None:
        self._reader = reader
        self._lanes: dict[int, _OpenShard] = {}

    def record(self, ref: RecordRef) -> Record:
        """Return the record that a reference points to; the references of a lane ascend.

        A repeated request returns the same object.
        """
        lane = self._lanes.get(ref.lane)
        if lane is None or lane.key != (ref.epoch, ref.shard) or lane.row > ref.row:
            lane = self._lanes[ref.lane] = _OpenShard((ref.epoch, ref.shard), self._reader)
        return lane.record(ref.row)


class _OpenShard:
    """A shard that is read on from where reading stopped."""

    def __init__(self, key: tuple[int, int], reader: DumpReader) -> None:
        self.key, self.row = key, -1
        self._due: deque[int] = deque()
        self._records = reader.records_of(key[1], iter(self._due.popleft, None))
        self._last: Record | None = None

    def record(self, row: int) -> Record:
        if row != self.row:
            self._due.append(row)
            self._last, self.row = next(self._records), row
        assert self._last is not None
        return self._last


def _common_text(record: RecordText, others: Sequence[Sequence[RecordOutline]]) -> RecordText:
    """Return a record with the segments that all dumps supervise.

    It has no teacher tokens: those of several teachers give no common boundaries.
    """
    return record._replace(segments=common_segments(record, others))


def _at(joined: Iterator[Joined], rows: Iterable[int]) -> Iterator[Joined]:
    at = 0
    for row in rows:
        for _ in range(row - at):
            next(joined)
        yield next(joined)
        at = row + 1
