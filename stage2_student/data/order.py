"""The order of training data: a pure function of the seed and of the number of pieces in each shard.

A piece is a record, or a part of one that is too long for the student (`stage2_student.data.pieces`). An epoch deals
the shards, in random order, to lanes that are read side by side, each from front to back. A window takes the next
pieces of every lane, an equal share of each lane, and shuffles them: so a step mixes distant parts of the corpus, and
each shard is read about once. Pieces of one document, which are consecutive in a shard, are spread evenly over the
window: two of them share a step only if it is larger than their distance.

So every rank knows the order of all pieces without reading one, any position is found at once, and the pieces of a
window are known before they are read.

Shape legend: S shards, K lanes, U pieces of all shards in turn, W pieces of a window.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

# Pieces shuffled together. With 2 kB of text each and 26 bytes per position, one rank that holds them all needs 110 MB.
WINDOW_PIECES = 2048
# With 8 sources one after another in 64 shards of 8,192 records, a step of 30 records has records of 1.0 sources with
# 1 lane, and of 3.7, 5.8, 7.2 and 7.6 with 4, 8, 16 and 32; a shuffle of all records at once would give 7.9.
LANES = 16
# Maximum number of lanes in one shard, used if there are fewer shards than lanes, or a shard has more than a lane's
# share. Each lane decodes the shard from its start, so it is decoded 2.5 times. Without this, a shard of 65,536 records
# among 15 of 100 would be one lane, and a step would hold 1.7 of its 8 sources instead of 4.
STRIPES = 4

# Version of the order that a seed gives, and of what it includes of a record; a run continues only in its own version.
VERSION = 4
WHOLE_CHATS = 3  # same order, but a chat is left out if the student's template writes one of its turns differently
WHOLE_RECORDS = 2  # the earlier order: one lane, records never cut. Runs that began with it continue with it
READ = (WHOLE_RECORDS, WHOLE_CHATS, VERSION)


class Position(NamedTuple):
    """The next piece to take: the `record`-th of the epoch's order."""

    epoch: int
    record: int


START = Position(0, 0)


class RecordRef(NamedTuple):
    """A reference to a piece, ordered as pieces are read. `at` counts the pieces of a lane."""

    epoch: int
    window: int
    lane: int
    at: int
    shard: int
    row: int
    piece: int = 0  # index within the record
    corpus: int = 0  # index of the corpus in a union


class ShuffleWindow(NamedTuple):
    """Pieces shuffled together, in the order in which they are taken."""

    epoch: int
    number: int
    first: int  # number of pieces of the epoch before the window
    lane_W: np.ndarray  # int64
    at_W: np.ndarray
    shard_W: np.ndarray
    unit_W: np.ndarray  # index of the piece in its shard


class _Lane(NamedTuple):
    """Parts of shards, read one after another."""

    shard_T: np.ndarray  # int64, of T parts
    first_T: np.ndarray  # the first piece of the shard that is read
    end_T: np.ndarray  # number of pieces of the lane up to the part's end

    @property
    def length(self) -> int:
        return int(self.end_T[-1])


