"""A complete dump as a student reads it: what its records ask, and those records that a rank wants.

Several dumps of one corpus are read as one: their records joined, and their targets mixed.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Literal

import numpy as np

from pipeline.config import DumpRef
from schemas.record import Question, Record
from schemas.shard import num_records, read_questions, read_rows
from schemas.store import Location, location
from stage2_student.align import aligned
from stage2_student.join import Join, Joined, OpenDump
from stage2_student.mix import Mix
from stage2_student.order import START, Order, Place, Position


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
        """What the records of a shard ask, in turn: little more than the text is read. Of several dumps, the joined ones."""
        if self.join is None:
            return read_questions(self.shards[shard])
        return (record for record, _ in self.join.shard(shard))

    def read(self, places: Iterable[Place]) -> Iterator[Record]:
        """The records at these places, which ascend as the shards are read, epoch after epoch. A place is asked for when it is due."""
        for (_, shard), of_shard in groupby(places, key=lambda place: (place.epoch, place.shard)):
            rows = (place.row for place in of_shard)
            if self.join is None:
                yield from read_rows(self.shards[shard], rows)
            else:
                yield from map(self._mixed, _at(self.join.shard(shard), rows))

    def _mixed(self, joined: Joined) -> Record:
        record, others = joined
        assert self.mix is not None
        return self.mix(aligned(record, others))

    def records(self, start: Position = START) -> Iterator[tuple[Record, Position]]:
        """Every record in order, with the position after it, epoch after epoch, without end: what all ranks together read."""
        for window in Order(self.seed, self._counts()).windows(start):
            places = [window.place(index) for index in range(len(window.at_W))]
            in_turn = sorted(places)
            found = dict(zip(in_turn, self.read(in_turn), strict=True))
            for index, place in enumerate(places, window.first.record):
                record = found.pop(place)
                if Position(window.first.epoch, index) >= start:
                    yield record, Position(window.first.epoch, index + 1)

    def _counts(self) -> np.ndarray:
        if self.join is None:
            return np.array([num_records(shard) for shard in self.shards], dtype=np.int64)
        return np.array([sum(1 for _ in self.join.shard(shard)) for shard in range(self.num_shards)], dtype=np.int64)


def _at(joined: Iterator[Joined], rows: Iterable[int]) -> Iterator[Joined]:
    at = 0
    for row in rows:
        for _ in range(row - at):
            next(joined)
        yield next(joined)
        at = row + 1
