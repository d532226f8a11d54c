"""Token counts of a large dump: how long they take to be put into arrays, their bytes, and what a rank holds of them.

    .venv/bin/python -m tests.bench.lengths [--records 10000000] [--world 512]

The counts are drawn, in shards of 100,000 records; one in a hundred is cut in two, one in a thousand unusable. A
process of its own maps the arrays and plans steps of 4,096 tokens a rank, as each rank does.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from stage2_student.data.batch_plan import plan_batches
from stage2_student.data.lengths.mapped import mapped_counts
from stage2_student.data.packing import plan_micro_batches
from stage2_student.data.token_counts import part_path
from tests.bench import results

SHARD, STEPS = 100_000, 20


def draw(path: Path, rng: np.random.Generator) -> None:
    """Write the counts of a shard, as `keep_counts` does."""
    kind = rng.random(SHARD)
    pieces = np.where(kind < 0.001, 0, np.where(kind < 0.011, 2, 1))
    offsets = pa.array(np.concatenate([[0], np.cumsum(pieces)]).astype(np.int32))
    tokens = pa.array(rng.integers(100, 1500, int(pieces.sum())).astype(np.int32))
    table = {
        "num_tokens": pa.ListArray.from_arrays(offsets, tokens),
        "left_out": pa.array(["the tokenizer cannot spell it" if one == 0 else None for one in pieces], pa.string()),
        "num_bytes": pa.array(rng.integers(400, 6000, SHARD)),
        "continues": pa.array(np.zeros(SHARD, dtype=bool)),
    }
    pq.write_table(pa.table(table), path)


def plan(folder: Path, shards: int, world: int) -> None:
    """Map the counts and plan steps; print seconds to the first, seconds of each, and megabytes of this process."""
    started = time.process_time()
    before = psutil.Process().memory_full_info()
    lengths = mapped_counts(folder, shards, "bench", makes=False)
    plans = plan_batches(lengths, 0, 4096 * world, 2048)
    plan_micro_batches(next(plans).lengths, 4096, world)
    first = time.process_time() - started
    for _ in range(STEPS):
        plan_micro_batches(next(plans).lengths, 4096, world)
    after = psutil.Process().memory_full_info()
    own, mapped = ((getattr(after, k) - getattr(before, k)) / 1e6 for k in ("uss", "shared"))
    print(first, (time.process_time() - started - first) / STEPS, own, mapped)


def main(
    records: Annotated[int, typer.Option(help="of the dump")] = 10_000_000,
    world: Annotated[int, typer.Option(help="ranks for which steps are planned")] = 512,
    inner: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    shards = records // SHARD
    if inner:
        plan(Path(inner), shards, world)
        return
    with TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        for shard in range(shards):
            draw(part_path(folder, shard), rng)
        started = time.process_time()
        mapped_counts(folder, shards, "bench")
        made = time.process_time() - started
        size = sum(path.stat().st_size for path in (folder / "arrays.d").iterdir())
        command = [sys.executable, "-m", "tests.bench.lengths", "--records", str(records), "--world", str(world)]
        done = subprocess.run([*command, "--inner", name], check=True, capture_output=True, text=True)
        first, each, own, mapped = map(float, done.stdout.split())
    row = {
        "records": f"{records:,}",
        "bytes on disk a record": round(size / records, 2),
        "seconds to make, a million records": round(made / records * 1e6, 2),
        "seconds to a rank's first plan": round(first, 1),
        f"ms a step of {world} ranks": round(1000 * each, 1),
        "MB of a rank's own": round(own),
        "MB mapped, one copy a machine": round(mapped),
    }
    print(row)
    results.save("lengths", {"rows": [row]})


if __name__ == "__main__":
    typer.run(main)
