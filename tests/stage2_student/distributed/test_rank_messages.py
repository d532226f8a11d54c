"""The ranks' channel, without a model: gathering, admission, and what others see of a rank that ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from stage2_student.distributed import rank_messages
from stage2_student.distributed.rank_environment import free_port
from stage2_student.distributed.rank_messages import Channel, LostRankError, _accept, _connect, _Peer

ROOT = Path(__file__).parents[3]


Connect = Callable[[int], list[Channel]]


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Make a channel for each rank, all of them in this process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    made: list[Channel] = []

    def connect(world: int) -> list[Channel]:
        store = HashStore()
        with ThreadPoolExecutor(world) as pool:
            first = pool.submit(_accept, store, world)
            others = [pool.submit(_connect, store, rank) for rank in range(1, world)]
            peers = [first.result(), *({0: other.result()} for other in others)]
        made.extend(Channel(rank, world, of_rank) for rank, of_rank in enumerate(peers))
        return made

    yield connect
    for channel in made:  # or one that has lost another would end this process
        channel.leave()


def each(rank_messages: list[Channel], ask: Callable[[Channel], Any]) -> list[Any]:
    """Ask all ranks at once; return what each is given, or what it raises."""

    def answer(channel: Channel) -> Any:
        try:
            return ask(channel)
        except LostRankError as error:
            return error

    with ThreadPoolExecutor(len(rank_messages)) as pool:
        return list(pool.map(answer, rank_messages))


def test_every_rank_is_given_the_values_of_all_by_rank(connected: Connect) -> None:
    ranks = connected(4)
    for values in (["a", None, 2, {"x": [1.5, "é"]}], [[0], [1], [2], [3]]):
        assert each(ranks, lambda channel, values=values: channel.gather(values[channel.rank])) == [values] * 4  # type: ignore[misc]
    for channel in ranks:
        channel.leave()
    assert [channel.loss(0.1) for channel in ranks] == [None] * 4


def test_a_rank_alone_gets_what_json_makes_of_its_value() -> None:
    assert Channel(0, 1, {}).gather({"of": (1, 2)}) == [{"of": [1, 2]}]


@pytest.mark.parametrize("ends", [0, 2])
def test_a_rank_that_ends_without_a_word_ends_the_wait_of_all_others_by_name(ends: int, connected: Connect) -> None:
    ranks = connected(3)
    ranks[ends]._ended = True  # the dead do not talk
    for peer in ranks[ends]._peers.values():
        peer._socket.shutdown(socket.SHUT_RDWR)
    left = [channel for channel in ranks if channel.rank != ends]
    for said in map(str, each(left, Channel.gather)):
        assert said.startswith(f"rank {ends} (process {os.getpid()} of {socket.gethostname()}) is gone without a word")
        assert "the same command goes on" in said


def test_a_rank_that_fails_gives_the_others_its_reason(connected: Connect) -> None:
    ranks = connected(3)
    ranks[1].fail(ValueError("the hostfile\nis empty"))
    for said in map(str, each([ranks[0], ranks[2]], Channel.gather)):
        assert "rank 1 (process" in said and "has failed: the hostfile is empty. Rank" in said


def test_a_rank_that_fails_itself_is_not_ended_for_another_that_does(
    connected: Connect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_messages, "_SPEAK_SECONDS", 0.1)
    ended = threading.Event()
    monkeypatch.setattr(rank_messages.os, "_exit", lambda code: ended.set())
    ranks = connected(2)
    for channel in ranks:
        channel.fail(FloatingPointError("the loss is not finite"))
    assert not ended.wait(0.5) and "ends with it" not in capsys.readouterr().err


def test_who_leaves_early_is_not_waited_for(connected: Connect) -> None:
    ranks = connected(2)
    ranks[1].leave()
    with pytest.raises(LostRankError, match=r"rank 1 .* has ended before the others"):
        ranks[0].gather()


def test_a_stranger_at_the_port_is_turned_away_and_the_rank_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_accept, store, 2)
        port = json.loads(store.get("bld/channel"))["port"]
        for said in (b"GET / HTTP/1.1\n", b'{"rank": 1, "word": "guessed", "name": "x"}\n', b"[]\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
        rank = _connect(store, 1)
        peers = first.result()
    assert set(peers) == {1} and peers[1].name.startswith("rank 1 (process")
    rank.send({"value": 7})
    assert next(peers[1].messages()) == {"value": 7}


def test_ranks_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_messages, "join_time", lambda: rank_messages.timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] have not come"):
        _accept(HashStore(), 3)


# Rank 0 is at work where no signal of Python's reaches it; rank 1 waits for it.
WORK = """
import sys, time
from pipeline.runtime.log import error as error_line
from stage2_student.distributed.rank_messages import LostRankError, join
channel = join()
print("joined", flush=True)
try:
    if channel.rank == 0:
        time.sleep(600)
    channel.gather()
except LostRankError as error:
    error_line(str(error))
    sys.exit(1)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_in_words_whatever_that_one_does(killed: int) -> None:
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORK], env={**os.environ, **world, "RANK": rank}, **pipes)
        for rank in "01"
    ]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "joined\n"
    ranks[killed].send_signal(signal.SIGKILL)
    ranks[killed].communicate()
    _, said = ranks[1 - killed].communicate(timeout=60)
    assert ranks[1 - killed].returncode == 1
    assert f"rank {killed} (process {ranks[killed].pid} of {socket.gethostname()}) is gone without a word" in said
    assert f"Rank {1 - killed} ends with it" in said and "Traceback" not in said


def test_the_kernel_watches_the_connection_of_a_rank_for_a_machine_that_is_away(connected: Connect) -> None:
    for channel in connected(2):
        for peer in channel._peers.values():
            assert isinstance(peer, _Peer) and peer._socket.gettimeout() is None
            assert peer._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            asked = [
                peer._socket.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
                for name in ("IDLE", "INTVL", "CNT")
            ]
            assert asked[0] + asked[1] * asked[2] == rank_messages.SILENCE_SECONDS
