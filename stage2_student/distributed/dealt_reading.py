"""Reading of dumps that is dealt to the ranks: each shard is read by one of them, which gives the others their records.

Which documents a rank trains on follows from their lengths, so a rank needs records of every shard. Read by each rank,
a dump would be decoded, and fetched from a store, once for each. So for an epoch every shard has one reader
(`stage2_student.data.order.Order.readers`), known to all ranks without a message. A rank asks the reader of each shard
for the records that it is about to encode. Neither the order of documents nor the batches depend on who reads.

A reader decodes a shard from front to back as far as it is asked to, each stripe of it as a rank alone would, and holds
the records until no rank can still need them: those of the windows of the last few steps. A record that is asked for
later than that is read again.

Each rank listens on a port of its own, and tells it, with a secret, over the ranks' channel. A message is its length
in 8 bytes and that many bytes. The columns of records go into the socket and out of it without a copy.
"""

import json
import pickle
import secrets
import socket
import struct
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice
from typing import Protocol

import numpy as np

from schemas.record import Record
from stage2_student.data import order
from stage2_student.data.order import RecordRef
from stage2_student.data.reader import DumpReader
from stage2_student.distributed.rank_messages import Channel, LostRankError, enable_keepalive

_MAX_CONNECTIONS = 64  # held open to other ranks; a process may have 1,024 open files
_MAX_PARTS = 512  # of a call: the kernel takes 1,024
_LENGTH = struct.Struct(">Q")
# What reading a dump raises for a fault of the dump or its store; the rank that asked raises it too.
_FAULTS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}

Buffer = bytes | memoryview
ReaderOf = Callable[[RecordRef], int]  # the rank that reads the shard of a reference


class Records(Protocol):
    """A source of the records that a rank needs."""

    def records(self, refs: Sequence[RecordRef], reader_of: ReaderOf) -> dict[RecordRef, Record]:
        """Return the records of references, which ascend within a call and from call to call."""

    def forget(self, windows: Sequence[tuple[int, int]]) -> None:
        """Drop what was held for windows before these, of each corpus: no rank will ask for it."""


class LocalReading:
    """The records of dumps that this rank reads alone."""

    def __init__(self, readers: Sequence[DumpReader]) -> None:
        self._lanes = [reader.lanes() for reader in readers]

    def records(self, refs: Sequence[RecordRef], reader_of: ReaderOf) -> dict[RecordRef, Record]:
        """Return the records of references."""
        return {ref: self._lanes[ref.corpus].record(ref) for ref in refs}

    def forget(self, windows: Sequence[tuple[int, int]]) -> None:
        """Do nothing: a lane holds its last record only."""


