"""The rest of a new operator's first hour: kills, more students, two teachers, rounds, Ray.

    .venv/bin/python -m tests.bench.first_hour [--write]

Compares what the commands print with `tests/scenarios/first_hour_longer.txt`, in minutes; `--write` keeps it there. The
first part of the hour is a test.
"""

from typing import Annotated

import typer

from tests.support.first_hour import KEPT, difference, transcript

PART, TIMEOUT = "first_hour_longer", 7200.0


def main(write: Annotated[bool, typer.Option(help="Keep what is printed now.")] = False) -> None:
    if write:
        KEPT[PART].write_text(transcript(PART, TIMEOUT), encoding="utf-8")
    elif not KEPT[PART].exists():
        raise typer.BadParameter(f"{KEPT[PART]} is not there yet: run it with --write first, and look at what it keeps")
    elif changed := difference(PART, TIMEOUT):
        print(changed)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
