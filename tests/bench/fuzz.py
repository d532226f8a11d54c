"""Thousands of randomly damaged corpus files, recipes and shards.

Corpus files are lines, arrays, texts, Parquet, compressed, or several in turn. Ends at the first input that is neither
accepted nor refused.

.venv/bin/python -m tests.bench.fuzz [corpus|recipe|shard] [--cases 10000] [--first 0]
"""

import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from tests.support.fuzz import TARGETS, accepted

SLOW_SECONDS = 10.0


def main(
    target: Annotated[str, typer.Argument(help="One of them, or all.")] = "all",
    cases: Annotated[int, typer.Option(help="Inputs of each.")] = 10_000,
    first: Annotated[int, typer.Option(help="Seed of the first.")] = 0,
) -> None:
    for name in TARGETS if target == "all" else [target]:
        taken, slowest = 0, 0.0
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(first, first + cases):
                started = time.process_time()  # of a machine that does much else
                try:
                    taken += accepted(name, Random(seed), Path(folder))
                except BaseException:
                    print(f"{name}: seed {seed}", file=sys.stderr)
                    raise
                slowest = max(slowest, time.process_time() - started)
                if slowest > SLOW_SECONDS:
                    raise SystemExit(f"{name}: seed {seed} took {slowest:.0f} s")
        print(
            f"{name}: {cases} inputs, {taken} taken, {cases - taken} refused in words; the slowest took {slowest:.2f} s"
        )


if __name__ == "__main__":
    typer.run(main)
