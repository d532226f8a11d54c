"""What a checkpoint consists of, written with it; and whether all of that is still there and can be read.

files.json  {"world": 2, "files": {"mp_rank_00_model_states.pt": 118232, ...}}   sizes in bytes
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from schemas.manifest import write_json

_NAME = "files.json"


@dataclass(frozen=True)
class Inventory:
    """The files of a checkpoint by their size in bytes, and how many ranks wrote them."""

    world: int
    files: Mapping[str, int]

    @classmethod
    def load(cls, folder: Path) -> "Inventory":
        """Raises OSError or ValueError where it is missing or damaged."""
        values = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        return cls(int(values["world"]), {str(name): int(size) for name, size in values["files"].items()})


def write_inventory(folder: Path, world: int) -> None:
    """Say what the files in `folder` are; to be called when they are all there."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / _NAME, {"world": world, "files": sizes})


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Why the checkpoint cannot be used: a file that is missing, cut off, unreadable or altered; None where it is
    sound.

    Each record of a file that torch writes carries a CRC-32, so that reading once finds what changed. `parts` ranks
    share the reading: this is the share of `part`.
    """
    try:
        files = Inventory.load(folder).files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_NAME}: {error!r}"
    for name, size in sorted(files.items()):
        if not (folder / name).exists():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes, not {size}"
    for name in sorted(files)[part::parts]:
        if (cause := _unreadable(folder / name)) is not None:
            return f"{name}: {cause}"
    return None


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read as it was written; of files other than torch's, only whether they can be read."""
    try:
        if path.suffix != ".pt":
            path.read_bytes()
            return None
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        return str(error) or repr(error)
    return None if altered is None else f"its record {altered} is not what was written"
