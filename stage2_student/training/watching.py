"""Watching a student while it is trained: its evaluation on held-out text, samples, the average of its weights."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stage2_student.runs.retention import Evaluation
from stage2_student.training.held_out import HeldOut
from stage2_student.training.samples import Samples
from stage2_student.training.step import Ranks
from stage2_student.training.weight_average import WeightAverage


class Watched(NamedTuple):
    """The watches of a run; None where the recipe asks for none."""

    held: HeldOut | None = None
    samples: Samples | None = None
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
