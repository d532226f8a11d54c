"""Figures of benchmarks as files: `tests/bench/results/NAME.json`.

Each holds what was run, where and when, and the figures, so that a page can be written from them.
"""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from schemas.manifest import write_json

FOLDER = Path(__file__).parent / "results"


def load(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Return the figures of a benchmark that are there, as `save` was given them; empty if there are none."""
    file = folder / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))["figures"]) if file.exists() else {}


def save(name: str, figures: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write the figures of a benchmark, with this command, commit and machine, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    made = {
        "command": shlex.join(["python", "-m", f"tests.bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }
    write_json(file, {**made, "figures": dict(figures)})
    return file


def machine() -> str:
    """Describe what computes: threads and processor, and the GPU if there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{torch.get_num_threads()} threads, {platform.machine()}, no GPU"


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
