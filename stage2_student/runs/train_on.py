"""Changes that a begun run may take up when it is trained on: each named in `train.change`, and recorded.

The run continues from its newest checkpoint, with its weights and its optimizer's state; the completed steps stay as
they are. `identity.json` holds an entry for each change under `trained_on`: the step, the schedule before it, and the
fields that changed.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.config import Objectives
from pipeline.config.identity import identity_differences
from stage2_student.runs.schedule import begun

TRAINED_ON = "trained_on"
_FEW = 6  # fields of a dump that differ and are shown
CHANGED = "changed"
_DATA = ("dump.", "other_dumps.", "mix.", "corpora.")
# By the name in `train.change`: what the fields of an identity begin with that it lets change.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "dump": _DATA,
    "objectives": (
        *("train.objectives.", "train.kl_", "train.alm_", "train.token_", "train.cdm_", "train.balance:", "own_code."),
        *("student.max_doubt:", "student.max_token_end:", "student.max_dropped:"),
    ),
    "lr": ("train.lr:",),
    "batch_tokens": ("train.batch_tokens:",),
}


def replanned(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], steps_done: Sequence[int], change: Collection[str] = ()
) -> dict[str, Any] | None:
    """Return the identity of a run that is trained on: ours, with its history; None if more differs than may change.

    Args:
        theirs: the identity that the run has.
        steps_done: the steps of its checkpoints, ascending.
        change: names of what may differ besides the schedule (`train.change`).
    Raises:
        ValueError: the run has a checkpoint beyond the new `train.steps`, or has done them all and has no steps left to
            take with what changed; or the objectives need weights of the interface that its checkpoints do not hold.
    """
    before = begun(theirs)
    differences = differences_beside_schedule(theirs, ours)
    if any(name_of(difference, ours) not in change for difference in differences):
        return None
    newest, num_steps = steps_done[-1], ours["train"]["steps"]
    if num_steps < newest:
        raise ValueError(
            f"the run has a checkpoint of step {newest}, and train.steps is {num_steps}: give {newest} or more, or "
            f"export an earlier checkpoint (`bld export RUN --step N`; there are {list(steps_done)})"
        )
    if differences and num_steps == newest:
        raise ValueError(
            f"the run has done its {newest} steps, and none is left to take with {'; '.join(differences)}: give more "
            f"train.steps than {newest}"
        )
    _check_interface(theirs, ours)
    entry = {"from_step": newest, **before, **({CHANGED: differences} if differences else {})}
    return {**ours, TRAINED_ON: [*theirs.get(TRAINED_ON, []), entry]}


def differences_beside_schedule(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return `field: theirs there, ours here` for each field that differs, except for the schedule's."""
    known = {key: value for key, value in theirs.items() if key != TRAINED_ON}
    return identity_differences(known, {**ours, "train": {**ours["train"], **begun(theirs)}})


def name_of(difference: str, ours: Mapping[str, Any]) -> str | None:
    """Return the name in `train.change` that lets this field differ; None if none does."""
    if difference.startswith(f"own_code.{ours['student']['interface']}:"):
        return None
    return next((name for name, starts in _FIELDS.items() if difference.startswith(starts)), None)


def in_short(differences: Sequence[str]) -> str:
    """Return differences as text; a dump that differs in many fields is named once.

    identity.json keeps each field.
    """
    groups: dict[str, list[str]] = {}
    for difference in differences:
        field = difference.partition(": ")[0]
        dump = re.match(r"(?:.*\.)?(?:dump|other_dumps\.[^.]+)(?=\.)", field)
        groups.setdefault(dump[0] if dump else field, []).append(difference)
    return "; ".join(
        f"{name}: another dump, or none ({len(own)} fields)" if len(own) > _FEW else "; ".join(own)
        for name, own in groups.items()
    )


def way_on(differences: Sequence[str], ours: Mapping[str, Any], newest: int) -> str:
    """Return the override that would train the run on with these differences; empty if some of them cannot change."""
    names = [name_of(difference, ours) for difference in differences]
    if not names or None in names:
        return ""
    listed = ",".join(name for name in _FIELDS if name in names)
    return f", -o train.change=[{listed}] to train this run on from step {newest} with what differs"


def has_other_data(identity: Mapping[str, Any], step: int) -> bool:
    """Tell whether the run's data changed after the checkpoint of this step was made.

    The checkpoint's position is then one in other data.
    """
    return any(entry["from_step"] >= step and _is_of_data(entry) for entry in identity.get(TRAINED_ON, []))


def data_since(identity: Mapping[str, Any]) -> int:
    """Return the step at which the run took up the data that it has now; 0 if it began with it."""
    changes = [entry for entry in identity.get(TRAINED_ON, []) if _is_of_data(entry)]
    return int(changes[-1]["from_step"]) if changes else 0


def _is_of_data(entry: Mapping[str, Any]) -> bool:
    return any(field.startswith(_DATA) for field in entry.get(CHANGED, ()))


def _check_interface(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    name = ours["student"]["interface"]
    needed = [Objectives.model_validate(one["train"]["objectives"]).uses_bytes for one in (theirs, ours)]
    if needed[0] != needed[1] and name != "token_marginal":
        with_, without = ("the new objectives", "the run's checkpoints") if needed[1] else ("the run", "the new ones")
        raise ValueError(
            f"train.objectives: {with_} have weights of student.interface {name}, {without} do not: give objectives "
            "that need the interface as the run's do, or a new student.path"
        )
