"""A recipe with the values that its run was begun with, where these decide what the run is and the recipe is silent."""

from pathlib import Path
from typing import Any

from pipeline.config import Recipe, TransferConfig, student_config
from pipeline.config.identity import added_defaults
from stage2_student.runs import folder, schedule
from stage2_student.runs.checkpoints import checkpoint_steps


def as_begun(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe, completed with the schedule, dtype and start of the run in its folder, and remarks.

    Values that the recipe sets itself are kept.

    Raises:
        ValueError: the warm-up is longer than all steps, and the run did not begin with it.
    """
    run = Path(student_config(recipe).path)
    recipe, remarks = schedule.continued(recipe, folder.begun_schedule(run))
    student = student_config(recipe)
    kept = {
        key: value
        for key, value in _begun_transfer(run).items()
        if key not in student.transfer.model_fields_set and value != getattr(student.transfer, key)
    }
    transfer = student.transfer.model_copy(update=kept)
    remarks += [f"student.transfer.{key} is {value}, as the run began" for key, value in kept.items()]
    return recipe.with_values(student=student.model_copy(update={"transfer": transfer})), remarks


def _begun_transfer(run: Path) -> dict[str, Any]:
    """Return how the start of a run with a checkpoint was made; empty for one without.

    Earlier releases had one way, and their identities do not name it.
    """
    if not checkpoint_steps(run):
        return {}
    begun = folder.begun_identity(run, "student")["student"].get("transfer", {})
    return {**added_defaults(TransferConfig), **begun}
