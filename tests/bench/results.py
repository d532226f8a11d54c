"""Figures of benchmarks as files: `tests/bench/results/NAME.json`.

Each holds what was run, where and when, and the figures, so that a page can be written from them (`tests.bench.pages`).
"""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from schemas.json_text import json_text
from schemas.storage.atomic import committed

FOLDER = Path(__file__).parent / "results"


class Result(BaseModel, frozen=True, extra="forbid"):
    """A file of figures. What is not known is null: nothing in it is guessed.

    `figures` maps names to lists of rows, which a page can show as tables, and to whatever else a benchmark keeps. A
    row maps headings, with units, to cells: text, a number, a list of numbers, or a mapping with a `value` and its
    `difference` to a control, 95 % `interval`, standard `error`, or another measure `beside` it.
    """

    command: str | None
    commit: str | None = Field(description="Of the code that ran; of older figures, of the page that first had them.")
    date: date | None
    machine: str | None
    documents: str | None = Field(None, description="How many of which text.")
    seeds: int | None = None
    remark: str | None = Field(None, description="What a reader has to know of all figures of the file.")
    figures: dict[str, Any]


def read(name: str, folder: Path = FOLDER) -> Result:
    """Read a file of figures. Raises ValueError, with its name, if it is missing or not one."""
    file = folder / f"{name}.json"
    try:
        return Result.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a file of figures: {error}") from error


def load(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Return the figures of a benchmark that are there, as `save` was given them; empty if there are none."""
    return read(name, folder).figures if (folder / f"{name}.json").exists() else {}


def save(name: str, figures: Mapping[str, Any], folder: Path = FOLDER, **about: str | int | None) -> Path:
    """Write the figures of a benchmark, with this command, commit and machine, and return the file.

    `about` is what else is known of all of them: `documents`, `seeds`, a `remark`.
    """
    made = {
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }
    return write(name, Result.model_validate({**made, **about, "figures": dict(figures)}), folder)


def write(name: str, result: Result, folder: Path = FOLDER) -> Path:
    """Write a file of figures and return it: a row a line, so that a diff shows what was measured anew."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    values = json.loads(json_text(result.model_dump(mode="json", exclude_none=False)))
    with committed(file) as partial:
        partial.write_text(_laid_out(values) + "\n", encoding="utf-8")
    return file


def command() -> str:
    """Return the command that runs, as it can be typed."""
    return shlex.join(["python", "-m", f"tests.bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def machine() -> str:
    """Describe what computes: threads and processor, and the GPU if there is one."""
    import torch  # seconds, and the pages are written without it

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{torch.get_num_threads()} threads, {platform.machine()}, no GPU"


def _laid_out(value: Any, depth: int = 0) -> str:
    if not isinstance(value, dict | list) or (depth and not _is_nested(value)):
        return json.dumps(value, ensure_ascii=False)
    space = "\n" + " " * (depth + 1)
    if isinstance(value, list):
        return "[" + ",".join(space + _laid_out(one, depth + 1) for one in value) + "\n" + " " * depth + "]"
    items = [f"{json.dumps(key, ensure_ascii=False)}: {_laid_out(one, depth + 1)}" for key, one in value.items()]
    return "{" + ",".join(space + item for item in items) + "\n" + " " * depth + "}"


def _is_nested(value: dict[str, Any] | list[Any]) -> bool:
    """Tell if a value holds more than a row does: mappings that are no cells."""
    if isinstance(value, list):
        return any(isinstance(one, dict) for one in value)
    return any(_is_nested(one) if isinstance(one, list) else "value" not in one for one in _parts(value))


def _parts(value: dict[str, Any]) -> list[Any]:
    return [one for one in value.values() if isinstance(one, dict | list)]


def commit() -> str:
    """Return the commit of the code that runs, with `-dirty` where files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
