"""Bytes that each rank of a large world reads, and its data path's speed: ranks that read together, and each alone.

No model; one process plays one rank of each world, and answers it for all others.

    .venv/bin/python -m tests.bench.data_path_ranks [--world 1 --world 8 --world 64 --world 512] [--tokens 4096]

The dump lies behind a file system that counts the bytes read from it, as from a store. Its shards are one shard under
many names. A rank that reads together with others is charged with its own shards, with the packing of their records for
all ranks, and with unpacking those that it receives; the network costs nothing here. Times are CPU seconds of the
process, all threads, over an epoch or 2,048 of the rank's documents; `of linear` is the rate of a rank over that of a
world of one.
"""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
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
from stage2_student.distributed.dealt_reading import LocalReading, ReaderOf, Records, Shelf
from stage2_student.interfaces import StudentShape, make_interface
from stage2_student.model.initial_student import end_tokens, student_tokenizer
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
DOCUMENTS = 2048  # of a rank, after which it has been measured; an epoch if that has fewer


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
        others: the ready answer to any request, by row: every shard is the same.
        of_readers: the references of each window that this rank reads for all ranks.
    """

    def __init__(self, shelf: Shelf, rank: int, others: Sequence[bytes], asked: Iterator[list[RecordRef]]) -> None:
        self._shelf, self._rank, self._others, self._asked = shelf, rank, others, asked
        self.rows_received = 0

    def records(self, refs: Sequence[RecordRef], reader_of: ReaderOf) -> dict[RecordRef, Record]:
        """Return the records of references, after this rank's part of reading all ranks' of these windows."""
        for ref in next(self._asked, []):
            pickle.dumps(self._shelf.record(ref), protocol=5)
        found = {}
        for ref in refs:
            if reader_of(ref) == self._rank:
                found[ref] = self._shelf.record(ref)
            else:
                found[ref] = pickle.loads(self._others[ref.row])
                self.rows_received += 1
        return found

    def forget(self, windows: Sequence[tuple[int, int]]) -> None:
        self._shelf.forget(windows)


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
    builder: BatchBuilder, lengths: Lengths, others: Sequence[bytes], files: CountingFiles, together: bool
) -> dict[str, Any]:
    """Play a rank for an epoch."""
    clock, train, rank = Clock(), builder.recipe.train, builder.rank
    [member] = builder.sources.members
    reader_of = builder._reader_of([lengths])

    def plans() -> Iterator[BatchPlan]:
        return builder._plans([lengths], START)

    planned = clock.each("plan", plans())
    batches = clock.each("plan", rank_batches(planned, train.micro_batch_tokens, "off", rank, builder.world))
    source: Records = LocalReading([member.reader])
    if together:
        # Collected first, which is not charged.
        to_come = takewhile(lambda plan: plan.after.epoch < 2, plans())
        source = Simulated(Shelf([member.reader]), rank, others, iter(list(asked_of(rank, to_come, reader_of))))
    counted = Counted(source)
    files.num_bytes, tokens, documents, of_all = 0, 0, 0, 0
    for share, records in clock.each("read", with_records(batches, counted, reader_of, lag=train.prefetch + 4)):
        if share.plan.after.epoch or documents >= DOCUMENTS:
            break
        encoded = clock.run("encode", partial(builder.encoded, share, records))
        clock.run("tensors", partial(builder.micro_batches, share, encoded))
        tokens += sum(planned.num_tokens for planned in share.documents)
        documents += len(share.documents)
        of_all += len(share.plan.documents)
    # Records are read window by window, ahead of the documents that were passed on.
    used = documents / counted.num_records
    clock.seconds["read"] *= used
    return {"tokens": tokens, "of_all": of_all, "bytes": files.num_bytes * used, **clock.seconds}


def main(
    world: Annotated[list[int] | None, typer.Option(help="ranks, one or more; default: 1, 8, 64, 512")] = None,
    tokens: Annotated[int, typer.Option(help="student tokens of a rank's step")] = 4096,
    shards: Annotated[int, typer.Option(help="of the dump")] = 512,
    records: Annotated[int, typer.Option(help="of a shard, 2 kB each")] = 64,
    sampled: Annotated[int, typer.Option(help="ranks of each world that are played")] = 1,
    save: Annotated[bool, typer.Option(help="keep the figures in tests/bench/results")] = True,
) -> None:
    changes = ["student.interface=linear", f"train.micro_batch_tokens={tokens}"]
    recipe = load_recipe(Path("pipeline/recipes/demo.yaml"), changes)
    config = student_config(recipe)
    tokenizer = student_tokenizer(config).tokenizer
    ids = end_tokens(config, tokenizer)
    shape = StudentShape(576, len(tokenizer.token_bytes), tokenizer.token_bytes, tokenizer.prefix, ids.ends)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        dump = make_dump(Path(folder) / "dump", shards, records)
        files = CountingFiles()
        reader = DumpReader(RemotePath("s3", str(dump), pa_fs.PyFileSystem(pa_fs.FSSpecHandler(files))), 0)
        of_each = dump.joinpath("shards/part-00000.parquet").stat().st_size / records
        counted = list(count_records(reader.record_texts(0), tokenizer, None, recipe.train.piece_tokens))
        lengths = Lengths.of([counted] * shards)
        others = [pickle.dumps(record, protocol=5) for record in reader.records_of(0, range(records))]
        alone: float | None = None
        for together in (False, True):
            for num in world or [1, 8, 64, 512]:
                if together and num == 1:
                    continue
                of_rank = []
                for rank in sorted({index * num // sampled for index in range(sampled)}):
                    train = recipe.train.model_copy(update={"batch_tokens": tokens * num})
                    sources = Sources([Member(reader)], tokenizer, None, ids)
                    placed = make_interface(config, shape), "off", rank, num
                    builder = BatchBuilder(recipe.with_values(train=train), sources, *placed)
                    of_rank.append(measured(builder, lengths, others, files, together))
                total = {key: float(np.mean([one[key] for one in of_rank])) for key in of_rank[0]}
                seconds = sum(total[part] for part in ("plan", "read", "encode", "tensors"))
                rate = total["tokens"] / seconds
                alone = alone or rate
                bytes_of_all = num * total["bytes"] / (of_each * total["of_all"])
                row = {
                    "each rank reads": "a part, dealt" if together else "what it needs",
                    "ranks": num,
                    "of the bytes, read by a rank, %": round(100 * bytes_of_all / num, 2),
                    "times that a byte is read": round(bytes_of_all, 2),
                    "tokens/s of a rank": round(rate),
                    "of all ranks": round(num * rate),
                    "of linear": round(rate / alone, 2),
                    **{f"{part}, %": round(100 * total[part] / seconds) for part in ("plan", "read", "encode")},
                }
                print(row, flush=True)
                rows.append(row)
    if save:
        megabytes = of_each * shards * records / 1e6
        about = f"{shards:,} shards of {records} records of 2 kB ({megabytes:,.0f} MB), GPT-2's tokenizer"
        results.save("data-path-ranks", {"rows": rows}, documents=about)


if __name__ == "__main__":
    typer.run(main)
