"""Bytes that each rank of a large world reads, and its data path's speed: ranks that read together, and each alone.

No model; one process plays one rank of each world, and answers it for all others.

    .venv/bin/python -m tests.bench.data_path_ranks [--world 1 --world 8 --world 64 --world 512] [--rounds 5]

The dump lies behind a file system that counts the bytes read from it, as from a store. Its shards are one shard under
many names. A rank that reads together with others is charged with its own shards, with the packing of their records for
all ranks, with unpacking those that it receives, and with sending and receiving as many over TCP, here with itself.
Times are CPU seconds of the process, all threads, over an epoch or 256 documents of the rank's, and of more ranks where
an epoch has fewer. Worlds take turns, in another order each round; `of linear` is the rate of a rank over that of a
world of one in the same round. As in training, what was there before is kept from the garbage collector.
"""

import gc
import json
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Annotated, Any

import numpy as np
import pyarrow.fs as pa_fs
import typer
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from pipeline.config import student_config
from pipeline.config.loading import load_recipe
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Record, Segment
from schemas.shard import commit_shard, to_table
from schemas.storage.locations import RemotePath
from stage2_student.data.batch_plan import BatchPlan
from stage2_student.data.order import START, RecordRef
from stage2_student.data.reader import DumpReader
from stage2_student.data.token_counts import Lengths, count_records
from stage2_student.data.union import Member
from stage2_student.distributed.dealt_reading import (
    Buffer,
    LocalReading,
    ReaderOf,
    Records,
    Shelf,
    packed,
    receive,
    send,
    unpacked,
)
from stage2_student.interfaces import StudentShape, make_interface
from stage2_student.model.initial_student import end_tokens, student_tokenizer
from stage2_student.training.loop import start_frozen
from stage2_student.training.rank_batches import BatchBuilder, Sources, rank_batches, with_records
from tests.bench import results
from tests.bench.data_path import Clock

WORDS = [
    "the",
    "of",
    "river",
    "stone",
    "and",
    "under",
    "in",
    "a",
    "thing",
    "that",
    "café",
    "ran",
    "7",
    "hills",
    "seldom",
]
ENTRIES = 6  # of a position, in the mean
WORLDS = (1, 8, 64, 512)
PARTS = ("plan", "read", "encode", "tensors")
DOCUMENTS = 256  # after which a world has been measured, of one rank or several


class _CountingFile(LocalFileOpener):  # type: ignore[misc]
    def read(self, length: int = -1) -> bytes:
        found: bytes = super().read(length)
        self.fs.num_bytes += len(found)
        return found


class CountingFiles(LocalFileSystem):  # type: ignore[misc]
    """Local files, of which the bytes read are counted."""

    cachable = False
    num_bytes = 0

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _CountingFile:
        return _CountingFile(path, mode, fs=self)


