"""Windows that a recipe does not give are made to fit the teacher; what it does give is checked as it is."""

from pipeline.config import Recipe, TeacherConfig
from pipeline.config.teacher import MOST_OVERLAP
from pipeline.runtime import log
from pipeline.runtime.huggingface import check_positions, load_config, max_positions
from schemas import dump_files
from schemas.manifest import Manifest
from schemas.storage.locations import location
from stage1_teacher.engines.registry import longest_window


def with_fitting_windows(recipe: Recipe, model: str) -> Recipe:
    """The recipe with windows that the teacher has positions for. Says in a line what it has changed.

    Args:
        model: the teacher's, resolved.
    Raises:
        ValueError: a `teacher.max_tokens` that the recipe gives is more than the model has.
    """
    teacher = recipe.teacher
    if teacher.engine_spec.served:
        if _is_given(teacher, "max_tokens"):
            return _fitted(recipe, None, "")
        # Where a server is started anew with another length, the dump goes on with the windows that it has.
        if (begun := _begun_with(recipe)) is not None:
            return _fitted(recipe, begun, f"{recipe.dump.path} was begun with {begun}")
        most = longest_window(teacher, recipe.placement)
        return _fitted(recipe, most, f"the server takes {most}")
    # An engine would say so in its own words, and minutes later.
    config = load_config(teacher.source.at(model))
    if _is_given(teacher, "max_tokens"):
        check_positions(config, teacher.max_tokens, "teacher.max_tokens")
    most = max_positions(config)
    return _fitted(recipe, most, f"the model has {most} positions")


def _begun_with(recipe: Recipe) -> int | None:
    """The longest window of the dump in the recipe's folder; None where there is none."""
    dump = location(recipe.dump.path)
    if not (dump / dump_files.MANIFEST).exists():
        return None
    begun: int | None = Manifest.load(dump).identity.get("teacher", {}).get("max_tokens")
    return begun


def _is_given(teacher: TeacherConfig, key: str) -> bool:
    return key in teacher.model_fields_set


def _fitted(recipe: Recipe, most: int | None, why: str) -> Recipe:
    """Raises ValueError where an overlap that the recipe gives does not fit."""
    teacher = recipe.teacher
    if most is not None and most < teacher.max_tokens and not _is_given(teacher, "max_tokens"):
        given = {key: getattr(teacher, key) for key in teacher.model_fields_set}
        teacher = type(teacher)(**given | {"max_tokens": most})
        log.info(f"teacher.max_tokens is {most}, as {why}; teacher.overlap_tokens is {teacher.overlap_tokens}")
    elif teacher.overlap_tokens < MOST_OVERLAP and not _is_given(teacher, "overlap_tokens"):
        log.info(f"teacher.overlap_tokens is {teacher.overlap_tokens}, half of teacher.max_tokens")
    return recipe.with_values(teacher=teacher)
