"""What the ranks of a job tell each other outside of collectives: without a limit of time, and a rank that dies is
noticed at once.

A collective ends after minutes (DeepSpeed's after 10, `DEEPSPEED_TIMEOUT`), and the job with it. To load, convert,
write or export a large model takes longer, so nobody waits for that in one: the ranks meet here first. Each holds a TCP
connection to rank 0. The kernel closes that of a process that ends, whatever ended it and whatever the others are
doing, and its keepalives find a machine that is away; one that is only slow, or stopped, stays. A heartbeat of our own
would take a rank for dead that has its hands full, and has no word for the others.

Lines of JSON: {"value": ...} and {"values": [...]} of a `gather`, {"lost": "..."} from rank 0 of another one,
{"failed": "..."} and {"bye": true} as a rank's last word.
"""

import atexit
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed.rendezvous import rendezvous

from pipeline.runtime import log
from stage2_student.distributed.rank_environment import rank_environment

SILENCE_SECONDS = 240  # of a machine, until it counts as away
_SPEAK_SECONDS, _END_SECONDS = 0.5, 5.0  # for what a rank has to say of its own, once another is lost
_KEY = "bld/channel"


class LostRankError(ConnectionError):
    """Another rank has ended, or its machine is away: this one cannot go on."""


class Channel:
    """Of one rank to the others; of one that is alone, to nobody.

    Attributes:
        lost: what became of another rank, in words; None while all are there.
    """

    def __init__(self, rank: int, world: int, peers: dict[int, "_Peer"], store: Any = None) -> None:
        self.rank, self.world = rank, world
        self.lost: str | None = None
        self._peers = peers  # of rank 0: all others; of another: rank 0
        self._store = store  # the server of it lives as long
        self._inbox: dict[int, queue.SimpleQueue[dict[str, Any]]] = {other: queue.SimpleQueue() for other in peers}
        self._lock = threading.Lock()
        self._ended = False  # this rank has said its last word: what becomes of the others is nothing to it any more
        self._waiting = False
        for other, peer in peers.items():
            threading.Thread(target=self._listen, args=(other, peer), name=f"rank {other}", daemon=True).start()

    def gather(self, value: Any = None) -> list[Any]:
        """Every rank's value, by rank, on all of them: when the last one has come, however long that takes.

        Args:
            value: anything that JSON holds; it comes back as JSON gives it.
        Raises:
            LostRankError: a rank has ended, before or meanwhile.
        """
        if self.world == 1:
            return [json.loads(json.dumps(value))]
        if self.rank:
            self._send(0, {"value": value})
            return list(self._take(0)["values"])
        values = [json.loads(json.dumps(value)), *(self._take(other)["value"] for other in sorted(self._peers))]
        for other in self._peers:
            self._send(other, {"values": values})
        return values

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends in an error, so that they end too."""
        self._end({"failed": " ".join(str(error).split()) or type(error).__name__})

    def leave(self) -> None:
        """Tell the others that this rank ends as it should; nothing where it has failed."""
        self._end({"bye": True})

    def loss(self, seconds: float) -> str | None:
        """What `lost` says within a while: a collective may fail for a rank's end before it is known here."""
        deadline = time.monotonic() + seconds
        while self.lost is None and time.monotonic() < deadline and self.world > 1:
            time.sleep(0.01)
        return self.lost

    def _end(self, last_word: dict[str, Any]) -> None:
        if not self._ended:
            self._ended = True
            for peer in self._peers.values():
                with suppress(OSError):  # it may have ended before us
                    peer.send(last_word)

    def _send(self, other: int, message: dict[str, Any]) -> None:
        try:
            self._peers[other].send(message)
        except OSError:  # what has become of it the listener knows, or is about to
            raise LostRankError(self.loss(10) or f"{self._peers[other].name} does not answer") from None

    def _take(self, other: int) -> dict[str, Any]:
        self._waiting = True
        try:
            message = self._inbox[other].get() if self.lost is None else {}
        finally:
            self._waiting = False
        if self.lost is not None or "bye" in message:
            raise LostRankError(self.lost or f"{self._peers[other].name} has ended before the others")
        return message

    def _listen(self, other: int, peer: "_Peer") -> None:
        """Take in what a rank says, until it ends."""
        how = f"{peer.name} is gone without a word: it was killed, or its machine is away"
        with suppress(OSError, ValueError):
            for message in peer.messages():
                if "failed" in message or "lost" in message:
                    how = str(message.get("lost") or f"{peer.name} has failed: {message['failed']}")
                    break
                self._inbox[other].put(message)
                if "bye" in message:
                    return
        with self._lock:
            if self._ended or self.lost is not None:
                return
            self.lost = f"{how}. Rank {self.rank} ends with it; the same command goes on"
        self._spread(other, how)

    def _spread(self, other: int, how: str) -> None:
        """Tell the other ranks, and who waits here; end this process where nobody does and it does not end itself,
        whatever it hangs in.
        """
        for rank, peer in self._peers.items():
            if rank != other:
                with suppress(OSError):
                    peer.send({"lost": how})
        waiting = self._waiting
        for inbox in self._inbox.values():
            inbox.put({})
        time.sleep(_SPEAK_SECONDS)
        if waiting or self._ended:
            return
        log.error(str(self.lost))
        time.sleep(_END_SECONDS)
        if not self._ended:
            os._exit(1)


