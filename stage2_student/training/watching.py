"""Watching a student while it is trained: its evaluation on held-out text, samples, the average of its weights."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stage2_student.evaluation.watched_tasks import WatchedTasks
from stage2_student.runs.retention import Evaluation
from stage2_student.training.held_out import HeldOut
from stage2_student.training.samples import Samples
from stage2_student.training.step import Ranks
from stage2_student.training.weight_average import WeightAverage


class Watched(NamedTuple):
    """The watches of a run; None where the recipe asks for none."""

    held: HeldOut | None = None
    samples: Samples | None = None
    tasks: WatchedTasks | None = None  # on rank 0
    average: WeightAverage | None = None

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Put the average of the weights in place, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def evaluation(self, engine: Any, device: torch.device) -> Evaluation:
        """Evaluate the student, or its average, on every rank."""
        assert self.held is not None
        with self.averaged():
            return self.held.measure(engine, device)

    def write_samples(self, engine: Any, step: int, run: Path, ranks: Ranks) -> None:
        """Write the samples on rank 0, for which the others wait."""
        if ranks.rank == 0 and self.samples is not None:
            with self.averaged():
                self.samples.write(engine.module, step, run)
        ranks.channel.gather()

    def task_figures(self, engine: Any, step: int, ranks: Ranks) -> dict[str, float]:
        """Ask the tasks on rank 0, for which the others wait; returns its figures there."""
        figures: dict[str, float] = {}
        if ranks.rank == 0 and self.tasks is not None:
            with self.averaged():
                figures = self.tasks.figures(engine.module, step)
        ranks.channel.gather()
        return figures
