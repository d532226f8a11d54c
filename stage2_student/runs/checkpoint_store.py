"""Copies of a run's checkpoints in a store (`train.checkpoints`), from which an empty folder resumes.

    identity.json, metrics.jsonl, samples.jsonl   of the run's folder, as of the newest checkpoint
    step-000020/...                               the checkpoint's files
    step-000020/complete.json                     written last and removed first: without it there is no checkpoint

A copy is made in the background while training goes on, and the next checkpoint waits for it. Retention is that of the
run's folder.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from pipeline.config import Recipe, student_config
from pipeline.runtime import log
from schemas import dump_files
from schemas.manifest import read_json, write_json
from schemas.storage.atomic import remove, sync_tree
from schemas.storage.copies import copy_from, copy_to
from schemas.storage.locations import Location, location, names, names_below
from stage2_student.runs.checkpoint_files import find_damage
from stage2_student.runs.checkpoints import checkpoint_name, checkpoint_steps, commit_fetched, step_of
from stage2_student.runs.folder import begun_identity
from stage2_student.runs.retention import best_step

COMPLETE, BEST = "complete.json", "best.json"
_BESIDE = (dump_files.RUN_IDENTITY, "metrics.jsonl", "samples.jsonl")  # in the run's folder


class CheckpointCopies:
    """The copies that a run makes of its checkpoints; leaving the context waits for the last of them.

    Args:
        address: of the folder in the store; None: no copies are made.
    """

    def __init__(self, run: Path, address: str | None, keep_last: int) -> None:
        self._run, self._keep_last = run, keep_last
        self._folder = None if address is None else location(address)
        self._pool = ThreadPoolExecutor(1, "checkpoint copy")
        self._copying: Future[None] | None = None

    def add(self, step: int) -> None:
        """Begin to copy a complete checkpoint, once the copy before it is complete.

        Raises OSError if that one could not be made. The run's own checkpoints are complete all the same.
        """
        if self._folder is None:
            return
        self.wait()
        self._copying = self._pool.submit(_copy, self._run, step, self._folder, self._keep_last)

    def wait(self) -> None:
        """Wait for the copy that is being made, if any. Raises OSError if it could not be made."""
        if self._copying is not None:
            copying, self._copying = self._copying, None
            copying.result()

    def __enter__(self) -> "CheckpointCopies":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _copy(run: Path, step: int, folder: Location, keep_last: int) -> None:
    """Copy a checkpoint, then remove the copies that are not to be kept, and what interrupted copies have left."""
    name = checkpoint_name(step)
    local = run / "checkpoints" / name
    if COMPLETE in names(folder / name):  # of this step, before a resume
        remove(folder / name / COMPLETE)
    sizes = {path.name: path.stat().st_size for path in sorted(local.iterdir())}
    for file in sizes:
        copy_to(local / file, folder / name / file)
    for file in _BESIDE:
        if (run / file).exists():
            copy_to(run / file, folder / file)
    write_json(folder / name / COMPLETE, {"files": sizes})
    best = best_step(run)
    if best is not None:
        write_json(folder / BEST, {"step": best})
    steps = stored_steps(folder)
    kept = {best, step, *(steps[-keep_last:] if keep_last else steps)} & set(steps)
    _remove_copies(folder, lambda of: of not in kept)


def _remove_copies(folder: Location, is_removed: Callable[[int], bool]) -> None:
    found = sorted(names_below(folder), key=lambda name: not name.endswith(f"/{COMPLETE}"))
    for name in found:
        step = step_of(name.partition("/")[0])
        if step is not None and is_removed(step):
            remove(folder / name)


def stored_steps(folder: Location) -> list[int]:
    """Return the steps of the complete checkpoints in a store, ascending."""
    names = [name.rpartition("/") for name in names_below(folder)]
    found = [step_of(inner) for inner, _, file in names if file == COMPLETE]
    return sorted(step for step in found if step is not None)


def fetch(recipe: Recipe) -> str | None:
    """Fetch the newest sound checkpoint of a recipe's store, if the run's folder has none as new, and the best one.

    Returns a remark, or None if nothing was fetched.

    Raises:
        ValueError: the folder holds checkpoints of another run than the store does, or all copies are damaged.
        OSError: the store cannot be read.
    """
    run, address = Path(student_config(recipe).path), recipe.train.checkpoints
    if address is None:
        return None
    folder = location(address)
    stored, own = stored_steps(folder), checkpoint_steps(run)
    if not stored or (own and own[-1] >= stored[-1]):
        return None
    theirs = read_json(folder / dump_files.RUN_IDENTITY, remedy="Give another train.checkpoints")
    if own and theirs != begun_identity(run):
        raise ValueError(
            f"{run} holds checkpoints of another run than {address} (train.checkpoints), where there is a newer one, "
            f"step {stored[-1]}: give another train.checkpoints, or another student.path"
        )
    damaged = []
    for step in reversed([step for step in stored if not own or step > own[-1]]):
        cause = _fetch_step(folder, run, step)
        if cause is None:
            break
        damaged.append(f"{checkpoint_name(step)} ({cause})")
        log.warning(f"{folder / checkpoint_name(step)} cannot be loaded ({cause}); going back to the one before it")
    else:
        if own:
            return None
        raise ValueError(f"{address} holds no checkpoint that can be loaded: {', '.join(damaged)}")
    if (best := _best(folder)) in stored and best != step and best not in own:
        assert best is not None
        _fetch_step(folder, run, best)
    for file in _BESIDE:
        if file in names(folder):
            copy_from(folder / file, run / file)
    return f"fetched {checkpoint_name(step)} from {address}"


def _fetch_step(folder: Location, run: Path, step: int) -> str | None:
    """Copy a checkpoint into the run's folder; returns why it cannot be used, or None."""
    name = checkpoint_name(step)
    partial = run / "checkpoints" / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    listed = read_json(folder / name / COMPLETE, "files", remedy="Delete that checkpoint's objects")
    for file in listed["files"]:
        copy_from(folder / name / file, partial / file)
    cause = find_damage(partial)
    if cause is not None:
        shutil.rmtree(partial)
        return cause
    sync_tree(partial)
    commit_fetched(run, partial.name, step)
    return None


def _best(folder: Location) -> int | None:
    if BEST not in names(folder):
        return None
    return int(read_json(folder / BEST, "step", remedy="Delete it")["step"])
