"""A complete dump as a student reads it: what its records ask, and those records that a rank wants.

Several dumps of one corpus are read as one: their records joined, and their targets mixed.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from pipeline.config import DumpRef
from schemas.record import Question, Record
from schemas.shard import num_records, read_questions, read_rows
from schemas.storage.locations import Location, location
from stage2_student.data.align import aligned, common_segments
from stage2_student.data.dump_join import Join, Joined, OpenDump
from stage2_student.data.mix import Mix
from stage2_student.data.order import START, Order, Place, Position


class DumpReader:
    """The records of a complete dump; of several dumps those whose document all of them hold, mixed.

    Args:
        dump: the one whose shards and records are counted.
        seed: of the order.
        others: dumps of the same corpus; `mix` makes one record of theirs and the first one's.
    Raises:
        ValueError: a planned shard is missing, or several dumps have no document in common.
    """

    def __init__(self, dump: Location, seed: int, others: Sequence[Location] = (), mix: Mix | None = None) -> None:
        assert bool(others) == (mix is not None)
        dumps = [OpenDump(path) for path in (dump, *others)]
        self.seed, self.mix = seed, mix
        self.manifest, self.other_manifests = dumps[0].manifest, [other.manifest for other in dumps[1:]]
        self.shards = dumps[0].shards
        self.join = Join(dumps) if others else None

    @classmethod
    def of(cls, refs: Sequence[DumpRef], how: Literal["arithmetic", "geometric"], seed: int) -> "DumpReader":
        """Of a recipe's dumps; `how` several are mixed."""
        paths = [location(ref.path) for ref in refs]
        mix = Mix.of([ref.weight for ref in refs], how) if len(refs) > 1 else None
        return cls(paths[0], seed, paths[1:], mix)

    @property
    def remarks(self) -> dict[str, int]:
        """What several dumps do not have in common: a number of documents for each sentence about it."""
        return {} if self.join is None else self.join.remarks

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def questions(self, shard: int) -> Iterator[Question | Record]:
        """What the records of a shard ask, in turn: little more than the text is read. Of several dumps, the joined
        ones.

        Where there is one teacher, with the lengths of its tokens.
        """
        if self.join is None:
            return read_questions(self.shards[shard], with_tokens=True)
        return (_question(*joined) for joined in self.join.shard(shard))

    def lanes(self) -> "Lanes":
        """The records, for reading."""
        return Lanes(self)

    def records_of(self, shard: int, rows: Iterable[int]) -> Iterator[Record]:
        """These records of a shard, ascending. `rows` is asked for the next when it is due."""
        if self.join is None:
            return read_rows(self.shards[shard], rows, beside_others=True)
        return map(self._mixed, _at(self.join.shard(shard), rows))

    def _mixed(self, joined: Joined) -> Record:
        record, others = joined
        assert self.mix is not None
        return self.mix(aligned(record, others))

    def records(self, start: Position = START) -> Iterator[tuple[Record, Position]]:
        """Every record in order, with the position after it, epoch after epoch, without end: what all ranks together
        read.
        """
        lanes = self.lanes()
        for window in Order(self.seed, self._counts()).windows(start):
            columns = np.stack([window.lane_W, window.at_W, window.shard_W, window.unit_W], axis=1).tolist()
            places = [Place(window.epoch, window.number, *column) for column in columns]
            found = {place: lanes.record(place) for place in sorted(places)}
            for index, place in enumerate(places, window.first):
                record = found.pop(place)
                if Position(window.epoch, index) >= start:
                    yield record, Position(window.epoch, index + 1)

    def _counts(self) -> np.ndarray:
        if self.join is None:
            return np.array([num_records(shard) for shard in self.shards], dtype=np.int64)
        return np.array([sum(1 for _ in self.join.shard(shard)) for shard in range(self.num_shards)], dtype=np.int64)


class Lanes:
    """Shards that are read side by side, each lane from front to back; of each, the last record that was read is
    kept.
    """

    def __init__(self, reader: DumpReader) -> None:
        self._reader = reader
        self._lanes: dict[int, _OpenShard] = {}

    def record(self, place: Place) -> Record:
        """The record at a place; places of a lane ascend. Asked for again, the same object."""
        lane = self._lanes.get(place.lane)
        if lane is None or lane.key != (place.epoch, place.shard) or lane.row > place.row:
            lane = self._lanes[place.lane] = _OpenShard((place.epoch, place.shard), self._reader)
        return lane.record(place.row)


class _OpenShard:
    """A shard that is read on, from where it was left."""

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


def _question(record: Record, others: Sequence[Sequence[Record]]) -> Record:
    """What all dumps ask of a record; of several teachers' tokens none are a boundary."""
    segments = common_segments(record, others)
    return replace(record, segments=segments, teacher_token_lengths=record.teacher_token_lengths[:0])


def _at(joined: Iterator[Joined], rows: Iterable[int]) -> Iterator[Joined]:
    at = 0
    for row in rows:
        for _ in range(row - at):
            next(joined)
        yield next(joined)
        at = row + 1
