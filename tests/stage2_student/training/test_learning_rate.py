"""The learning rate by step."""

import pytest

from pipeline.config import TrainConfig
from stage2_student.training.learning_rate import learning_rate


def rates(**train: float) -> list[float]:
    config = TrainConfig.model_validate({"lr": 1.0, **train})
    return [learning_rate(step, config) for step in range(config.steps)]


def test_the_rate_rises_to_the_full_one_at_the_end_of_the_warm_up_and_falls_to_its_share_at_the_last_step() -> None:
    found = rates(steps=9, warmup_steps=4, min_lr_ratio=0.2)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    # A half circle's heights at 0, 45, 90, 135 and 180 degrees.
    heights = [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]
    assert found[4:] == pytest.approx([0.2 + 0.8 * height for height in heights])


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates(steps=1, warmup_steps=0, min_lr_ratio=0.1) == [1.0]
    assert rates(steps=3, warmup_steps=0, min_lr_ratio=0.0) == pytest.approx([1.0, 0.5, 0.0])


def test_a_warm_up_as_long_as_the_run_ends_at_the_full_rate() -> None:
    assert rates(steps=2, warmup_steps=2, min_lr_ratio=0.5) == [0.5, 1.0]
