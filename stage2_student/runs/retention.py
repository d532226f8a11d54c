"""Retention of checkpoints: the newest ones, and the best by evaluation.

An evaluated checkpoint holds `evaluation.json`, written before the checkpoint gets its name. The best is therefore a
function of the existing checkpoints, however often the run was interrupted.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from schemas.manifest import read_json, write_json
from schemas.storage.atomic import sync_and_rename, sync_folder
from stage2_student.runs.checkpoints import checkpoint_name, checkpoint_steps
from stage2_student.runs.folder import REMEDY

_FILE = "evaluation.json"


class Evaluation(NamedTuple):
    """A student's bits per byte on held-out text; figures for different texts are not compared.

    Attributes:
        bits_per_byte: of several texts, the mean.
        by_text: of each of several texts, by name; None if there is one.
    """

    bits_per_byte: float
    text_sha256: str
    by_text: Mapping[str, float] | None = None


def record(run: Path, partial: str, evaluation: Evaluation) -> None:
    """Write the evaluation into a checkpoint that is not complete yet."""
    values = {name: value for name, value in evaluation._asdict().items() if value is not None}
    write_json(run / "checkpoints" / partial / _FILE, values)


def evaluation_of(run: Path, step: int) -> Evaluation | None:
    """Read what `record` wrote into a complete checkpoint; None if it was not evaluated."""
    path = run / "checkpoints" / checkpoint_name(step) / _FILE
    needed = ("bits_per_byte", "text_sha256")
    return Evaluation(**read_json(path, *needed, remedy=REMEDY)) if path.exists() else None


def best_step(run: Path) -> int | None:
    """Return the step of the complete checkpoint with the lowest bits per byte; None if none was evaluated.

    Of equals, the earliest. The text may change at a resume (`train.eval_documents`): only checkpoints measured on the
    newest one's text count.
    """
    evaluations = {step: evaluation_of(run, step) for step in checkpoint_steps(run)}
    measured = {step: evaluation for step, evaluation in evaluations.items() if evaluation is not None}
    if not measured:
        return None
    text = measured[max(measured)].text_sha256
    comparable = [step for step, evaluation in measured.items() if evaluation.text_sha256 == text]
    return min(comparable, key=lambda step: (measured[step].bits_per_byte, step))


def prune(run: Path, keep_last: int) -> None:
    """Name the best checkpoint in `checkpoints/best`, then remove all but it and the `keep_last` newest.

    With `keep_last` 0 none is removed. Call it once a newer checkpoint is complete. A checkpoint is renamed before it
    is removed, so that a partly removed one never has a checkpoint's name.
    """
    folder, best = run / "checkpoints", best_step(run)
    if best is not None:
        partial = folder / "best.partial"
        partial.write_text(checkpoint_name(best), encoding="utf-8")
        sync_and_rename(partial, folder / "best")
    for step in checkpoint_steps(run)[:-keep_last] if keep_last else []:
        if step != best:
            removed = folder / f"{checkpoint_name(step)}.partial"
            (folder / checkpoint_name(step)).replace(removed)
            sync_folder(folder)
            shutil.rmtree(removed)
