"""The order in which a run meets the records of a dump: a pure function of the seed and of how many records each shard holds.

An epoch takes the shards in a drawn order, and shuffles the records of each window of it. So every rank knows the order of all
records without reading one, any position is found at once, and what a window needs of a shard is known before it is read.

Shape legend: S shards, W records of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WINDOW_RECORDS = (
    2048  # shuffled together; at 2 kB of text and 26 bytes per position about 110 MB where one rank holds them all
)


VERSION = 2  # of the order that a seed gives, and of how batches are planned along it; a run goes on in its own only


class Position(NamedTuple):
    """The next record to take: the `record`-th of the epoch's order."""

    epoch: int
    record: int


START = Position(0, 0)


class Place(NamedTuple):
    """A record: the `at`-th of the epoch as the shards are read, and where it stands."""

    epoch: int
    at: int
    shard: int
    row: int


def window_of(epoch: int, record: int) -> tuple[int, int]:
    """Which window holds the `record`-th of an epoch; windows compare as they follow one another."""
    return epoch, record // WINDOW_RECORDS


class Window(NamedTuple):
    """Records that are shuffled together, in the order in which they are taken."""

    first: Position
    at_W: np.ndarray  # int64
    shard_W: np.ndarray
    row_W: np.ndarray

    def place(self, index: int) -> Place:
        return Place(self.first.epoch, int(self.at_W[index]), int(self.shard_W[index]), int(self.row_W[index]))


@dataclass(frozen=True)
class Order:
    """The order of all epochs. Raises ValueError where there is no record at all."""

    seed: int
    counts_S: np.ndarray  # int64, records of each shard

    def __post_init__(self) -> None:
        if not self.counts_S.sum():
            raise ValueError(f"the dump's {len(self.counts_S)} shards hold no record")

    def windows(self, start: Position = START) -> Iterator[Window]:
        """Without end; the first is the one in which `start` lies."""
        epoch, skip = start
        while True:
            shards_S = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts_S))
            ends_S = np.cumsum(self.counts_S[shards_S])
            num_records = int(ends_S[-1])
            for first in range(skip - skip % WINDOW_RECORDS, num_records, WINDOW_RECORDS):
                random = np.random.default_rng([self.seed, epoch, 1 + first // WINDOW_RECORDS])
                at_W = random.permutation(np.arange(first, min(first + WINDOW_RECORDS, num_records)))
                turn_W = np.searchsorted(ends_S, at_W, side="right")
                shard_W = shards_S[turn_W]
                yield Window(Position(epoch, first), at_W, shard_W, at_W - ends_S[turn_W] + self.counts_S[shard_W])
            epoch, skip = epoch + 1, 0