class DealtReading:
    """One rank's part of the reading, and its way to the records that other ranks read.

    Args:
        readers: one per corpus.
        channel: of all ranks, which make this object at the same time.
    """

    def __init__(self, readers: Sequence[DumpReader], channel: Channel) -> None:
        self._channel, self._shelf = channel, Shelf(readers)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=channel.world)
        own = {"host": channel.own_host(), "port": self._server.getsockname()[1], "word": secrets.token_hex(16)}
        self._peers = channel.gather(own)
        self._word = str(own["word"])
        self._open: OrderedDict[int, socket.socket] = OrderedDict()
        threading.Thread(target=self._accept, name="dealt reading", daemon=True).start()

    def records(self, refs: Sequence[RecordRef], reader_of: ReaderOf) -> dict[RecordRef, Record]:
        """Return the records of references, asking their readers, which work side by side.

        Raises:
            LostRankError: a reader has ended.
            ValueError, OSError: a shard is damaged or cannot be read.
        """
        by_rank: dict[int, list[RecordRef]] = defaultdict(list)
        for ref in refs:
            by_rank[reader_of(ref)].append(ref)
        own = by_rank.pop(self._channel.rank, [])
        found: dict[RecordRef, Record] = {}
        others = list(by_rank)
        for first in range(0, len(others), _MAX_CONNECTIONS):
            some = others[first : first + _MAX_CONNECTIONS]
            for rank in some:
                with self._reaching(rank) as peer:
                    send(peer, json.dumps(by_rank[rank]).encode())
            found |= {ref: self._shelf.record(ref) for ref in own}  # beside the other readers
            own = []
            for rank in some:
                with self._reaching(rank) as peer:
                    answer = receive(peer)
                found |= zip(by_rank[rank], unpacked(answer), strict=True)
        return found | {ref: self._shelf.record(ref) for ref in own}

    def forget(self, windows: Sequence[tuple[int, int]]) -> None:
        """Drop the records of windows before these."""
        self._shelf.forget(windows)

    def close(self) -> None:
        """Stop answering. Call it once no rank can ask any more."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for peer in self._open.values():
            peer.close()

    @contextmanager
    def _reaching(self, rank: int) -> Iterator[socket.socket]:
        """Yield the connection to a rank, and say of any failure that it is that rank's."""
        try:
            if rank not in self._open:
                if len(self._open) == _MAX_CONNECTIONS:
                    self._open.popitem(last=False)[1].close()
                self._open[rank] = self._connected(rank)
            self._open.move_to_end(rank)
            yield self._open[rank]
        except (OSError, EOFError) as error:
            raise LostRankError(
                self._channel.loss(10) or f"rank {rank}, which reads a shard for this one, does not answer: {error}"
            ) from error

    def _connected(self, rank: int) -> socket.socket:
        peer = self._peers[rank]
        connection = socket.create_connection((peer["host"], peer["port"]), timeout=60)
        enable_keepalive(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send(connection, str(peer["word"]).encode())
        if not secrets.compare_digest(receive(connection), self._peers[0]["word"].encode()):
            raise ConnectionError(f"what listens at {peer['host']}:{peer['port']} is not that rank")
        return connection

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(connection,), name="dealt reading", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer one rank until it ends. A rank that is gone is the channel's to report."""
        with connection, suppress(OSError, EOFError):
            connection.settimeout(10)
            if not secrets.compare_digest(receive(connection, max_bytes=100), self._word.encode()):
                return
            enable_keepalive(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send(connection, str(self._peers[0]["word"]).encode())
            while True:
                refs = [RecordRef(*ref) for ref in json.loads(receive(connection))]
                try:
                    answer = packed([self._shelf.record(ref) for ref in refs])
                except Exception as error:  # the rank that asked raises it
                    kind = next((name for name, of in _FAULTS.items() if isinstance(error, of)), "")
                    message = str(error) if kind else f"rank {self._channel.rank} reading a shard: {error!r}"
                    answer = [b"E", json.dumps({"kind": kind, "message": message}).encode()]
                send(connection, *answer)


def packed(records: Sequence[Record]) -> list[Buffer]:
    """Return the parts of an answer: the records, and apart from them their columns, none of which is copied.

    Each column begins at a multiple of 8 bytes, as compiled code wants it.
    """
    columns: list[pickle.PickleBuffer] = []
    described = pickle.dumps(records, protocol=5, buffer_callback=columns.append)
    raw = [memoryview(described), *(column.raw() for column in columns)]
    sizes = np.array([len(raw), *map(len, raw)], dtype=np.int64)
    padding = bytes(8)
    padded = (part for own in raw for part in (own, padding[: -len(own) % 8]))
    return [b"R".ljust(8), sizes.data.cast("B"), *padded]


def unpacked(answer: bytearray) -> list[Record]:
    """Return the records of an answer, or raise what their reader could not do.

    Their columns are parts of `answer`, which stays in memory as long as one of its records does: it is of one window.
    """
    view = memoryview(answer)
    if answer[:1] == b"R":
        number = int(np.frombuffer(view, dtype=np.int64, count=1, offset=8)[0])
        sizes = np.frombuffer(view, dtype=np.int64, count=number, offset=16)
        begins = 16 + 8 * number + np.cumsum([0, *(sizes + -sizes % 8)[:-1]])
        parts = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
        described, *columns = (view[begin:end] for begin, end in parts)
        records: list[Record] = pickle.loads(described, buffers=columns)
        return records
    fault = json.loads(bytes(view[1:]))
    raise _FAULTS.get(fault["kind"], RuntimeError)(fault["message"])


class Shelf:
    """The shards that a rank reads, as far as they were asked for, and their records that may be asked for again."""

    def __init__(self, readers: Sequence[DumpReader]) -> None:
        self._readers = readers
        self._open: dict[tuple[int, int, int, int], _HeldShard] = {}
        self._lock = threading.Lock()

    def record(self, ref: RecordRef) -> Record:
        """Return the record that a reference points to. Any number of threads may ask."""
        key = ref.corpus, ref.epoch, ref.lane, ref.shard
        with self._lock:
            if key not in self._open:
                self._open[key] = _HeldShard(self._readers[ref.corpus], ref.shard)
            held = self._open[key]
        return held.record(ref)

    def forget(self, windows: Sequence[tuple[int, int]]) -> None:
        """Drop the records of windows before these, of each corpus, and the shards that end before them."""
        with self._lock:
            opened = list(self._open.items())
        for key, held in opened:
            if not held.forget(windows[key[0]]):
                with self._lock:
                    del self._open[key]

    @property
    def num_held(self) -> int:
        """Return the number of records held."""
        with self._lock:
            return sum(held.num_held for held in self._open.values())


class _HeldShard:
    """A shard of one lane, read on from where reading stopped."""

    def __init__(self, reader: DumpReader, shard: int) -> None:
        self._reader, self._shard = reader, shard
        self._lock = threading.Lock()
        self._last_rows: dict[tuple[int, int], int] = {}  # the last row asked for, by window
        self._held: dict[int, Record] = {}
        self._first = self._next = -1

    def _open(self, row: int) -> None:
        """Open the shard for a row, and for those before it that another rank may ask for in the same window."""
        self._first = self._next = max(0, row - order.WINDOW_PIECES)
        self._records: Iterator[Record] = self._reader.records_of(self._shard, count(self._first))
        self._held = {}

    def record(self, ref: RecordRef) -> Record:
        with self._lock:
            window = ref.epoch, ref.window
            self._last_rows[window] = max(self._last_rows.get(window, 0), ref.row)
            if self._first < 0 or ref.row < self._first:
                self._open(ref.row)
            while self._next <= ref.row:
                self._held[self._next] = next(self._records)
                self._next += 1
            return self._held[ref.row]

    def forget(self, before: tuple[int, int]) -> bool:
        """Drop the records of earlier windows; returns whether the shard is still needed.

        The last record of a window stays: its further pieces may be in the next one.
        """
        with self._lock:
            passed = [window for window in self._last_rows if window < before]
            first = max((self._last_rows.pop(window) for window in passed), default=0)
            for row in range(self._first, first):
                self._held.pop(row, None)
            self._first = max(self._first, first)
            return bool(self._last_rows)

    @property
    def num_held(self) -> int:
        with self._lock:
            return len(self._held)


def send(connection: socket.socket, *parts: Buffer) -> None:
    """Send a message that consists of these parts, as they lie in memory."""
    left = deque(memoryview(part) for part in parts if len(part))
    left.appendleft(memoryview(_LENGTH.pack(sum(map(len, left)))))
    while left:
        sent = connection.sendmsg(list(islice(left, _MAX_PARTS)))
        while left and sent >= len(left[0]):
            sent -= len(left.popleft())
        if sent:
            left[0] = left[0][sent:]


def receive(connection: socket.socket, max_bytes: int | None = None) -> bytearray:
    """Receive a message."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if max_bytes is not None and length > max_bytes:
        raise EOFError("not a message of a rank")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view, at = memoryview(buffer), 0
    while at < length:
        received = connection.recv_into(view[at:])
        if not received:
            raise EOFError("the connection has ended")
        at += received
    return buffer
