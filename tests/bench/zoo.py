"""The matrix: tiny random models of every family with every kind of tokenizer, by brute force.

They are compared with the models' own logits.

    .venv/bin/python -m tests.bench.zoo [--only falcon_h1] [--small] [--out runs/zoo.jsonl] [--write]

What is measured of a cell, and when it is right, is in `tests/zoo/measure.py`. A line of `--out` is the outcome of a
cell; those that are there are not measured again (remove the file for that). Cells run a few at a time in processes of
their own: one that dies is an outcome too. `--write` keeps the tables as tests/bench/results/zoo.json, for `make
results`. `--small` leaves out the tokenizers of real models, which are downloaded (18 MB).
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from tests.bench import results
from tests.zoo.cells import SMALL_KINDS, Cell, Outcome, all_cells
from tests.zoo.table import figures

# In whatever folder, and where Python is told to leave the current one out of its path.
START = (
    f"import runpy, sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
    "runpy.run_module('tests.bench.zoo', run_name='__main__')"
)

BATCH = {
    "targets vllm": 1,
    "trained": 25,
}  # cells of a process; others: 100. After one model vLLM makes no expert group for another
SECONDS = 150  # that a cell may take, on a machine with other work


def read(out: Path) -> dict[Cell, Outcome]:
    """Read what has been measured."""
    if not out.exists():
        return {}
    lines = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    return {Cell(*line["cell"]): Outcome(line["status"], line["detail"]) for line in lines}


def record(out: Path, cell: Cell, outcome: Outcome) -> None:
    versions = {name: version(name) for name in ("torch", "transformers")}
    line = {"cell": list(cell), "status": outcome.status, "detail": outcome.detail[:1000], "versions": versions}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def measure(cells: Sequence[Cell], out: Path, seed: int) -> None:
    """Measure each cell in this process."""
    import transformers

    from tests.zoo.measure import run  # seconds to import, with both stages
    from tests.zoo.spellings import of_family, small
    from tests.zoo.subject import Place

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    trained = out.parent / "zoo_tokenizers"
    trained.mkdir(parents=True, exist_ok=True)
    of = cache(lambda name: small(name, trained) if name in SMALL_KINDS else of_family(name))
    for cell in cells:
        with tempfile.TemporaryDirectory(prefix="zoo-") as work:
            outcome = run(cell, Place(Path(work), of, seed))
        record(out, cell, outcome)
        print(f"{outcome.status:8} {cell}: {outcome.detail[:300]}", flush=True)


def measure_apart(cells: Sequence[Cell], out: Path, seed: int) -> None:
    """Measure the cells in a process of their own.

    If it dies early, the cell it was at is wrong, and the rest go on.
    """
    while cells:
        command = [sys.executable, "-c", START, "--out", str(out), "--seed", str(seed)]
        command += [part for cell in cells for part in ("--cell", json.dumps(cell))]
        try:
            ended = f"the process ended with {subprocess.run(command, timeout=SECONDS * len(cells)).returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not done in {SECONDS} s a cell"
        cells = [cell for cell in cells if cell not in read(out)]
        if cells:
            record(out, cells[0], Outcome("wrong", ended))
            cells = cells[1:]


def batches(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Group cells of one kind, as many as share a process."""

    def kind(cell: Cell) -> str:
        return f"{cell.check} {cell.engine}".strip()

    for name, group in groupby(sorted(cells, key=kind), key=kind):
        of_kind, size = list(group), BATCH.get(name, 100)
        yield from (of_kind[first : first + size] for first in range(0, len(of_kind), size))


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="words that a cell's name has, all of them; of several, any")
    ] = None,
    out: Annotated[Path, typer.Option(help="outcomes, a line a cell")] = Path("runs/zoo.jsonl"),
    small_ones: Annotated[bool, typer.Option("--small", help="trained tokenizers only")] = False,
    write: Annotated[bool, typer.Option(help="keep the tables as tests/bench/results/zoo.json")] = False,
    seed: Annotated[int, typer.Option(help="of the models' weights")] = 0,
    cell: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what is missing, and print what is wrong. Exits with 1 if anything is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if cell:
        measure([Cell(*json.loads(text)) for text in cell], out, seed)
        return
    parts = [set(words.split()) for words in only or [""]]
    cells = all_cells(not small_ones)
    wanted = [one for one in cells if any(part <= set(str(one).split()) for part in parts)]
    done = read(out)
    todo = [one for one in wanted if one not in done]
    for batch in batches(todo):
        measure_apart(batch, out, seed)
    found = {one: outcome for one, outcome in read(out).items() if one in set(wanted)}
    counts = {status: sum(o.status == status for o in found.values()) for status in ("right", "refused", "wrong")}
    print(f"{len(found)} cells: {counts}")
    for one, outcome in found.items():
        if outcome.status == "wrong":
            print(f"WRONG {one}: {outcome.detail}")
    if write:
        results.save("zoo", {**results.load("zoo"), **figures(found)})
    raise typer.Exit(int(counts["wrong"] > 0))


if __name__ == "__main__":
    typer.run(main)
