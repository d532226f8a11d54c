"""An exponential moving average of the weights, beside the weights that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stage2_student.runs.checkpoint_files import AVERAGE


class WeightAverage:
    """The average of a model's trained weights, float32, on their device.

    A step's share of the average is `1 - decay`, or more in the first steps: the decay of step `t` (from 1) is at most
    `(1 + t) / (10 + t)`, so that the start is soon forgotten.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.decay = decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._means = {name: weight.detach().float().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimizer step `step` into the average."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, weight in self._weights.items():
            self._means[name].lerp_(weight.detach().float(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the model's place; on leaving, the trained weights are back to the bit."""
        trained = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self._means[name].to(weight.dtype)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = trained[name]

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint that is not complete yet."""
        torch.save({name: mean.cpu() for name, mean in self._means.items()}, checkpoint / AVERAGE)

    def load(self, checkpoint: Path) -> None:
        """Read the average of a complete checkpoint."""
        for name, mean in torch.load(checkpoint / AVERAGE, map_location="cpu", weights_only=True).items():
            self._means[name].copy_(mean)
