"""Functions of Python's standard library as prompts, and whether what a model makes of them parses."""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from schemas.storage.atomic import committed
from schemas.text_corpus import text_shards

MAX_BYTES = 1200  # of a prompt


class Parsed(NamedTuple):
    """Count of completions that, each with its prompt, parse as functions with a body."""

    functions: int
    completions: int


def function_prompts() -> Iterator[tuple[str, str]]:
    """Yield name and beginning, up to the end of its docstring, of each documented function of the standard library.

    They are functions of a module's top level that do more than say what they do.
    """
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
                text = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n"
                if len(text.encode()) <= MAX_BYTES:
                    yield f"{path.stem}.{node.name}", text


def write_prompts(path: Path, number: int) -> None:
    """Write that many of the functions as a file of prompts, JSONL: those whose names hash lowest."""
    chosen = sorted(function_prompts(), key=lambda item: hashlib.sha256(item[0].encode()).digest())[:number]
    with committed(path) as partial:
        rows = (json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n" for name, text in chosen)
        partial.write_text("".join(rows), encoding="utf-8")


def parses(prompt: str, completion: str, is_finished: bool) -> bool:
    """Return whether a prompt and its completion are a function with a body, as far as the function goes.

    It ends before the first line of the completion without indentation; of a completion that was cut off before, the
    last line does not count.
    """
    lines = completion.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()), None)
    body = lines[:end] if end is not None or is_finished else lines[:-1]
    try:
        [function] = ast.parse(prompt + "".join(body)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return isinstance(function, ast.FunctionDef) and len(function.body) > 1


def count_parsed(folder: Path) -> Parsed:
    """Count the completions of a written corpus that parse."""
    counted = [0, 0]
    for path in text_shards(folder):
        table = pq.read_table(path, columns=["text", "segment_starts", "is_finished"])
        for row in table.to_pylist():
            text, start = row["text"].encode(), row["segment_starts"][0]
            counted[0] += parses(text[:start].decode(), text[start:].decode(), row["is_finished"])
            counted[1] += 1
    return Parsed(*counted)
