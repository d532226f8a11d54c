"""Ranks that read a dump together: the batches of ranks that read alone, to the bit, with each shard read once."""

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.shard import read_rows
from stage2_student.data import order as order_module
from stage2_student.data import reader as reader_module
from stage2_student.data.order import READ, START, Order, Position, RecordRef
from stage2_student.data.prefetch import prefetched
from stage2_student.data.reader import DumpReader
from stage2_student.data.union import Member
from stage2_student.distributed import dealt_reading
from stage2_student.distributed.dealt_reading import DealtReading, Shelf, packed, receive, send, unpacked
from stage2_student.distributed.rank_messages import Channel, LostRankError, _accept, _connect
from stage2_student.training.rank_batches import BatchBuilder, Sources
from tests.support.micro_batches import count_all
from tests.support.small_dumps import make_recipe, make_record, make_text, make_work

Ranks = list[tuple[Channel, DealtReading]]
STEPS, MIDDLE, MAX_TOKENS = 40, 23, 20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(work / "model"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "WINDOW_PIECES", 8)


@pytest.fixture
def ranks_of(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    """Connect so many ranks, all of them in this process, that read the dump together."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    made: Ranks = []

    def connect(world: int) -> Ranks:
        store = HashStore()
        with ThreadPoolExecutor(world) as pool:
            first = pool.submit(_accept, store, world)
            others = [pool.submit(_connect, store, rank) for rank in range(1, world)]
            peers = [first.result(), *({0: other.result()} for other in others)]
            channels = [Channel(rank, world, of_rank) for rank, of_rank in enumerate(peers)]
            dealt = list(pool.map(lambda channel: DealtReading([DumpReader(work / "dump", 0)], channel), channels))
        made.extend(zip(channels, dealt, strict=True))
        return made[-world:]

    yield connect
    for channel, dealt in made:
        channel.leave()
        dealt.close()


def builder(work: Path, tokenizer: ByteTokenizer, dealt: DealtReading | None, rank: int, world: int) -> BatchBuilder:
    train = {"objectives": {"alm": 1.0}, "max_tokens": MAX_TOKENS, "micro_batch_tokens": 60}
    recipe = make_recipe(work / "dump", work / "model", work / "run", train)
    sources = Sources([Member(DumpReader(work / "dump", 0))], tokenizer, None, SpecialIds(268, (268,)))
    return replace(BatchBuilder(recipe, sources, None, "off", rank, world), dealt=dealt)


def trained_on(value: Any) -> Any:
    """Return everything in a rank's steps as plain values that compare equal if they are the same to the bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: trained_on(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [trained_on(one) for one in value]
    if is_dataclass(value):
        return [trained_on(getattr(value, field.name)) for field in fields(value)]
    assert value is None or isinstance(value, str | bytes | int | float), type(value)
    return value


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_that_read_together_get_the_batches_of_ranks_that_read_alone(
    world: int,
    work: Path,
    tokenizer: ByteTokenizer,
    ranks_of: Callable[[int], Ranks],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over epochs, from the beginning and from a step in the middle; a rank may be steps ahead of another."""
    counts = count_all(DumpReader(work / "dump", 0), tokenizer, MAX_TOKENS)
    alone = [list(islice(builder(work, tokenizer, None, rank, world).steps([counts]), STEPS)) for rank in range(world)]
    assert alone[0][-1][0].after.epoch > 1
    read: list[tuple[str, str]] = []

    def watched(path: Path, *arguments: Any, **options: Any) -> Iterator[Any]:
        for record in read_rows(path, *arguments, **options):
            read.append((threading.current_thread().name, record.doc_id))
            yield record

    monkeypatch.setattr(reader_module, "read_rows", watched)
    ranks = ranks_of(world)

    together_at_step = threading.Barrier(world)

    def taken(rank: int, start: Position, number: int) -> list[Any]:
        own = builder(work, tokenizer, ranks[rank][1], rank, world)
        found = []
        with prefetched(own.steps([counts], start), 2) as made:
            for step in islice(made, number):
                found.append(step)
                together_at_step.wait(60)  # as in a step's collectives, on which the forgetting of records relies
        return found

    with ThreadPoolExecutor(world) as pool:
        together = list(pool.map(lambda rank: taken(rank, START, STEPS), range(world)))
    assert trained_on(together) == trained_on(alone)
    epochs = 1 + alone[0][-1][0].after.epoch
    times = Counter(name for _, name in read)
    # By all ranks together, those read ahead included: once for each stripe, as by one rank.
    assert max(times.values()) <= (epochs + 1) * order_module.STRIPES
    middle = alone[0][MIDDLE - 1][0].after
    with ThreadPoolExecutor(world) as pool:
        resumed = list(pool.map(lambda rank: taken(rank, middle, STEPS - MIDDLE), range(world)))
    assert trained_on(resumed) == trained_on([steps[MIDDLE:] for steps in alone])


@pytest.mark.parametrize("version", READ)
def test_every_rank_reads_as_many_shards_and_those_of_one_time_have_different_readers(version: int) -> None:
    order = Order(3, np.full(1000, 50), None, version)
    for world in (1, 8, 64, 512):
        readers_S = order.readers(1, world)
        shards = np.bincount(readers_S, minlength=world)
        assert shards.max() - shards.min() <= 1 and shards.sum() == 1000
    assert not np.array_equal(order.readers(0, 64), order.readers(1, 64))
    window = next(order.windows(Position(1, 1024)))
    assert len(set(order.readers(1, 64)[window.shard_W])) == len(set(window.shard_W))


def test_of_few_shards_in_several_stripes_each_has_one_reader() -> None:
    readers_S = Order(0, np.array([500, 0, 500, 500])).readers(0, 8)
    assert sorted(readers_S[[0, 2, 3]]) == [0, 1, 2]


def test_records_arrive_as_they_were_whatever_their_columns_hold_and_however_the_message_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dealt_reading, "_MAX_PARTS", 3)
    rng = np.random.default_rng(0)
    records = [make_record(f"d{size}", make_text(rng, size), rng) for size in (9, 0, 1, 2_000)]
    records.append(replace(records[0], segments=(), symbols=np.empty(0, dtype=np.uint8)))
    one, other = socket.socketpair()
    with one, other, ThreadPoolExecutor(1) as pool:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for some in (records, records[:1], []):
            sent = pool.submit(send, one, *packed(some))
            found = unpacked(receive(other))
            sent.result()
            assert trained_on(found) == trained_on(some)
            columns = [column for record in found for column in vars(record).values() if isinstance(column, np.ndarray)]
            assert all(column.flags.aligned and column.flags.writeable for column in columns)


def test_what_no_rank_can_ask_for_any_more_is_dropped(work: Path) -> None:
    shelf = Shelf([DumpReader(work / "dump", 0)])
    refs = [RecordRef(0, row // 4, 0, row, 1, row) for row in range(12)]
    names = [shelf.record(ref).doc_id for ref in refs]
    assert shelf.num_held == 12
    shelf.forget([(0, 1)])
    assert shelf.num_held == 9  # the last of a window may have another piece in the next
    assert [shelf.record(ref).doc_id for ref in refs[3:]] == names[3:]
    assert shelf.record(refs[0]).doc_id == names[0]  # read again
    shelf.forget([(1, 0)])
    assert shelf.num_held == 0 and not shelf._open


def test_a_fault_of_a_shard_is_raised_where_its_records_are_needed(
    work: Path, ranks_of: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, first), _ = ranks_of(2)

    def broken(*_: Any, **__: Any) -> Iterator[Any]:
        raise ValueError("part-00001.parquet is damaged")

    monkeypatch.setattr(reader_module, "read_rows", broken)
    ref = RecordRef(0, 0, 0, 0, 1, 0)
    with pytest.raises(ValueError, match=r"part-00001.parquet is damaged"):
        first.records([ref], lambda _: 1)
    monkeypatch.setattr(reader_module, "read_rows", read_rows)
    assert first.records([replace_row(ref, 2)], lambda _: 1)  # the connection goes on


def replace_row(ref: RecordRef, row: int) -> RecordRef:
    return ref._replace(row=row, lane=7)


def test_one_that_does_not_know_the_word_is_told_nothing(ranks_of: Callable[[int], Ranks]) -> None:
    _, (_, second) = ranks_of(2)
    port = second._server.getsockname()[1]
    for said in (b"\0" * 7 + b"\3" + b"no!", b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(said)
            with stranger.makefile("rb") as answer, suppress(ConnectionResetError):
                assert answer.read() == b""


def test_more_readers_than_open_connections_are_asked_in_turn(
    work: Path, ranks_of: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage2_student.distributed.dealt_reading._MAX_CONNECTIONS", 2)
    ranks = ranks_of(5)
    refs = [RecordRef(0, 0, lane, row, lane, row) for lane in range(5) for row in range(3)]
    expected = {ref: f"d{ref.shard * 12 + ref.row}" for ref in refs}
    for _ in range(2):
        found = ranks[1][1].records(refs, lambda ref: ref.lane)
        assert {ref: record.doc_id for ref, record in found.items()} == expected
        assert len(ranks[1][1]._open) == 2


def test_the_end_of_a_reader_ends_the_rank_that_waits_for_it_by_name(ranks_of: Callable[[int], Ranks]) -> None:
    ranks = ranks_of(3)
    ref = RecordRef(0, 0, 0, 0, 1, 0)
    assert ranks[0][1].records([ref], lambda _: 2)
    ranks[2][1].close()
    for connection in ranks[0][1]._open.values():
        connection.shutdown(socket.SHUT_RDWR)
    ranks[2][0].fail(MemoryError("no room"))
    with pytest.raises(LostRankError, match=r"rank 2 .*failed: no room"):
        ranks[0][1].records([ref], lambda _: 2)
