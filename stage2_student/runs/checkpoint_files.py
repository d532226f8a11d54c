"""The inventory of a checkpoint's files, written with it, and the check that all of them are intact.

files.json  {"world": 2, "files": {"mp_rank_00_model_states.pt": 118232, ...}}   sizes in bytes
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from schemas.manifest import write_json

AVERAGE = "average.pt"  # the moving average of the weights, if the run keeps one (`train.ema`)
_NAME = "files.json"


@dataclass(frozen=True)
class Inventory:
    """The sizes in bytes of a checkpoint's files, by name, and the number of ranks that wrote them."""

    world: int
    files: Mapping[str, int]

    @classmethod
    def load(cls, folder: Path) -> "Inventory":
        """Read the inventory of a checkpoint. Raises OSError or ValueError if it is missing or damaged."""
        values = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        return cls(int(values["world"]), {str(name): int(size) for name, size in values["files"].items()})


def write_inventory(folder: Path, world: int) -> None:
    """Record the files in `folder`; call it once all of them are written."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / _NAME, {"world": world, "files": sizes})


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return why the checkpoint cannot be used; None if it is sound.

    Finds a file that is missing, truncated, unreadable or altered: each record of a file written by torch carries a
    CRC-32, so that one read detects any change. `parts` ranks share the reading; this call reads the files of rank
    `part`.
    """
    try:
        files = Inventory.load(folder).files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_NAME}: {error!r}"
    for name, size in sorted(files.items()):
        if not (folder / name).exists():
            return f"{name} is missing"
        if (actual_size := (folder / name).stat().st_size) != size:
            return f"{name} has {actual_size} bytes, not {size}"
    for name in sorted(files)[part::parts]:
        if (cause := _unreadable(folder / name)) is not None:
            return f"{name}: {cause}"
    return None


def _unreadable(path: Path) -> str | None:
    """Return why a file is damaged; None if it is sound. Files other than torch's are only checked to be readable."""
    try:
        if path.suffix != ".pt":
            path.read_bytes()
            return None
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        return str(error) or repr(error)
    return None if altered is None else f"its record {altered} was altered"
