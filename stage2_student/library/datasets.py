"""A dump as data sets of torch: by index, and as a stream in the order that `bld student` would shuffle it into.

Their items are the dump's records (`schemas.record.Record`): a document, or a window of a long one, with its targets.
They hold no tokens; a `DistillationCollator` encodes them.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from schemas.record import Record
from schemas.shard import num_records
from schemas.storage.locations import location
from stage2_student.data.order import START, Order, Position, RecordRef, ShuffleWindow
from stage2_student.data.reader import DumpReader, Lanes


class DumpDataset(Dataset[Record]):
    """The records of a complete dump by index, in the dump's order.

    Reading an index after the last one read in its shard reads on; reading one before it decodes the shard from its
    start. For shuffled training on a dump of more than a few shards use `DumpStream`.

    Args:
        dump: a folder, or an address: s3://bucket/folder, gs://bucket/folder, hf://datasets/owner/name.
    Raises:
        ValueError: the dump is incomplete.
    """

    def __init__(self, dump: str | Path) -> None:
        self._reader = DumpReader(location(str(dump)), seed=0)
        counts = [num_records(shard) for shard in self._reader.shards]
        self._end_S = np.cumsum(counts)
        self._lanes: tuple[int, Lanes] | None = None

    @property
    def has_chats(self) -> bool:
        """Return whether the records are chats."""
        return self._reader.manifest.has_chats

    def __len__(self) -> int:
        return int(self._end_S[-1])

    def __getitem__(self, index: int) -> Record:
        at = range(len(self))[index]  # raises IndexError
        shard = int(np.searchsorted(self._end_S, at, side="right"))
        row = at - (int(self._end_S[shard - 1]) if shard else 0)
        return self._open_lanes().record(RecordRef(0, 0, lane=shard, at=row, shard=shard, row=row))

    def _open_lanes(self) -> Lanes:
        """Return this process's open shards: a worker must not share files with the process that it is forked from."""
        if self._lanes is None or self._lanes[0] != os.getpid():
            self._lanes = os.getpid(), self._reader.lanes()
        return self._lanes[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_lanes": None}


class StreamedRecord(NamedTuple):
    """A record of a stream.

    Attributes:
        after: where to start a stream that goes on after the step that this record is in.
    """

    record: Record
    after: Position


class DumpStream(IterableDataset[StreamedRecord]):
    """The records of a complete dump in random order, epoch after epoch, without end.

    Each record occurs once an epoch, over all ranks and all workers of a DataLoader. The order depends on the seed
    alone, and the state is one value: store the `after` of the last batch in a checkpoint, and give it as `start`.

    Args:
        dump: as of `DumpDataset`.
        seed: of the order.
        start: where to begin; any number of ranks, workers and records per batch may go on from there.
        rank, world: this process, and the number of processes that share the stream. Leave them out where a trainer
            deals an iterable data set to its processes itself.
        batch_size: that of the DataLoader; needed if it has several workers, so that their batches are those of one.
    Raises:
        ValueError: the dump is incomplete or has no record.
    """

    def __init__(
        self,
        dump: str | Path,
        seed: int = 0,
        start: Position = START,
        batch_size: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of world {world}: ranks are counted from 0")
        self._reader = DumpReader(location(str(dump)), seed)
        self._order = Order(seed, np.array([num_records(shard) for shard in self._reader.shards], dtype=np.int64))
        self._start, self._batch_size, self._rank, self._world = Position(*start), batch_size, rank, world

    @property
    def has_chats(self) -> bool:
        """Return whether the records are chats."""
        return self._reader.manifest.has_chats

    @property
    def epoch_records(self) -> int:
        """Return the number of records in an epoch."""
        return int(self._order.counts_S.sum())

    def __iter__(self) -> Iterator[StreamedRecord]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if num_workers > 1 and self._batch_size is None:
            raise ValueError(f"{num_workers} workers share this stream: give DumpStream(batch_size=), the DataLoader's")
        batch_size = self._batch_size or 1
        lanes, before = self._reader.lanes(), self._index(self._start)
        for window in self._order.windows(self._start):
            index_W = self._index(Position(window.epoch, window.first)) + np.arange(len(window.unit_W)) - before
            batch_W = index_W // batch_size
            step_W = batch_W // self._world
            own_W = (index_W >= 0) & (batch_W % self._world == self._rank) & (step_W % num_workers == worker)
            end_W = before + (step_W + 1) * self._world * batch_size
            refs = _refs(window, np.flatnonzero(own_W))
            records = {ref: lanes.record(ref) for ref in sorted(refs)}
            for ref, end in zip(refs, end_W[own_W].tolist(), strict=True):
                yield StreamedRecord(records.pop(ref), Position(*divmod(end, self.epoch_records)))

    def _index(self, position: Position) -> int:
        """Return the number of records of all epochs before a position."""
        return position.epoch * self.epoch_records + position.record


def _refs(window: ShuffleWindow, own: np.ndarray) -> list[RecordRef]:
    columns = (window.lane_W, window.at_W, window.shard_W, window.unit_W)
    rows = np.stack([column[own] for column in columns], axis=1).tolist()
    return [RecordRef(window.epoch, window.number, *row) for row in rows]
