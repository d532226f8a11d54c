"""Corpora at their extremes, through the commands: a line of 200 MB, and a million documents of one byte.

    .venv/bin/python -m tests.bench.extremes [line|documents|all] [--line-mb 200] [--documents 1000000] [--engine vllm]

A tiny model. Of the line: it is left out by name at the default `corpus.max_row_bytes`, and is a document where that
allows it; of the documents: the whole dump, and what `bld verify` says of it. Printed: seconds of the clock and of the
processor, the largest memory of one process, sizes.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from schemas.manifest import Manifest
from tests.support.tiny import END_OF_TEXT, tiny_model

READ = """
import resource, sys
from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus
corpus = Corpus(CorpusConfig(source=sys.argv[1], max_row_bytes=int(sys.argv[2])))
lengths = [len(document.text) for document in corpus.documents()]
print(len(lengths), "documents, the longest of", f"{max(lengths):,}", "bytes;", dict(corpus.counts))
"""


def timed(name: str, *arguments: str) -> None:
    """Run a command, which must succeed, and print what it took."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    print(
        f"{name}: {time.monotonic() - started:.0f} s, {cpu:.0f} CPU s, "
        f"so far at most {after.ru_maxrss / 2**20:.2f} GiB in one process: {said}",
        flush=True,
    )


def recipe(folder: Path, engine: str) -> Path:
    """Write the recipe of a tiny teacher for `corpus.jsonl`."""
    tiny_model(folder / "model")
    teacher = {
        "model": str(folder / "model"), "engine": engine, "dtype": "float32", "max_tokens": 256, "overlap_tokens": 32,
        "start": END_OF_TEXT, "end": [END_OF_TEXT],
    }  # fmt: skip
    values: dict[str, Any] = {
        "corpus": {"source": str(folder / "corpus.jsonl")},
        "teacher": teacher,
        "dump": {"path": str(folder / "dump")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def one_line(folder: Path, engine: str, megabytes: int) -> None:
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps({"text": "a short one"}) + "\n")
        file.write('{"text": "' + "the thing and another " * (megabytes * 1_000_000 // 22) + '"}\n')
        file.write(json.dumps({"text": "one behind it"}) + "\n")
    size = (folder / "corpus.jsonl").stat().st_size
    print(f"a line of {size:,} bytes between two short ones")
    timed("bld teacher, which leaves it out", "-m", "pipeline", "teacher", str(recipe(folder, engine)))
    timed("bld verify", "-m", "pipeline", "verify", str(folder / "dump"))
    print("counts:", Manifest.load(folder / "dump").corpus_counts)
    timed("the corpus read with room for it", "-c", READ, str(folder / "corpus.jsonl"), str(size))


def many_documents(folder: Path, engine: str, number: int) -> None:
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for i in range(number):
            file.write(f'{{"text": "{chr(97 + i % 26)}"}}\n')
    timed(f"bld teacher, {number:,} documents", "-m", "pipeline", "teacher", str(recipe(folder, engine)))
    sizes = [path.stat().st_size for path in (folder / "dump" / "shards").iterdir()]
    print(f"{len(sizes)} shards of {sum(sizes) / number:.1f} bytes a document")
    timed("bld verify", "-m", "pipeline", "verify", str(folder / "dump"))


def main(
    case: Annotated[str, typer.Argument(help="line, documents or all.")] = "all",
    line_mb: Annotated[int, typer.Option(help="Of the long line.")] = 200,
    documents: Annotated[int, typer.Option(help="Of one byte each.")] = 1_000_000,
    engine: str = "vllm",
) -> None:
    with tempfile.TemporaryDirectory() as made:
        for name in ("line", "documents") if case == "all" else (case,):
            folder = Path(made, name)
            folder.mkdir()
            if name == "line":
                one_line(folder, engine, line_mb)
            else:
                many_documents(folder, engine, documents)


if __name__ == "__main__":
    typer.run(main)