@dataclass(frozen=True)
class Order:
    """The order of all epochs.

    Attributes:
        counts_S: int64, pieces of each shard.
        continues_U: bool, whether a piece is of the same document as the piece before it; None: none is.
        window_pieces: pieces of a window; None: WINDOW_PIECES.
    Raises:
        ValueError: there are no pieces at all.
    """

    seed: int
    counts_S: np.ndarray
    continues_U: np.ndarray | None = None
    version: int = VERSION
    window_pieces: int | None = None

    def __post_init__(self) -> None:
        assert self.version in READ
        if not self.counts_S.sum():
            raise ValueError(f"none of the dump's {len(self.counts_S)} shards holds a record")

    def windows(self, start: Position = START) -> Iterator[ShuffleWindow]:
        """Yield windows without end, starting with the one that contains `start`."""
        epoch, skip = start
        num_windows = -(-int(self.counts_S.sum()) // (self.window_pieces or WINDOW_PIECES))
        while True:
            lanes = self._lanes(epoch)
            lengths_K = np.array([lane.length for lane in lanes], dtype=np.int64)
            edges = partial(self._edges, lengths_K, num_windows)
            first = bisect_right(range(num_windows), skip, key=lambda number: int(edges(number + 1).sum()))
            for number in range(first, num_windows):
                yield self._window(epoch, number, lanes, edges(number), edges(number + 1))
            epoch, skip = epoch + 1, 0

    def readers(self, epoch: int, world: int) -> np.ndarray:
        """Return S: the rank that reads each shard in an epoch.

        Shards are dealt in the order in which the lanes come to them, so that those read side by side have different
        readers, and every rank reads as many, but for one.
        """
        lanes = self._lanes(epoch)
        shards = np.concatenate([lane.shard_T for lane in lanes])
        due = np.concatenate([np.append(0, lane.end_T[:-1]) / lane.length for lane in lanes])
        in_turn = shards[np.argsort(due, kind="stable")]
        first = np.sort(np.unique(in_turn, return_index=True)[1])  # of several stripes of a shard
        readers_S = np.zeros(len(self.counts_S), dtype=np.int64)
        readers_S[in_turn[first]] = np.arange(len(first)) % world
        return readers_S

    def _edges(self, lengths_K: np.ndarray, num_windows: int, number: int) -> np.ndarray:
        """Return K: the number of pieces of each lane before the window with this number."""
        if self.version == WHOLE_RECORDS:
            return np.minimum(number * WINDOW_PIECES, lengths_K)
        # With few pieces in a window, all lanes would otherwise step together, and most windows would be empty.
        shift_K = np.arange(len(lengths_K)) * num_windows // len(lengths_K) if self.window_pieces else 0
        return (number * lengths_K + shift_K) // num_windows

    def _lanes(self, epoch: int) -> list[_Lane]:
        random = np.random.default_rng([self.seed, epoch])
        if self.version == WHOLE_RECORDS:
            shards = random.permutation(len(self.counts_S))
            return [_Lane(shards, np.zeros_like(shards), np.cumsum(self.counts_S[shards]))]
        held = np.flatnonzero(self.counts_S)
        counts = self.counts_S[held]
        shares = (counts * LANES + counts.sum() // 2) // counts.sum()  # in lanes, rounded
        stripes = np.clip(shares, -(-LANES // len(held)), None).clip(max=STRIPES)
        of, count, total = np.repeat(held, stripes), np.repeat(counts, stripes), np.repeat(stripes, stripes)
        stripe = np.arange(len(of)) - np.repeat(np.cumsum(stripes) - stripes, stripes)
        parts = np.stack([of, count * stripe // total, count * (stripe + 1) // total], axis=1)
        parts = random.permutation(parts[parts[:, 1] < parts[:, 2]])
        dealt = [parts[lane::LANES] for lane in range(min(LANES, len(parts)))]
        return [_Lane(own[:, 0], own[:, 1], np.cumsum(own[:, 2] - own[:, 1])) for own in dealt]

    def _window(
        self, epoch: int, number: int, lanes: list[_Lane], begin_K: np.ndarray, end_K: np.ndarray
    ) -> ShuffleWindow:
        columns_K = []
        for index, (lane, begin, end) in enumerate(zip(lanes, begin_K, end_K, strict=True)):
            at = np.arange(begin, end)
            part = np.searchsorted(lane.end_T, at, side="right")
            before = np.append(0, lane.end_T)[part]
            unit = lane.first_T[part] + at - before
            columns_K.append(np.stack([np.full_like(at, index), at, lane.shard_T[part], unit]))
        columns = np.concatenate(columns_K, axis=1)
        random = np.random.default_rng([self.seed, epoch, 1 + number])
        if self.version == WHOLE_RECORDS:
            order = random.permutation(columns.shape[1])
        else:
            order = _spread(self._groups(columns), random)
        return ShuffleWindow(epoch, number, int(begin_K.sum()), *columns[:, order])

    def _groups(self, columns: np.ndarray) -> np.ndarray:
        """Return W, int64: one number for consecutive pieces of a document."""
        lane_W, _, shard_W, unit_W = columns
        if self.continues_U is None:
            return np.arange(len(lane_W))
        first_S = np.cumsum(self.counts_S) - self.counts_S
        continues_W = self.continues_U[first_S[shard_W] + unit_W]
        same_W = (np.diff(lane_W, prepend=-1) == 0) & (np.diff(shard_W, prepend=-1) == 0)
        groups: np.ndarray = np.cumsum(~(continues_W & same_W)) - 1
        return groups


def _spread(group_W: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw an order in which the members of each group are evenly spaced.

    Each member is anywhere with the same probability.
    """
    draw_W = random.random(len(group_W))
    sizes = np.bincount(group_W)
    if sizes.max(initial=1) == 1:  # as below, sooner: every rank of a large world orders several windows a step
        return np.argsort(random.random(len(sizes))[group_W], kind="stable")
    by_group = np.lexsort((draw_W, group_W))
    turn_W = np.empty(len(group_W))
    turn_W[by_group] = np.arange(len(group_W)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shift_W = random.random(len(sizes))[group_W]
    order: np.ndarray = np.argsort((turn_W + shift_W) / sizes[group_W], kind="stable")
    return order
