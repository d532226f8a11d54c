"""Speed of one core at making shards and reading training arrays; memory of reading a dump.

    .venv/bin/python -m tests.bench.shard_speed [--documents 48] [--rounds 5]

Times are of the thread, the best of some rounds. The targets are the demo's (`tests.bench.dense_targets`). Memory is
the peak of a process of its own that reads a whole epoch as a student does; its dumps are links to one shard, 20 and
200 times.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Record
from schemas.shard import commit_shard, read_shard, to_table
from stage1_teacher.targets.records import make_record
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.reader import DumpReader
from tests.bench.dense_targets import Dense, dense_targets

MASKS = Masks(max_doubt=1.0, max_token_end=0.05)
SMALL, LARGE = 20, 200  # shards of the dumps that are read; the smaller one fills the reader's buffer twice
RECORDS = 240  # of such a shard


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the CPU seconds of this thread in the best round."""
    best = float("inf")
    for _ in range(rounds):
        started = time.thread_time()
        run()
        best = min(best, time.thread_time() - started)
    return best


def stored(recipe: Recipe, dense: Sequence[Dense]) -> list[Record]:
    dump = recipe.dump
    return [make_record(d.window, [d.targets], d.tokenizer, dump.top_k, dump.min_prob) for d in dense]


def train_arrays(path: Path) -> int:
    """Make every record's padded arrays for a student with the teacher's tokens; count positions."""
    num_positions = 0
    for record in read_shard(path):
        ends = np.cumsum(record.teacher_token_lengths.astype(np.int64))
        starts = ends - record.teacher_token_lengths
        example = make_example(Encoded(record, np.zeros(len(ends), np.int64), starts, ends), 0, 0, None, MASKS)
        num_positions += len(example.state_P)
    return num_positions


def print_speed(recipe: Recipe, dense: Sequence[Dense], rounds: int, folder: Path) -> None:
    path, level = folder / "part.parquet", recipe.dump.zstd_level
    records = stored(recipe, dense)
    num_positions = sum(record.num_positions for record in records)
    encode = seconds(lambda: to_table(stored(recipe, dense), {}), rounds)
    table = to_table(records, {})
    write = {zstd: seconds(lambda zstd=zstd: commit_shard(table, path, zstd), rounds) for zstd in (1, level)}  # type: ignore[misc]
    arrays = seconds(lambda: train_arrays(path), rounds)
    plain = seconds(lambda: sum(1 for _ in read_shard(path)), rounds)
    print(
        f"{num_positions} positions, {sum(len(r.symbols) for r in records) / num_positions:.2f} entries each; "
        "one core, positions per second:"
    )
    print(f"dense targets to a table (sparse, rounded):         {num_positions / encode:>12,.0f}")
    for zstd, took in write.items():
        print(f"that table to a file at zstd level {zstd:<2}:              {num_positions / took:>12,.0f}")
    print(
        f"dense targets to a file at zstd level {level:<2}:           {num_positions / (encode + write[level]):>12,.0f}"
    )
    print(f"a file to records:                                  {num_positions / plain:>12,.0f}")
    print(f"a file to padded training arrays:                   {num_positions / arrays:>12,.0f}")


def print_memory(records: Sequence[Record], folder: Path) -> None:
    """Measure the peak memory of reading a dump, and one ten times as large."""
    shard = folder / "shard.parquet"
    commit_shard(to_table([records[i % len(records)] for i in range(RECORDS)], {}), shard, 1)
    for count in (SMALL, LARGE):
        dump = folder / str(count)
        (dump / "shards").mkdir(parents=True)
        plans = [
            ShardPlan(index=i, first_document=0, num_documents=RECORDS, num_bytes=0, sha256="") for i in range(count)
        ]
        Manifest(identity={}, corpus_counts={}, shards=tuple(plans)).save(dump)
        for plan in plans:
            plan.path(dump).hardlink_to(shard)
        command = [sys.executable, "-m", "tests.bench.shard_speed", "--read", str(dump)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        print(f"one epoch of {count} shards, {count * shard.stat().st_size / 1e6:.0f} MB: {found}", flush=True)


def read_epoch(dump: Path) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of the imports, is forgotten
    before, num_positions = memory("VmRSS"), 0
    for record, position in DumpReader(dump, seed=0).records():
        if position.epoch:
            break
        num_positions += record.num_positions
    print(
        f"{num_positions} positions, peak {memory('VmHWM') - before:.0f} MiB above "
        f"the {before:.0f} of the program itself"
    )


def memory(field: str) -> float:
    """Return MiB of this process, as Linux reports it: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def main(
    documents: Annotated[int, typer.Option(help="Documents of the demo's corpus.")] = 48,
    rounds: Annotated[int, typer.Option(help="Timed rounds; the best counts.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the dense targets.")] = Path("runs/economy"),
    read: Annotated[Path | None, typer.Option(help="Only read this dump, and print the memory it took.")] = None,
) -> None:
    if read is not None:
        read_epoch(read)
        return
    recipe = load_recipe("pipeline/recipes/demo.yaml", ["teacher.engine=transformers"])
    dense = dense_targets(recipe, "corpus", documents, out)
    with tempfile.TemporaryDirectory() as folder:
        print_speed(recipe, dense, rounds, Path(folder))
        print_memory(stored(recipe, dense), Path(folder))


if __name__ == "__main__":
    typer.run(main)
