"""Messages between the ranks of a job outside collectives: they have no timeout, and a dead rank is noticed at once.

A collective times out after minutes (DeepSpeed's after 10, `DEEPSPEED_TIMEOUT`) and ends the job. Loading, converting,
writing or exporting a large model can take longer, so the ranks wait here instead, before they enter a collective. Each
holds a TCP connection to rank 0. The kernel closes the connection of a process that ends, whatever the cause and
whatever the other ranks are doing, and its keepalives detect an unreachable machine; a rank that is only slow, or
stopped, stays connected. A heartbeat of our own would declare a busy rank dead.

Lines of JSON: {"value": ...} and {"values": [...]} for a `gather`, {"lost": "..."} from rank 0 about another rank,
{"failed": "..."} and {"bye": true} as a rank's last message.
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

SILENCE_SECONDS = 240  # without a sign of a machine, after which it counts as unreachable
_SPEAK_SECONDS, _END_SECONDS = 0.5, 5.0  # for a rank to report its own error and to exit, once another rank is lost
_KEY = "bld/channel"


class LostRankError(ConnectionError):
    """Another rank has ended, or its machine is unreachable: this rank cannot continue."""


class Channel:
    """The connections of one rank to the others; none if it is the only rank.

    Attributes:
        lost: how another rank was lost, as a message; None while all are connected.
    """

    def __init__(self, rank: int, world: int, peers: dict[int, "_Peer"], store: Any = None) -> None:
        self.rank, self.world = rank, world
        self.lost: str | None = None
        self._peers = peers  # on rank 0: all others; on any other rank: rank 0
        self._store = store  # keeps the rendezvous server alive
        self._inbox: dict[int, queue.SimpleQueue[dict[str, Any]]] = {other: queue.SimpleQueue() for other in peers}
        self._lock = threading.Lock()
        self._ended = False  # this rank has sent its last message; it ignores the loss of others from then on
        self._waiting = False
        for other, peer in peers.items():
            threading.Thread(target=self._listen, args=(other, peer), name=f"rank {other}", daemon=True).start()

    def gather(self, value: Any = None) -> list[Any]:
        """Return every rank's value, by rank, on all ranks, once the last one has called it, however long that takes.

        Args:
            value: any JSON value; it comes back as JSON decodes it.
        Raises:
            LostRankError: a rank has ended, before or during the call.
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

    def own_host(self) -> str:
        """Return the address at which the other ranks can reach this one: that of its connection to rank 0."""
        if self.rank == 0:
            return os.environ.get("MASTER_ADDR", "127.0.0.1")
        return self._peers[0].own_host()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with an error, so that they end too."""
        self._end({"failed": " ".join(str(error).split()) or type(error).__name__})

    def leave(self) -> None:
        """Tell the other ranks that this one ends normally; does nothing after `fail`."""
        self._end({"bye": True})

    def loss(self, seconds: float) -> str | None:
        """Wait up to `seconds` for `lost`: a collective may fail before the end of another rank is known here."""
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
        except OSError:  # the listener knows the cause, or is about to
            raise LostRankError(self.loss(10) or f"{self._peers[other].name} does not answer") from None

    def _take(self, other: int) -> dict[str, Any]:
        self._waiting = True
        try:
            message = self._inbox[other].get() if self.lost is None else {}
        finally:
            self._waiting = False
        if self.lost is not None or "bye" in message:
            raise LostRankError(self.lost or f"{self._peers[other].name} ended before the other ranks")
        return message

    def _listen(self, other: int, peer: "_Peer") -> None:
        """Receive a rank's messages until its connection ends."""
        how = f"{peer.name} is gone without a word: it was killed, or its machine is unreachable"
        with suppress(OSError, ValueError):
            for message in peer.messages():
                if "failed" in message or "lost" in message:
                    how = str(message.get("lost") or f"{peer.name} failed: {message['failed']}")
                    break
                self._inbox[other].put(message)
                if "bye" in message:
                    return
        with self._lock:
            if self._ended or self.lost is not None:
                return
            self.lost = f"{how}. Rank {self.rank} exits too; rerun the same command to continue"
        self._spread(other, how)

    def _spread(self, other: int, how: str) -> None:
        """Tell the other ranks and any waiting call here that a rank is lost.

        If no call is waiting and this process does not exit by itself, end it, whatever it hangs in.
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

    def own_host(self) -> str:
        return str(self._socket.getsockname()[0])

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield messages until the connection ends."""
        for line in self._file:
            yield json.loads(line)


def enable_keepalive(connection: socket.socket) -> None:
    """Have the kernel probe the other machine, and close the connection only if it does not answer."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": (SILENCE_SECONDS - 60) // 30}
    for name, value in (times | {"TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000}).items():
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def join_time() -> timedelta:
    """Return the time limit for all ranks to join, which is DeepSpeed's own."""
    return timedelta(minutes=int(os.getenv("DEEPSPEED_TIMEOUT", "10")))


@cache
def join() -> Channel:
    """Connect to the ranks that this process was started with; a process has one channel for its lifetime.

    Raises LostRankError if ranks do not join in time, or cannot be reached.
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
        raise LostRankError(f"rank {rank} of {world}: not all ranks joined at {where}: {error}") from error
    channel = Channel(rank, world, peers, store)
    atexit.register(channel.leave)
    return channel


def _accept(store: Any, world: int) -> dict[int, _Peer]:
    """Accept, on rank 0, the connections of all other ranks, each of which presents the secret in the store."""
    within = join_time()
    deadline = time.monotonic() + within.total_seconds()
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    peers: dict[int, _Peer] = {}
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world) as server:
        secret = secrets.token_hex(16)
        store.set(_KEY, json.dumps({"port": server.getsockname()[1], "word": secret, "name": _name(0)}))
        while len(peers) < world - 1:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, world)) - set(peers))
                raise TimeoutError(f"ranks {missing} did not join within {within}") from None
            connection.settimeout(10)
            peer = _Peer(connection, "")
            try:
                greeting = next(peer.messages(), {})
                if not secrets.compare_digest(str(greeting["word"]), secret):
                    raise ValueError("not a rank of this job")
                enable_keepalive(connection)
                peer.name, peers[int(greeting["rank"])] = str(greeting["name"]), peer
            except (OSError, ValueError, KeyError, TypeError):
                peer.close()
    return peers


def _connect(store: Any, rank: int) -> _Peer:
    address = json.loads(store.get(_KEY))
    connection = socket.create_connection((os.environ["MASTER_ADDR"], address["port"]), timeout=60)
    enable_keepalive(connection)
    peer = _Peer(connection, address["name"])
    peer.send({"rank": rank, "word": address["word"], "name": _name(rank)})
    return peer


def _name(rank: int) -> str:
    return f"rank {rank} (process {os.getpid()} of {socket.gethostname()})"
