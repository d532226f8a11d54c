"""The student's context length if the recipe gives none: limited by the model's number of positions."""

from pipeline.config import Recipe, student_config
from pipeline.config.train import DEFAULT_MAX_TOKENS
from pipeline.runtime.huggingface import load_config, max_positions
from pipeline.sources.resolve import resolve_model


def sized(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return the recipe with `train.max_tokens` set, and a remark if it is not the usual default.

    A value in the recipe is kept, and checked later.
    """
    if recipe.train.max_tokens is not None:
        return recipe, None
    student = student_config(recipe)
    config = load_config(resolve_model(student.source))
    positions = max_positions(config)
    max_tokens = DEFAULT_MAX_TOKENS if positions is None else min(DEFAULT_MAX_TOKENS, positions)
    remark = None
    if max_tokens < DEFAULT_MAX_TOKENS:
        remark = (
            f"train.max_tokens is {max_tokens}: the student has no more positions (the default is {DEFAULT_MAX_TOKENS})"
        )
    train = recipe.train.model_copy(update={"max_tokens": max_tokens})
    return recipe.model_copy(update={"train": train}), remark
