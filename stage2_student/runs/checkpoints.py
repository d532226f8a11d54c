"""A run's checkpoints: which are complete, how one becomes so, and which are set aside."""

import os
import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from pipeline.runtime import log
from schemas.storage.atomic import sync_and_rename
from stage2_student.runs.checkpoint_files import write_inventory

_STEP = re.compile(r"step-(\d{6,})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def commit_checkpoint(run: Path, partial: str, step: int, world: int) -> None:
    """List DeepSpeed's files and make them durable, then give the folder its name, then say in `latest` that it is the
    newest.
    """
    folder = run / "checkpoints"
    write_inventory(folder / partial, world)
    for file in (folder / partial).iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    (folder / partial).replace(folder / checkpoint_name(step))
    _write_latest(folder, step)


def _write_latest(folder: Path, step: int) -> None:
    latest = folder / "latest.partial"
    latest.write_text(checkpoint_name(step), encoding="utf-8")
    sync_and_rename(latest, folder / "latest")


def set_aside(run: Path, damaged: Mapping[int, str], sound: int) -> None:
    """Say which checkpoints are damaged, and why, and keep them under names that no resume looks at; `sound` is now the
    newest.
    """
    folder = run / "checkpoints"
    for step, cause in damaged.items():
        name = checkpoint_name(step)
        kept = next(
            new for n in count(1) if not (new := folder / f"{name}.damaged{'' if n == 1 else f'-{n}'}").exists()
        )
        (folder / name).replace(kept)
        log.warning(
            f"{folder / name} cannot be loaded ({cause}); kept as {kept.name}, going back to {checkpoint_name(sound)}"
        )
    if damaged:
        _write_latest(folder, sound)


def remove_partial_checkpoints(run: Path) -> None:
    for folder in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
