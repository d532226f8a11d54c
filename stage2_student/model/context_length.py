"""How much the student reads at once, where the recipe does not say: what its model has positions for."""

from pipeline.config import Recipe, student_config
from pipeline.config.train import DEFAULT_MAX_TOKENS
from pipeline.runtime.huggingface import load_config, max_positions
from pipeline.sources.resolve import resolve_model


def sized(recipe: Recipe) -> tuple[Recipe, str | None]:
    """The recipe with a `train.max_tokens`, and a remark where it is not the usual default. What the recipe gives
    stays, and is checked later.
    """
    if recipe.train.max_tokens is not None:
        return recipe, None
    student = student_config(recipe)
    config = load_config(resolve_model(student.source))
    positions = max_positions(config)
    found = DEFAULT_MAX_TOKENS if positions is None else min(DEFAULT_MAX_TOKENS, positions)
    remark = None
    if found < DEFAULT_MAX_TOKENS:
        remark = f"train.max_tokens is {found}: the student has no more positions (the default is {DEFAULT_MAX_TOKENS})"
    train = recipe.train.model_copy(update={"max_tokens": found})
    return recipe.model_copy(update={"train": train}), remark
