"""Selection and loading of the checkpoint that a run resumes from, by any number of ranks."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.runtime import log
from pipeline.runtime.format import are, count_of
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.distributed.rank_messages import Channel
from stage2_student.runs.checkpoint_files import Inventory, find_damage
from stage2_student.runs.checkpoints import checkpoint_name, checkpoint_steps, set_aside


class Checkpoint(NamedTuple):
    """A sound checkpoint: its step, and the number of ranks that wrote it."""

    step: int
    world: int

    @property
    def name(self) -> str:
        return checkpoint_name(self.step)


def newest_sound(run: Path, channel: Channel) -> Checkpoint | None:
    """Return the newest checkpoint whose files are complete and unaltered; None if there is no checkpoint.

    It is the same on all ranks, which share the reading. Newer, damaged checkpoints are set aside, with the cause in a
    warning. Raises ValueError if there are checkpoints and all of them are damaged.
    """
    folder, rank = run / "checkpoints", channel.rank
    damaged: dict[int, str] = {}
    for step in reversed(channel.gather(checkpoint_steps(run) if rank == 0 else None)[0]):
        causes = channel.gather(find_damage(folder / checkpoint_name(step), rank, channel.world))
        cause = next((cause for cause in causes if cause is not None), None)
        if cause is not None:
            damaged[step] = cause
            continue
        if rank == 0:
            set_aside(run, damaged, step)
        return Checkpoint(step, Inventory.load(folder / checkpoint_name(step)).world)
    if damaged:
        causes = [f"{checkpoint_name(step)} ({cause})" for step, cause in damaged.items()]
        raise ValueError(
            f"{folder} holds no checkpoint that can be loaded: {', '.join(causes)}. "
            f"Restore one from a copy, or delete {run} to start over"
        )
    return None


def needs_conversion(checkpoint: Checkpoint | None, zero_stage: int, world: int) -> bool:
    """Tell whether the files were written by another number of ranks.

    ZeRO partitions them; without it every rank reads the one file.
    """
    return checkpoint is not None and zero_stage > 0 and checkpoint.world != world


def load(engine: Any, run: Path, checkpoint: Checkpoint, channel: Channel, convert: bool) -> dict[str, Any]:
    """Load a checkpoint into every rank's engine; returns what was stored beside weights and optimizer.

    With `convert` it is first converted to DeepSpeed's universal form, a temporary copy that takes as much disk again.
    """
    folder, tag = run / "checkpoints", checkpoint.name
    if convert:
        tag = f"{checkpoint.name}.universal.partial"
        if channel.rank == 0:
            ranks = f"{are(channel.world)} {count_of(channel.world, 'rank')}"
            log.info(f"{checkpoint.name}: written by a world of {checkpoint.world}, now there {ranks}; converting it")
            shutil.rmtree(folder / tag, ignore_errors=True)
            ds.convert_to_universal(folder / checkpoint.name, folder / tag)
        channel.gather()
    values = ds.load(engine, folder, tag)
    channel.gather()  # all have read
    if convert and channel.rank == 0:
        shutil.rmtree(folder / tag)
    return values
