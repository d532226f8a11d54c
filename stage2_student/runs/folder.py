"""A run's folder: whose it is, and what the run that lies there began with.

identity.json             what decides the result; a resume that differs is refused, but for the schedule of steps to
come recipe.yaml, deepspeed.json, transfer counts in start/ lengths/                  the student's tokens of each
record, by shard (see `stage2_student.data.token_counts`) start/                    the student before its first step, a
Hugging Face folder checkpoints/step-000020   DeepSpeed's files; complete, since a checkpoint gets its name last
checkpoints/latest        the newest of them, for DeepSpeed's own tools checkpoints/best          the best of them by
evaluation (see `stage2_student.runs.retention`) checkpoints/*.damaged     one that could not be loaded when the run was
resumed metrics.jsonl, tensorboard/, summary.json, export/
"""

import fcntl
import shutil
from pathlib import Path
from typing import IO, Any

from pipeline.config.identity import identity_differences
from pipeline.runtime import log
from schemas.manifest import read_json, write_json
from stage2_student.data import order
from stage2_student.runs import schedule
from stage2_student.runs.checkpoints import checkpoint_steps

REMEDY = "Restore that file, or give a new student.path, or delete that folder to start again"


def lock(run: Path) -> IO[str]:
    """Hold the run for this process, until it ends in whatever way. Raises ValueError where another holds it."""
    run.mkdir(parents=True, exist_ok=True)
    file = (run / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another process is training in {run}; wait for it, end it, or give another student.path"
        ) from None
    return file


def claim(run: Path, identity: dict[str, Any]) -> None:
    """Make the run's identity ours. Raises ValueError, naming the fields, where checkpoints of another one lie there.

    One that differs in the schedule alone is trained on, with a warning. Without a complete checkpoint nothing is lost,
    and what another recipe left there is removed.
    """
    path = run / "identity.json"
    theirs = begun_identity(run) if path.exists() else None
    known = {} if theirs is None else {key: value for key, value in theirs.items() if key != schedule.TRAINED_ON}
    if theirs is not None and (differences := "; ".join(identity_differences(known, identity))):
        if steps := checkpoint_steps(run):
            trained_on = schedule.replanned(theirs, identity, steps)
            if trained_on is None:
                raise ValueError(
                    f"{run} holds checkpoints of another run ({differences}). Give a new student.path, or "
                    "delete that folder to start again."
                )
            log.warning(
                f"{run}: trained on from step {steps[-1]} ({differences}); the rates of the steps to come are planned anew"
            )
            write_json(path, trained_on)
            return
        theirs = None
    if theirs is None:
        for name in ("start", "start.partial", "checkpoints", "tensorboard"):
            shutil.rmtree(run / name, ignore_errors=True)
        for name in ("metrics.jsonl", "wandb_id"):
            (run / name).unlink(missing_ok=True)
        write_json(path, identity)


def begun_identity(run: Path, *needed: str) -> dict[str, Any]:
    """Read the identity that the run in this folder began with. Raises ValueError, naming the file, where it is
    damaged.
    """
    return read_json(run / "identity.json", *needed, remedy=REMEDY)


def tokenizer_sha256(run: Path) -> str:
    """The `ByteTokenizer.sha256` of the student's tokenizer, as the run began."""
    return str(begun_identity(run, "student")["student"]["tokenizer_sha256"])


def data_order(run: Path) -> int:
    """The version of the order in which the run takes its documents: the one that its checkpoints were made in, where
    it can still be taken.
    """
    path = run / "identity.json"
    if not path.exists() or not checkpoint_steps(run):
        return order.VERSION
    begun = begun_identity(run).get("data_order")
    return begun if begun in order.READ else order.VERSION


def adapters_by_peft(run: Path) -> bool:
    """Whether the run's checkpoints have the adapters that earlier releases gave a model (see
    `stage2_student.model.lora`).
    """
    path = run / "identity.json"
    begun = path.exists() and checkpoint_steps(run)
    return bool(begun) and "adapters" not in begun_identity(run)


def begun_schedule(run: Path) -> dict[str, Any]:
    """Return what a run that has a checkpoint keeps where a recipe does not say it (`schedule.KEPT`); empty where there
    is none.
    """
    path = run / "identity.json"
    if not path.exists() or not checkpoint_steps(run):
        return {}
    return schedule.begun(begun_identity(run), schedule.KEPT)


def was_passed(run: Path, step: int) -> bool:
    """Whether the run was at its end at this step, and was then trained on."""
    identity = begun_identity(run)
    return step in [time["from_step"] for time in identity.get(schedule.TRAINED_ON, [])]
