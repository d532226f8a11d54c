"""A run's schedule: the keys that may change at a resume, because they affect only the steps still to come.

The learning rate of a step follows from `train.steps`, `train.warmup_steps` and `train.min_lr_ratio`. A run resumed
with other values of these is *trained on*: it continues from its newest checkpoint under the new schedule.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Recipe
from pipeline.config.identity import identity_differences
from pipeline.config.train import DEFAULT_WARMUP_STEPS

KEYS = ("steps", "warmup_steps", "min_lr_ratio")
KEPT = (*KEYS, "dtype")  # defaults depend on other keys or the machine: a resumed run keeps the values it began with
TRAINED_ON = "trained_on"  # in identity.json: an entry for each change, with its step and the schedule before it


def continued(recipe: Recipe, begun: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe, completed with the schedule and dtype of the existing run, and remarks for the user.

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
    return {key: identity["train"][key] for key in keys if key in identity["train"]}


def replanned(theirs: Mapping[str, Any], ours: Mapping[str, Any], steps_done: Sequence[int]) -> dict[str, Any] | None:
    """Return the identity of a run that is trained on: ours, with its history; None if more than the schedule differs.

    Args:
        theirs: the identity that the run has.
        steps_done: the steps of its checkpoints, ascending.
    Raises:
        ValueError: the run already has a checkpoint beyond the new `train.steps`.
    """
    before = begun(theirs)
    known = {key: value for key, value in theirs.items() if key != TRAINED_ON}
    if identity_differences(known, {**ours, "train": {**ours["train"], **before}}):
        return None
    newest, num_steps = steps_done[-1], ours["train"]["steps"]
    if num_steps < newest:
        raise ValueError(
            f"the run has a checkpoint of step {newest}, and train.steps is {num_steps}: give {newest} or more, or "
            f"export an earlier checkpoint (`bld export RUN --step N`; there are {list(steps_done)})"
        )
    return {**ours, TRAINED_ON: [*theirs.get(TRAINED_ON, []), {"from_step": newest, **before}]}
