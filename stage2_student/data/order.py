"""The order in which a run meets what it trains on: a pure function of the seed and of how many pieces each shard
holds.

A piece is a record, or a part of one that is too long for the student (`stage2_student.data.pieces`). An epoch deals
the shards, in a drawn order, to lanes that are read side by side, each from front to back. A window takes the next
pieces of every lane, of each an equal share of what it holds, and shuffles them: so a step holds what far parts of the
corpus hold, and each shard is read about once. Pieces of one document, which stand together in a shard, are spread over
the window: none share a step that is smaller than their distance.

So every rank knows the order of all pieces without reading one, any position is found at once, and what a window needs
is known before it is read.

Shape legend: S shards, K lanes, U pieces of all shards in turn, W pieces of a window.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

WINDOW_PIECES = (
    2048  # shuffled together; 2 kB of text and 26 bytes per position make 110 MB where one rank holds them all
)
# Of 8 sources, one after another in 64 shards of 8,192 records, a step of 30 records holds 1.0 with one lane, 3.7, 5.8,
# 7.2 and 7.6 with 4, 8, 16 and 32; of all records shuffled at once it would hold 7.9.
LANES = 16
# Most lanes in one shard, where there are fewer shards than lanes, or it holds more than a lane's share: it is decoded
# 2.5 times then, for each from its start. A shard of 65,536 records among 15 of 100 would else be one lane, and a step
# hold 1.7 of its 8 sources, not 4.
STRIPES = 4

VERSION = 4  # of the order that a seed gives, and of what of a record is in it; a run goes on in its own only
WHOLE_CHATS = 3  # the same order, where a chat is left out for one turn that the student's template writes otherwise
WHOLE_RECORDS = 2  # the order before: one lane, records never cut. Runs that began in it go on in it
READ = (WHOLE_RECORDS, WHOLE_CHATS, VERSION)


class Position(NamedTuple):
    """The next piece to take: the `record`-th of the epoch's order."""

    epoch: int
    record: int


START = Position(0, 0)


class Place(NamedTuple):
    """A piece, and where it stands; places ascend as they are read. `at` counts the pieces of a lane."""

    epoch: int
    window: int
    lane: int
    at: int
    shard: int
    row: int
    piece: int = 0  # of the record


class Window(NamedTuple):
    """Pieces that are shuffled together, in the order in which they are taken."""

    epoch: int
    number: int
    first: int  # how many pieces of the epoch come before
    lane_W: np.ndarray  # int64
    at_W: np.ndarray
    shard_W: np.ndarray
    unit_W: np.ndarray  # which piece of its shard


class _Lane(NamedTuple):
    """Parts of shards, read one after another."""

    shard_T: np.ndarray  # int64, of T parts
    first_T: np.ndarray  # the first piece of the shard that is read
    end_T: np.ndarray  # pieces of the lane up to the part's end

    @property
    def length(self) -> int:
        return int(self.end_T[-1])


@dataclass(frozen=True)
class Order:
    """The order of all epochs. Raises ValueError where there is nothing at all.

    Attributes:
        counts_S: int64, pieces of each shard.
        continues_U: bool, whether a piece is of the same document as the piece before it; None: none is.
    """

    seed: int
    counts_S: np.ndarray
    continues_U: np.ndarray | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        assert self.version in READ
        if not self.counts_S.sum():
            raise ValueError(f"the dump's {len(self.counts_S)} shards hold no record")

    def windows(self, start: Position = START) -> Iterator[Window]:
        """Without end; the first is the one in which `start` lies."""
        epoch, skip = start
        num_windows = -(-int(self.counts_S.sum()) // WINDOW_PIECES)
        while True:
            lanes = self._lanes(epoch)
            lengths_K = np.array([lane.length for lane in lanes], dtype=np.int64)
            edges = partial(self._edges, lengths_K, num_windows)
            first = bisect_right(range(num_windows), skip, key=lambda number: int(edges(number + 1).sum()))
            for number in range(first, num_windows):
                yield self._window(epoch, number, lanes, edges(number), edges(number + 1))
            epoch, skip = epoch + 1, 0

    def _edges(self, lengths_K: np.ndarray, num_windows: int, number: int) -> np.ndarray:
        """K: how many pieces of each lane come before the window of this number."""
        if self.version == WHOLE_RECORDS:
            return np.minimum(number * WINDOW_PIECES, lengths_K)
        return number * lengths_K // num_windows

    def _lanes(self, epoch: int) -> list[_Lane]:
        random = np.random.default_rng([self.seed, epoch])
        if self.version == WHOLE_RECORDS:
            shards = random.permutation(len(self.counts_S))
            return [_Lane(shards, np.zeros_like(shards), np.cumsum(self.counts_S[shards]))]
        held = np.flatnonzero(self.counts_S)
        counts = self.counts_S[held]
        shares = (counts * LANES + counts.sum() // 2) // counts.sum()  # of a lane, rounded
        stripes = np.clip(shares, -(-LANES // len(held)), None).clip(max=STRIPES)
        of, count, total = np.repeat(held, stripes), np.repeat(counts, stripes), np.repeat(stripes, stripes)
        stripe = np.arange(len(of)) - np.repeat(np.cumsum(stripes) - stripes, stripes)
        parts = np.stack([of, count * stripe // total, count * (stripe + 1) // total], axis=1)
        parts = random.permutation(parts[parts[:, 1] < parts[:, 2]])
        dealt = [parts[lane::LANES] for lane in range(min(LANES, len(parts)))]
        return [_Lane(own[:, 0], own[:, 1], np.cumsum(own[:, 2] - own[:, 1])) for own in dealt]

    def _window(self, epoch: int, number: int, lanes: list[_Lane], begin_K: np.ndarray, end_K: np.ndarray) -> Window:
        found = []
        for index, (lane, begin, end) in enumerate(zip(lanes, begin_K, end_K, strict=True)):
            at = np.arange(begin, end)
            part = np.searchsorted(lane.end_T, at, side="right")
            before = np.append(0, lane.end_T)[part]
            found.append(np.stack([np.full_like(at, index), at, lane.shard_T[part], lane.first_T[part] + at - before]))
        columns = np.concatenate(found, axis=1)
        random = np.random.default_rng([self.seed, epoch, 1 + number])
        if self.version == WHOLE_RECORDS:
            order = random.permutation(columns.shape[1])
        else:
            order = _spread(self._groups(columns), random)
        return Window(epoch, number, int(begin_K.sum()), *columns[:, order])

    def _groups(self, columns: np.ndarray) -> np.ndarray:
        """W, int64: pieces that stand one after another in a document have one number."""
        lane_W, _, shard_W, unit_W = columns
        if self.continues_U is None:
            return np.arange(len(lane_W))
        first_S = np.cumsum(self.counts_S) - self.counts_S
        continues_W = self.continues_U[first_S[shard_W] + unit_W]
        same_W = (np.diff(lane_W, prepend=-1) == 0) & (np.diff(shard_W, prepend=-1) == 0)
        groups: np.ndarray = np.cumsum(~(continues_W & same_W)) - 1
        return groups


def _spread(group_W: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A drawn order in which the members of each group stand at like distances, each anywhere with the same
    probability.
    """
    draw_W = random.random(len(group_W))
    sizes = np.bincount(group_W)
    by_group = np.lexsort((draw_W, group_W))
    turn_W = np.empty(len(group_W))
    turn_W[by_group] = np.arange(len(group_W)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shift_W = random.random(len(sizes))[group_W]
    order: np.ndarray = np.argsort((turn_W + shift_W) / sizes[group_W], kind="stable")
    return order