class _Peer:
    """A connection to another rank."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.name = name
        self._socket, self._lock = connection, threading.Lock()
        self._file = connection.makefile("r", encoding="utf-8")

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What comes, until the connection ends."""
        for line in self._file:
            yield json.loads(line)


def _notice_silence(connection: socket.socket) -> None:
    """Have the kernel ask whether the other machine is there, and end the connection where it is not; nothing else ends
    it.
    """
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": (SILENCE_SECONDS - 60) // 30}
    for name, value in (times | {"TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000}).items():
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def join_time() -> timedelta:
    """Return how long all ranks have to come: DeepSpeed's own time for it."""
    return timedelta(minutes=int(os.getenv("DEEPSPEED_TIMEOUT", "10")))


@cache
def join() -> Channel:
    """The channel among the ranks that this process was started with; one for as long as the process lives.

    Raises LostRankError where ranks do not come, or cannot be reached.
    """
    os.environ.update(rank_environment(os.environ))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        return Channel(0, 1, {})
    try:
        store, _, _ = next(rendezvous("env://", timeout=join_time()))
        peers = _accept(store, world) if rank == 0 else {0: _connect(store, rank)}
    except (OSError, RuntimeError) as error:  # torch's own errors are of the latter kind
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostRankError(f"rank {rank} of {world}: the ranks did not all meet at {where}: {error}") from error
    channel = Channel(rank, world, peers, store)
    atexit.register(channel.leave)
    return channel


def _accept(store: Any, world: int) -> dict[int, _Peer]:
    """Rank 0: connections of all others, each of which knows the word that stands in the store."""
    within = join_time()
    deadline = time.monotonic() + within.total_seconds()
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    peers: dict[int, _Peer] = {}
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world) as server:
        word = secrets.token_hex(16)
        store.set(_KEY, json.dumps({"port": server.getsockname()[1], "word": word, "name": _name(0)}))
        while len(peers) < world - 1:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, world)) - set(peers))
                raise TimeoutError(f"within {within} ranks {missing} have not come") from None
            connection.settimeout(10)
            peer = _Peer(connection, "")
            try:
                said = next(peer.messages(), {})
                if not secrets.compare_digest(str(said["word"]), word):
                    raise ValueError("a stranger at the port")
                _notice_silence(connection)
                peer.name, peers[int(said["rank"])] = str(said["name"]), peer
            except (OSError, ValueError, KeyError, TypeError):
                peer.close()
    return peers


def _connect(store: Any, rank: int) -> _Peer:
    told = json.loads(store.get(_KEY))
    connection = socket.create_connection((os.environ["MASTER_ADDR"], told["port"]), timeout=60)
    _notice_silence(connection)
    peer = _Peer(connection, told["name"])
    peer.send({"rank": rank, "word": told["word"], "name": _name(rank)})
    return peer


def _name(rank: int) -> str:
    return f"rank {rank} (process {os.getpid()} of {socket.gethostname()})"
