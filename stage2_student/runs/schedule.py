"""A run's schedule: the keys that may change at a resume, because they affect only the steps still to come.

The learning rate of a step follows from `train.steps`, `train.warmup_steps` and `train.min_lr_ratio`. A run resumed
with other values of these is *trained on* (`stage2_student.runs.train_on`): it continues from its newest checkpoint
under the new schedule.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Recipe, TrainConfig
from pipeline.config.identity import added_defaults
from pipeline.config.train import DEFAULT_WARMUP_STEPS

KEYS = ("steps", "warmup_steps", "min_lr_ratio")
# Defaults depend on other keys, the machine or the release: a resumed run keeps the values it began with.
KEPT = (*KEYS, "dtype", "decay")


def continued(recipe: Recipe, begun: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe, completed with what the existing run keeps, and remarks for the user.

    Values that the recipe sets itself are kept.

    Args:
        begun: the values (`KEPT`), by key, of a run that has a checkpoint; empty for a new one.
    Raises:
        ValueError: the warm-up is longer than all steps, and the run did not begin with it.
    """
    train = recipe.train
    set_keys = train.model_fields_set
    kept = {k: begun[k] for k in KEPT if k in begun and k not in set_keys and begun[k] != getattr(train, k)}
    train = train.model_copy(update=kept)
    if train.warmup_steps > train.steps and begun.get("warmup_steps") != train.warmup_steps:
        raise ValueError(
            f"train.warmup_steps is {train.warmup_steps}, and train.steps {train.steps}: the learning rate would never "
            f"reach train.lr. Give train.warmup_steps={train.steps // 2} or less, or more steps"
        )
    remarks = [f"train.{key} is {value}, as the run began" for key, value in kept.items()]
    if not begun and "warmup_steps" not in set_keys and train.warmup_steps < DEFAULT_WARMUP_STEPS:
        remarks.append(
            f"train.warmup_steps is {train.warmup_steps}, half of the {train.steps} steps; "
            f"the default is {DEFAULT_WARMUP_STEPS}"
        )
    return recipe.with_values(train=train), remarks


def begun(identity: Mapping[str, Any], keys: Sequence[str] = KEYS) -> dict[str, Any]:
    """Return the schedule in a run's identity, or other keys of its train section."""
    values = {**added_defaults(TrainConfig), **identity["train"]}
    return {key: values[key] for key in keys if key in values}
