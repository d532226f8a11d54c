"""A run's folder: its lock, its identity, and what an existing run began with.

identity.json             everything that decides the result; a resume with another is refused, except for the schedule
                          of steps to come
recipe.yaml, deepspeed.json; how the start was made in start/transfer.json
lengths/                  the student's tokens per record, by shard (see `stage2_student.data.token_counts`); of a union
                          in a folder for each corpus; arrays.d: the same as arrays, which the ranks map
joined/                   of several dumps of one corpus, the documents that all hold
                          (see `stage2_student.data.contents.join_table`)
start/                    the student before its first step, a Hugging Face folder (`bld start` makes it alone)
checkpoints/step-000020   DeepSpeed's files; always complete, because a checkpoint gets its name last
checkpoints/latest        name of the newest checkpoint, for DeepSpeed's own tools
checkpoints/best          name of the best checkpoint by evaluation (see `stage2_student.runs.retention`)
checkpoints/*.damaged     a checkpoint that could not be loaded at a resume
metrics.jsonl, tensorboard/, summary.json, export/
"""

import fcntl
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from pipeline.config.identity import identity_differences
from pipeline.runtime import log
from schemas import dump_files
from schemas.manifest import read_json, write_json
from stage2_student.data import order
from stage2_student.model.start_identity import is_made, of_start
from stage2_student.runs import schedule, train_on
from stage2_student.runs.checkpoints import checkpoint_steps

REMEDY = "Restore that file, give a new student.path, or delete that folder to start over"


def lock(run: Path) -> IO[str]:
    """Lock the run until this process ends, in whatever way. Raises ValueError if another process holds the lock."""
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


def claim(run: Path, identity: dict[str, Any], change: Collection[str] = ()) -> None:
    """Create the run's identity, or check that it is `identity`.

    If only the schedule differs, or what `change` names (`train.change`), the run is trained on, with a warning. A run
    with another identity and no complete checkpoint has nothing to lose, and is removed.

    Raises:
        ValueError: the run has a checkpoint and another identity; the message names the fields that differ.
    """
    path = run / dump_files.RUN_IDENTITY
    theirs = begun_identity(run) if path.exists() else None
    known = {} if theirs is None else {key: value for key, value in theirs.items() if key != train_on.TRAINED_ON}
    if theirs is not None and (differences := identity_differences(known, identity)):
        if steps := checkpoint_steps(run):
            trained_on = train_on.replanned(theirs, identity, steps, change)
            beside_schedule = train_on.differences_beside_schedule(theirs, identity)
            if trained_on is None:
                raise ValueError(
                    f"{run} holds checkpoints of another run ({'; '.join(differences)}). Give a new student.path"
                    f"{train_on.way_on(beside_schedule, identity, steps[-1])}, or delete that folder to start over."
                )
            what = "train.change" if beside_schedule else "another schedule"
            log.warning(
                f"{run}: continuing from step {steps[-1]} with {what} ({train_on.in_short(differences)}); it applies "
                "to all further steps"
            )
            write_json(path, trained_on)
            return
        theirs = None
    if theirs is None:
        is_kept = is_made(run / "start", of_start(identity.get("student", {})))
        for name in (*(() if is_kept else ("start",)), "start.partial", "checkpoints", "tensorboard"):
            shutil.rmtree(run / name, ignore_errors=True)
        for name in ("metrics.jsonl", "wandb_id", "mlflow_id"):
            (run / name).unlink(missing_ok=True)
        write_json(path, identity)


def begun_identity(run: Path, *needed: str) -> dict[str, Any]:
    """Read the identity that this folder's run began with. Raises ValueError, naming the file, if it is damaged."""
    return read_json(run / dump_files.RUN_IDENTITY, *needed, remedy=REMEDY)


def tokenizer_sha256(run: Path) -> str:
    """Return the `ByteTokenizer.sha256` of the tokenizer that the run began with."""
    return str(begun_identity(run, "student")["student"]["tokenizer_sha256"])


def data_order(run: Path) -> int:
    """Return the version of the order in which the run reads its documents.

    That of its checkpoints, if this release still supports it; else the current one.
    """
    path = run / dump_files.RUN_IDENTITY
    if not path.exists() or not checkpoint_steps(run):
        return order.VERSION
    begun = begun_identity(run).get("data_order")
    return begun if begun in order.READ else order.VERSION


def adapters_by_peft(run: Path) -> bool:
    """Tell whether the run's checkpoints have the adapters of earlier releases (see `stage2_student.model.lora`)."""
    path = run / dump_files.RUN_IDENTITY
    begun = path.exists() and checkpoint_steps(run)
    return bool(begun) and "adapters" not in begun_identity(run)


def begun_schedule(run: Path) -> dict[str, Any]:
    """Return the values that a run with a checkpoint keeps unless the recipe sets them (`schedule.KEPT`).

    Empty for a run without a checkpoint.
    """
    path = run / dump_files.RUN_IDENTITY
    if not path.exists() or not checkpoint_steps(run):
        return {}
    return schedule.begun(begun_identity(run), schedule.KEPT)


def was_passed(run: Path, step: int) -> bool:
    """Tell whether the run once ended at this step, and was then trained on."""
    identity = begun_identity(run)
    return step in [time["from_step"] for time in identity.get(train_on.TRAINED_ON, [])]


def has_other_data(run: Path, step: int) -> bool:
    """Tell whether the run was trained on with another dump after its checkpoint of this step was made."""
    return train_on.has_other_data(begun_identity(run), step)
