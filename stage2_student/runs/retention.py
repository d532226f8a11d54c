"""Which checkpoints stay: the newest ones, and the best by evaluation.

A checkpoint that was evaluated holds `evaluation.json`, written before the checkpoint gets its name. What is best is so
a function of the checkpoints that are there, however often the run was interrupted.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from schemas.manifest import read_json, write_json
from schemas.storage.atomic import sync_and_rename, sync_folder
from stage2_student.runs.checkpoints import checkpoint_name, checkpoint_steps
from stage2_student.runs.folder import REMEDY

_FILE = "evaluation.json"


class Evaluation(NamedTuple):
    """How good a student is on held-out text; figures of unlike text are not compared."""

    bits_per_byte: float
    text_sha256: str


def record(run: Path, partial: str, evaluation: Evaluation) -> None:
    """Say in a checkpoint that is not complete yet how good it is."""
    write_json(run / "checkpoints" / partial / _FILE, evaluation._asdict())


def evaluation_of(run: Path, step: int) -> Evaluation | None:
    """What `record` said of a complete checkpoint; None where it was not evaluated."""
    path = run / "checkpoints" / checkpoint_name(step) / _FILE
    return Evaluation(**read_json(path, *Evaluation._fields, remedy=REMEDY)) if path.exists() else None


def best_step(run: Path) -> int | None:
    """The complete checkpoint with the fewest bits per byte, the earlier of equals; None where none was evaluated.

    The text may change at a resume (`train.eval_documents`): those count that were measured on the newest one's.
    """
    found = {step: evaluation_of(run, step) for step in checkpoint_steps(run)}
    measured = {step: evaluation for step, evaluation in found.items() if evaluation is not None}
    if not measured:
        return None
    text = measured[max(measured)].text_sha256
    comparable = [step for step, evaluation in measured.items() if evaluation.text_sha256 == text]
    return min(comparable, key=lambda step: (measured[step].bits_per_byte, step))


def prune(run: Path, keep_last: int) -> None:
    """Name the best checkpoint in `checkpoints/best`, then remove all but it and the `keep_last` newest (0: none goes).

    Called once a newer checkpoint is complete. One that goes loses its name first: half of a checkpoint never has one.
    """
    folder, best = run / "checkpoints", best_step(run)
    if best is not None:
        partial = folder / "best.partial"
        partial.write_text(checkpoint_name(best), encoding="utf-8")
        sync_and_rename(partial, folder / "best")
    for step in checkpoint_steps(run)[:-keep_last] if keep_last else []:
        if step != best:
            going = folder / f"{checkpoint_name(step)}.partial"
            (folder / checkpoint_name(step)).replace(going)
            sync_folder(folder)
            shutil.rmtree(going)
