"""A run's schedule: what may change when a run goes on, for it decides the steps to come and none that are done.

The rate of a step follows from `train.steps`, `train.warmup_steps` and `train.min_lr_ratio`. A run that goes on with
others of them is trained on: from its newest checkpoint, its steps to come planned anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Recipe
from pipeline.config.identity import identity_differences
from pipeline.config.train import DEFAULT_WARMUP_STEPS

KEYS = ("steps", "warmup_steps", "min_lr_ratio")
KEPT = (*KEYS, "dtype")  # with defaults that hang on other keys, or on the machine: a run goes on in what it began with
TRAINED_ON = "trained_on"  # of identity.json: a line for each time, with the step, and the schedule until there


def continued(recipe: Recipe, begun: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe, its schedule and dtype those of the run in its folder where it does not say others; and what
    to say of it.

    Args:
        begun: those of a run that has a checkpoint, by key (`KEPT`); empty for a new one.
    Raises ValueError for a warm-up longer than all steps, unless the run was begun with it.
    """
    train = recipe.train
    said = train.model_fields_set
    kept = {key: begun[key] for key in KEPT if key in begun and key not in said and begun[key] != getattr(train, key)}
    train = train.model_copy(update=kept)
    if train.warmup_steps > train.steps and begun.get("warmup_steps") != train.warmup_steps:
        raise ValueError(
            f"train.warmup_steps is {train.warmup_steps}, and train.steps {train.steps}: the rate would never reach train.lr. Give "
            f"train.warmup_steps={train.steps // 2} or less, or more steps"
        )
    remarks = [f"train.{key} is {value}, as the run began" for key, value in kept.items()]
    if not begun and "warmup_steps" not in said and train.warmup_steps < DEFAULT_WARMUP_STEPS:
        remarks.append(
            f"train.warmup_steps is {train.warmup_steps}, half of the {train.steps} steps; the default is {DEFAULT_WARMUP_STEPS}"
        )
    return recipe.with_values(train=train), remarks


def begun(identity: Mapping[str, Any], keys: Sequence[str] = KEYS) -> dict[str, Any]:
    """Return the schedule that a run's identity holds, or others of its train section's keys."""
    return {key: identity["train"][key] for key in keys if key in identity["train"]}


def replanned(theirs: Mapping[str, Any], ours: Mapping[str, Any], steps_done: Sequence[int]) -> dict[str, Any] | None:
    """The identity of a run that is trained on: ours, and its history; None where something else differs than the
    schedule.

    Args:
        theirs: the identity that the run has.
        steps_done: of its checkpoints, ascending.
    Raises ValueError where it has gone further than it is now to go.
    """
    before = begun(theirs)
    known = {key: value for key, value in theirs.items() if key != TRAINED_ON}
    if identity_differences(known, {**ours, "train": {**ours["train"], **before}}):
        return None
    newest, wanted = steps_done[-1], ours["train"]["steps"]
    if wanted < newest:
        raise ValueError(
            f"the run has a checkpoint of step {newest}, and train.steps is {wanted}: give {newest} or more, or export an earlier "
            f"checkpoint (`bld export RUN --step N`; there are {list(steps_done)})"
        )
    return {**ours, TRAINED_ON: [*theirs.get(TRAINED_ON, []), {"from_step": newest, **before}]}
