"""A run's checkpoints: those that are complete, committing a new one, and setting damaged ones aside."""

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
    """Return the folder name of the checkpoint of a step."""
    return f"step-{step:06d}"


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    folder = run / "checkpoints"
    steps = [step_of(path.name) for path in folder.iterdir()] if folder.exists() else []
    return sorted(step for step in steps if step is not None)


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint with this folder name; None if it is not one of a complete checkpoint."""
    match = _STEP.fullmatch(name)
    return None if match is None else int(match[1])


def commit_checkpoint(run: Path, partial: str, step: int, world: int) -> None:
    """Inventory DeepSpeed's files and make them durable, rename the folder, then name it in `latest` as the newest."""
    folder = run / "checkpoints"
    write_inventory(folder / partial, world)
    for file in (folder / partial).iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    (folder / partial).replace(folder / checkpoint_name(step))
    _write_latest(folder, step)


def commit_fetched(run: Path, partial: str, step: int) -> None:
    """Give a checkpoint that was fetched, and is durable, its name, beside older and newer ones."""
    folder = run / "checkpoints"
    (folder / partial).replace(folder / checkpoint_name(step))
    _write_latest(folder, checkpoint_steps(run)[-1])


def _write_latest(folder: Path, step: int) -> None:
    latest = folder / "latest.partial"
    latest.write_text(checkpoint_name(step), encoding="utf-8")
    sync_and_rename(latest, folder / "latest")


def set_aside(run: Path, damaged: Mapping[int, str], sound: int) -> None:
    """Rename damaged checkpoints, with a warning, so that no resume looks at them.

    Args:
        damaged: why each cannot be used, by step.
        sound: the step of the checkpoint that is now the newest.
    """
    folder = run / "checkpoints"
    for step, cause in damaged.items():
        name = checkpoint_name(step)
        aside = next(
            new for n in count(1) if not (new := folder / f"{name}.damaged{'' if n == 1 else f'-{n}'}").exists()
        )
        (folder / name).replace(aside)
        log.warning(
            f"{folder / name} cannot be loaded ({cause}); kept as {aside.name}, going back to {checkpoint_name(sound)}"
        )
    if damaged:
        _write_latest(folder, sound)


def remove_partial_checkpoints(run: Path) -> None:
    """Remove checkpoints that an interrupted run left incomplete."""
    for folder in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
