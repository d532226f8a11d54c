"""Window lengths: those the recipe leaves open are fitted to the teacher, and those it gives are checked."""

from pipeline.config import Recipe, TeacherConfig
from pipeline.config.teacher import MAX_DEFAULT_OVERLAP, MIN_WINDOW
from pipeline.runtime import log
from pipeline.runtime.huggingface import check_positions, load_config, max_positions
from schemas import dump_files
from schemas.manifest import Manifest
from schemas.storage.locations import location
from stage1_teacher.engines.registry import longest_window


def with_fitting_windows(recipe: Recipe, model: str) -> Recipe:
    """Return the recipe with windows that fit the teacher's positions, and log each change in a line.

    Args:
        model: the teacher's model, resolved.
    Raises:
        ValueError: the recipe's `teacher.max_tokens` exceeds the model's positions.
    """
    teacher = recipe.teacher
    if teacher.engine_spec.served:
        if _is_given(teacher, "max_tokens"):
            return _fitted(recipe, None, "")
        # If the server was restarted with another length, the dump continues with the windows that it has.
        if (begun := _begun_with(recipe)) is not None:
            return _fitted(recipe, begun, f"{recipe.dump.path} was begun with {begun}")
        limit = longest_window(teacher, recipe.placement)
        return _fitted(recipe, limit, f"the server accepts {limit}")
    # An engine would fail too, but minutes later and in its own words.
    config = load_config(teacher.source.at(model))
    if _is_given(teacher, "max_tokens"):
        check_positions(config, teacher.max_tokens, "teacher.max_tokens")
    limit = max_positions(config)
    return _fitted(recipe, limit, f"the model has {limit} positions")


def _begun_with(recipe: Recipe) -> int | None:
    """Return the maximum window length of the dump in the recipe's folder; None if there is no dump."""
    dump = location(recipe.dump.path)
    if not (dump / dump_files.MANIFEST).exists():
        return None
    begun: int | None = Manifest.load(dump).identity.get("teacher", {}).get("max_tokens")
    return begun


def _is_given(teacher: TeacherConfig, key: str) -> bool:
    return key in teacher.model_fields_set


def _fitted(recipe: Recipe, limit: int | None, why: str) -> Recipe:
    """Return the recipe with windows of at most `limit` tokens. Raises ValueError if the recipe's overlap does not fit.

    Args:
        limit: tokens; None: unlimited.
        why: the reason for the limit, for the log.
    """
    teacher = recipe.teacher
    if limit is not None and limit < MIN_WINDOW:
        raise ValueError(f"{teacher.model}: {why}; a window takes at least {MIN_WINDOW} tokens (teacher.max_tokens)")
    if limit is not None and limit < teacher.max_tokens and not _is_given(teacher, "max_tokens"):
        given = {key: getattr(teacher, key) for key in teacher.model_fields_set}
        teacher = type(teacher)(**given | {"max_tokens": limit})
        log.info(f"teacher.max_tokens is {limit}, as {why}; teacher.overlap_tokens is {teacher.overlap_tokens}")
    elif teacher.overlap_tokens < MAX_DEFAULT_OVERLAP and not _is_given(teacher, "overlap_tokens"):
        log.info(f"teacher.overlap_tokens is {teacher.overlap_tokens}, half of teacher.max_tokens")
    return recipe.with_values(teacher=teacher)
