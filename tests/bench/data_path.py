"""Tokens per second that the data path gives a rank, in worlds of several sizes.

No model; one process plays one rank.

    .venv/bin/python -m tests.bench.data_path [--dump runs/demo/dump] [--world 1 --world 8 --world 64]
        [--interface token_marginal]

The dump is made of the records of another: words and positions drawn anew, since zstd would find what is repeated.
Beside each world stands what a rank did before batches were planned by lengths: read and encode all documents, and line
up its own. Times are CPU seconds of the process, all threads; the rate over all ranks is the world times a rank's own.
The last column is what the ranks pass through the model in a step, padding and waiting for each other included, over
what there is to pass.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import typer

from pipeline.config import student_config
from pipeline.config.loading import load_recipe
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Record, Segment
from schemas.shard import commit_shard, read_shard, to_table
from stage2_student.data.batch_plan import BatchPlan, plan_batches
from stage2_student.data.packing import plan_micro_batches, tokens_passed
from stage2_student.data.reader import DumpReader
from stage2_student.data.union import Member
from stage2_student.distributed.dealt_reading import LocalReading
from stage2_student.interfaces import StudentShape, make_interface
from stage2_student.model.initial_student import end_tokens, student_tokenizer
from stage2_student.training.rank_batches import BatchBuilder, Sources, rank_batches, with_records
from tests.support.micro_batches import count_all

Item = TypeVar("Item")
RECORDS, SHARDS = 512, 8  # a shard's records, of some 2 kB


class Clock:
    """CPU seconds of this process, by what they went to.

    A section timed inside another one is counted only in the inner one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._around: list[str] = []

    def run(self, name: str, work: Callable[[], Item]) -> Item:
        self._around.append(name)
        started = time.process_time()
        try:
            return work()
        finally:
            took = time.process_time() - started
            self._around.pop()
            self.seconds[name] += took
            if self._around:
                self.seconds[self._around[-1]] -= took

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the same items, counting the seconds that it takes to make them."""
        while (item := self.run(name, lambda: next(items, None))) is not None:
            yield item


class Figures(NamedTuple):
    """Figures of one world."""

    tokens: int  # of this rank
    over_ideal: float  # a step's time in tokens, over a rank's share of them
    seconds: dict[str, float]


def drawn(records: Sequence[Record], rng: np.random.Generator) -> Record:
    """Make a record of some 2 kB from the words and positions of others.

    Its targets are not those of its text.
    """
    text = b""
    while len(text) < 2000:
        text += records[int(rng.integers(len(records)))].document + b" "
    words = text.split(b" ")
    document = b" ".join(words[i] for i in rng.permutation(len(words)))
    symbols = np.concatenate([record.symbols for record in records])
    logprobs = np.concatenate([record.logprobs for record in records])
    counts = np.concatenate([record.entry_counts for record in records])
    rows = rng.integers(len(counts), size=len(document) + 1)
    firsts = (np.cumsum(counts.astype(np.int64)) - counts)[rows]
    own = counts[rows].astype(np.int64)
    entries = np.repeat(firsts - (np.cumsum(own) - own), own) + np.arange(own.sum())
    shares_of = {
        name: np.concatenate([getattr(record, name) for record in records])[rows]
        for name in ("dropped", "token_end", "doubt")
    }
    lengths = np.full(len(document) // 4, 4, dtype=np.int32)
    return replace(
        records[0],
        document=document,
        segments=(Segment(0, len(document), True),),
        teacher_token_lengths=np.append(lengths, len(document) - lengths.sum()).astype(np.int32),
        teacher_token_logprobs=rng.choice(logprobs, len(lengths) + 1),
        entry_counts=counts[rows],
        symbols=symbols[entries],
        logprobs=logprobs[entries],
        **shares_of,
    )


def make_dump(source: Path, folder: Path) -> Path:
    """Write `SHARDS` shards of `RECORDS` such records."""
    rng = np.random.default_rng(0)
    records = [r for shard in Manifest.load(source).shards for r in read_shard(shard.path(source))]
    (folder / "shards").mkdir(parents=True)
    plans = tuple(
        ShardPlan(index=i, first_document=i * RECORDS, num_documents=RECORDS, num_bytes=0, sha256=str(i))
        for i in range(SHARDS)
    )
    Manifest(identity={}, corpus_counts={}, shards=plans).save(folder)
    for plan in plans:
        own = [replace(drawn(records, rng), doc_id=f"{plan.index}-{row}") for row in range(RECORDS)]
        commit_shard(to_table(own, {}), plan.path(folder), zstd_level=3)
    return folder


def run(builder: BatchBuilder, tokens_per_rank: int, epochs: int, whole: bool) -> Figures:
    """So many epochs; with `whole` every document is read and encoded, as if a rank had to know them all."""
    clock, world = Clock(), builder.world
    reader, tokenizer, _, _ = builder.sources
    train = builder.recipe.train
    lengths = count_all(reader, tokenizer, train.piece_tokens)
    planned = plan_batches(lengths, 0, tokens_per_rank * world, train.piece_tokens)
    plans = takewhile(lambda plan: plan.after.epoch < epochs, clock.each("plan", planned))
    of_all = rank_batches(plans, train.micro_batch_tokens, "off", 0, 1 if whole else world)
    batches = with_records(clock.each("plan", of_all), LocalReading([reader]))
    tokens = 0
    for share, records in clock.each("read", batches):
        documents = clock.run("encode", partial(builder.encoded, share, records))
        own = share
        if whole:
            own = next(rank_batches([share.plan], train.micro_batch_tokens, "off", 0, world))
            found = dict(zip([planned.ref for planned in share.documents], documents, strict=True))
            documents = [found[planned.ref] for planned in own.documents]
        clock.run("tensors", partial(builder.micro_batches, own, documents))
        tokens += sum(planned.num_tokens for planned in own.documents)
    planned = plan_batches(lengths, 0, tokens_per_rank * world, train.piece_tokens)
    return Figures(
        tokens, over_ideal(takewhile(lambda plan: plan.after.epoch < epochs, planned), builder), dict(clock.seconds)
    )


def over_ideal(plans: Iterator[BatchPlan], builder: BatchBuilder) -> float:
    """Tokens that pass while all ranks are at work on a step, each waiting for the largest of the micro-batches side by
    side, over a rank's share.
    """
    passed = there = 0.0
    micro_batch_tokens, world = builder.recipe.train.micro_batch_tokens, builder.world
    for plan in plans:
        lengths = [document.num_tokens for document in plan.documents]
        of_ranks = plan_micro_batches(lengths, micro_batch_tokens, world, builder.packing)
        passed += tokens_passed(lengths, [rows for slot in zip(*of_ranks, strict=True) for rows in slot], world)
        there += sum(lengths) / world
    return passed / there


def main(
    dump: Annotated[Path, typer.Option(help="of whose records the dump is made")] = Path("runs/demo/dump"),
    world: Annotated[list[int] | None, typer.Option(help="ranks, one or more; default: 1, 8, 64")] = None,
    interface: Annotated[str, typer.Option(help="for which documents are prepared")] = "linear",
    tokens: Annotated[int, typer.Option(help="student tokens of a rank's step")] = 4096,
    epochs: Annotated[int, typer.Option(help="epochs of each world, of some 1.9 million tokens")] = 2,
) -> None:
    recipe = load_recipe(
        Path("pipeline/recipes/demo.yaml"), [f"student.interface={interface}", f"train.micro_batch_tokens={tokens}"]
    )
    config = student_config(recipe)
    tokenizer = student_tokenizer(config).tokenizer
    ids = end_tokens(config, tokenizer)
    shape = StudentShape(576, len(tokenizer.token_bytes), tokenizer.token_bytes, tokenizer.prefix, ids.ends)
    parts = ("plan", "read", "encode", "tensors")
    print(
        "| world | documents | tokens/s of a rank | of all ranks | "
        + " | ".join(f"{part}, %" for part in parts)
        + " | step over ideal |"
    )
    print("|" + " --- |" * (5 + len(parts)))
    with TemporaryDirectory() as folder:
        reader = DumpReader(make_dump(dump, Path(folder) / "dump"), 0)
        sources = Sources([Member(reader)], tokenizer, None, ids)
        for size in world or [1, 8, 64]:
            builder = BatchBuilder(recipe, sources, make_interface(config, shape), "off", 0, size)
            for whole in (True, False):
                found = run(builder, tokens, epochs, whole)
                total = sum(found.seconds.values())
                columns = [f"{100 * found.seconds[part] / total:.0f}" for part in parts]
                rate = found.tokens / total
                which = "all" if whole else "its own"
                print(
                    f"| {size} | {which} | {rate:,.0f} | {size * rate:,.0f} | {' | '.join(columns)} "
                    f"| {found.over_ideal:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