def drawn(rng: np.random.Generator, name: str) -> Record:
    """Draw a record of some 2 kB."""
    document = " ".join(rng.choice(WORDS, 440)).encode()
    counts = rng.geometric(1 / ENTRIES, len(document) + 1).clip(max=40).astype(np.uint16)
    entries = int(counts.sum())
    levels = np.log(np.linspace(0.002, 0.02, 200)).astype(np.float32)
    lengths = np.full(len(document) // 4, 4, dtype=np.int32)
    shares = {name: rng.choice(levels, len(counts)) * 0 for name in ("dropped", "token_end", "doubt")}
    return Record(
        doc_id=name,
        window_start=0,
        document=document,
        segments=(Segment(0, len(document), True),),
        teacher_token_lengths=np.append(lengths, len(document) - lengths.sum()).astype(np.int32),
        teacher_token_logprobs=rng.choice(levels, len(lengths) + 1),
        entry_counts=counts,
        symbols=rng.integers(32, 127, entries).astype(np.uint8),
        logprobs=rng.choice(levels, entries),
        **shares,
    )


def make_dump(folder: Path, shards: int, records: int) -> Path:
    """Write a shard, and link it under all names."""
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir(parents=True)
    plans = tuple(
        ShardPlan(index=i, first_document=i * records, num_documents=records, num_bytes=0, sha256=str(i))
        for i in range(shards)
    )
    Manifest(identity={}, corpus_counts={}, shards=plans).save(folder)
    first = plans[0].path(folder)
    assert isinstance(first, Path)
    commit_shard(to_table([drawn(rng, str(row)) for row in range(records)], {}), first, zstd_level=3)
    for plan in plans[1:]:
        path = plan.path(folder)
        assert isinstance(path, Path)
        path.hardlink_to(first)
    return folder


class Simulated:
    """The reading of one rank together with others, which this process plays, uncharged.

    Args:
        of_shard: the records of a shard, by row: every shard is the same.
        asked: the references of each window that this rank reads for all ranks.
        clock: that what other ranks do is taken from.
    """

    def __init__(
        self, builder: BatchBuilder, of_shard: Sequence[Record], asked: Iterator[list[RecordRef]], clock: Clock
    ) -> None:
        self._rank, self._world, self._clock = builder.rank, builder.world, clock
        self._shelf = Shelf([member.reader for member in builder.sources.members])
        self._of_shard, self._asked = of_shard, asked
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._sends = socket.create_connection(server.getsockname())
            self._receives, _ = server.accept()
        self._to_send: SimpleQueue[list[Buffer]] = SimpleQueue()
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while answer := self._to_send.get():
            send(self._sends, *answer)

    def records(self, refs: Sequence[RecordRef], reader_of: ReaderOf) -> dict[RecordRef, Record]:
        """Return the records of references, after this rank's part of reading all ranks' of these windows."""
        asked = [self._shelf.record(ref) for ref in next(self._asked, [])]
        size = max(1, len(asked) // (self._world - 1))  # of an answer: all ranks ask
        for first in range(0, len(asked), size):
            packed(asked[first : first + size])
        found = {ref: self._shelf.record(ref) for ref in refs if reader_of(ref) == self._rank}
        by_rank: dict[int, list[RecordRef]] = {}
        for ref in refs:
            if ref not in found:
                by_rank.setdefault(reader_of(ref), []).append(ref)
        for of_rank in by_rank.values():
            request = json.loads(json.dumps(of_rank).encode())
            theirs = [self._of_shard[RecordRef(*ref).row] for ref in request]
            answer = self._clock.run("others", partial(packed, theirs))
            self._to_send.put(answer)
            found |= zip(of_rank, unpacked(receive(self._receives)), strict=True)
        return found

    def forget(self, windows: Sequence[tuple[int, int]]) -> None:
        self._shelf.forget(windows)

    def close(self) -> None:
        self._to_send.put([])
        self._sends.close()
        self._receives.close()


class Counted:
    """A source of records that counts them."""

    def __init__(self, source: Records) -> None:
        self._source, self.num_records = source, 0

    def records(self, refs: Sequence[RecordRef], reader_of: ReaderOf) -> dict[RecordRef, Record]:
        self.num_records += len(refs)
        return self._source.records(refs, reader_of)

    def forget(self, windows: Sequence[tuple[int, int]]) -> None:
        self._source.forget(windows)


def asked_of(rank: int, plans: Iterable[BatchPlan], reader_of: ReaderOf) -> Iterator[list[RecordRef]]:
    """Yield what all ranks ask of a rank, whenever `with_records` reads: at the end of each batch with a new window."""
    unread: list[RecordRef] = []
    windows: tuple[tuple[int, int], ...] = ((0, 0),)
    for plan in plans:
        unread += [planned.ref for planned in plan.documents if reader_of(planned.ref) == rank]
        if plan.windows != windows:
            windows = plan.windows
            yield sorted(ref for ref in unread if ref[:2] < windows[0])
            unread = [ref for ref in unread if ref[:2] >= windows[0]]


def measured(
    builder: BatchBuilder, lengths: Lengths, of_shard: Sequence[Record], files: CountingFiles, together: bool
) -> dict[str, float]:
    """Play a rank for an epoch."""
    clock, train, rank = Clock(), builder.recipe.train, builder.rank
    [member] = builder.sources.members
    reader_of = builder._reader_of([lengths])

    def plans() -> Iterator[BatchPlan]:
        return builder._plans([lengths], START)

    planned = clock.each("plan", plans())
    batches = clock.each("plan", rank_batches(planned, train.micro_batch_tokens, "off", rank, builder.world))
    source: LocalReading | Simulated = LocalReading([member.reader])
    if together:
        # Collected first, which is not charged.
        to_come = takewhile(lambda plan: plan.after.epoch < 2, plans())
        source = Simulated(builder, of_shard, iter(list(asked_of(rank, to_come, reader_of))), clock)
    counted = Counted(source)
    files.num_bytes, tokens, documents, of_all = 0, 0, 0, 0
    with start_frozen():
        for share, records in clock.each("read", with_records(batches, counted, reader_of, lag=train.prefetch + 4)):
            if share.plan.after.epoch or documents >= DOCUMENTS:
                break
            encoded = clock.run("encode", partial(builder.encoded, share, records))
            clock.run("tensors", partial(builder.micro_batches, share, encoded))
            tokens += sum(planned.num_tokens for planned in share.documents)
            documents += len(share.documents)
            of_all += len(share.plan.documents)
    if isinstance(source, Simulated):
        source.close()
    # Records are read window by window, ahead of the documents that were passed on.
    used = documents / counted.num_records
    clock.seconds["read"] *= used
    parts = {part: clock.seconds[part] for part in PARTS}
    return {"documents": documents, "tokens": tokens, "of_all": of_all, "bytes": files.num_bytes * used, **parts}


def collections() -> dict[str, Any]:
    """Time a full collection of this process' garbage, with and without what was there before training."""

    def took() -> float:
        started = time.process_time()
        gc.collect()
        return round(1000 * (time.process_time() - started), 1)

    before = took()
    with start_frozen():
        return {"a full collection of all objects, ms": before, "of those made since training began, ms": took()}


def main(
    world: Annotated[list[int] | None, typer.Option(help="ranks, one or more; default: 1, 8, 64, 512")] = None,
    tokens: Annotated[int, typer.Option(help="student tokens of a rank's step")] = 4096,
    shards: Annotated[int, typer.Option(help="of the dump")] = 512,
    records: Annotated[int, typer.Option(help="of a shard, 2 kB each")] = 64,
    rounds: Annotated[int, typer.Option(help="in each of which every world is played, with other ranks")] = 5,
    save: Annotated[bool, typer.Option(help="keep the figures in tests/bench/results")] = True,
) -> None:
    changes = ["student.interface=linear", f"train.micro_batch_tokens={tokens}"]
    recipe = load_recipe(Path("pipeline/recipes/demo.yaml"), changes)
    config = student_config(recipe)
    tokenizer = student_tokenizer(config).tokenizer
    ids = end_tokens(config, tokenizer)
    shape = StudentShape(576, len(tokenizer.token_bytes), tokenizer.token_bytes, tokenizer.prefix, ids.ends)
    played = [(together, num) for together in (False, True) for num in world or WORLDS if num > 1 or not together]
    figures: dict[tuple[bool, int], list[dict[str, float]]] = {one: [] for one in played}
    random = Random(0)
    with TemporaryDirectory() as folder:
        dump = make_dump(Path(folder) / "dump", shards, records)
        files = CountingFiles()
        reader = DumpReader(RemotePath("s3", str(dump), pa_fs.PyFileSystem(pa_fs.FSSpecHandler(files))), 0)
        of_each = dump.joinpath("shards/part-00000.parquet").stat().st_size / records
        counted = list(count_records(reader.record_texts(0), tokenizer, None, recipe.train.piece_tokens))
        lengths = Lengths.of([counted] * shards)
        of_shard = list(reader.records_of(0, range(records)))

        def play(together: bool, num: int) -> dict[str, float]:
            total: dict[str, float] = {}
            while total.get("documents", 0) < DOCUMENTS * 0.9:
                train = recipe.train.model_copy(update={"batch_tokens": tokens * num})
                placed = make_interface(config, shape), "off", random.randrange(num), num
                builder = BatchBuilder(
                    recipe.with_values(train=train), Sources([Member(reader)], tokenizer, None, ids), *placed
                )
                found = measured(builder, lengths, of_shard, files, together)
                total = {name: total.get(name, 0) + value for name, value in found.items()}
            return total

        play(False, 1)  # what is made once
        for number in range(rounds):
            for one in random.sample(played, len(played)):
                figures[one].append(play(*one))
                print(number, *one, {name: round(value, 3) for name, value in figures[one][-1].items()}, flush=True)
    alone = [rate(found) for found in figures[played[0]]]
    rows = [row(together, num, found, alone, of_each) for (together, num), found in figures.items()]
    if save:
        megabytes = of_each * shards * records / 1e6
        about = f"{shards:,} shards of {records} records of 2 kB ({megabytes:,.0f} MB), GPT-2's tokenizer"
        remark = (
            f"Medians of {rounds} rounds, in brackets the range. A rank receives over TCP what it needs, and sends as "
            "much. Other work shared the machine."
        )
        figures_kept = {"rows": rows, "collections": [collections()]}
        results.save("data-path-ranks", figures_kept, documents=about, remark=remark)


def rate(found: dict[str, float]) -> float:
    """Return the tokens of a second of a rank's."""
    return found["tokens"] / sum(found[part] for part in PARTS)


def row(
    together: bool, num: int, found: Sequence[dict[str, float]], alone: Sequence[float], of_each: float
) -> dict[str, Any]:
    """Describe a world's rounds."""
    own = [rate(one) for one in found]
    linear = sorted(mine / one for mine, one in zip(own, alone, strict=True))
    of_all = median(num * one["bytes"] / (of_each * one["of_all"]) for one in found)
    seconds = {part: sum(one[part] for one in found) for part in PARTS}
    described = {
        "each rank reads": "a part, dealt" if together else "what it needs",
        "ranks": num,
        "of the bytes, read by a rank, %": round(100 * of_all / num, 2),
        "times that a byte is read": round(of_all, 2),
        "tokens/s of a rank": round(median(own)),
        "of linear": f"{median(linear):.2f} ({linear[0]:.2f}-{linear[-1]:.2f})",
        **{f"{part}, %": round(100 * seconds[part] / sum(seconds.values())) for part in PARTS},
    }
    print(described, flush=True)
    return described


if __name__ == "__main__":
    typer.run(main)
