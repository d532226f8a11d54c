"""Number of sources in a step of a corpus that lists them one after another, by lanes.

Lanes are the number of places in which the shards are read at once.

    .venv/bin/python -m tests.bench.mixing [--shards 64] [--records 8192] [--sources 8] [--step 30]

Nothing is read: the order is a function of the seed and of how many records the shards hold. Beside it stand the order
before (one lane), and what all records shuffled at once would give.
"""

from itertools import takewhile
from typing import Annotated

import numpy as np
import typer

from stage2_student.data import order
from stage2_student.data.order import VERSION, WHOLE_RECORDS, Order


def sources_of_steps(version: int, shards: int, records: int, sources: int, step: int) -> np.ndarray:
    """Count the sources of each step's records over an epoch."""
    windows = takewhile(lambda window: not window.epoch, Order(0, np.full(shards, records), None, version).windows())
    source = np.concatenate([(w.shard_W * records + w.unit_W) * sources // (shards * records) for w in windows])
    return np.array([len(np.unique(one)) for one in source[: len(source) // step * step].reshape(-1, step)])


def main(
    shards: Annotated[int, typer.Option(help="of the dump")] = 64,
    records: Annotated[int, typer.Option(help="of a shard")] = 8192,
    sources: Annotated[int, typer.Option(help="of the corpus, one after another")] = 8,
    step: Annotated[int, typer.Option(help="records of a step")] = 30,
) -> None:
    print("| lanes | sources of a step, mean | least | steps of one source alone, % |\n| --- | --- | --- | --- |")
    for lanes in (None, 4, 8, 16, 32):
        order.LANES = lanes or order.LANES
        found = sources_of_steps(WHOLE_RECORDS if lanes is None else VERSION, shards, records, sources, step)
        print(
            f"| {lanes or 'the order before'} | {found.mean():.1f} | {found.min()} | {100 * np.mean(found == 1):.1f} |"
        )
    print(f"| all shuffled at once | {sources * (1 - (1 - 1 / sources) ** step):.1f} | | |")


if __name__ == "__main__":
    typer.run(main)
