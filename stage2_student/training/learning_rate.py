"""The learning rate of each step: a warm-up, then a cosine."""

import math

from pipeline.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    Linear warm-up, then a cosine down to `lr * min_lr_ratio` at the last step.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * cosine)
