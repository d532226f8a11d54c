"""Text that evaluated models write: a recipe for each, and the table of how they segment it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Recipe, TeacherConfig, generate_config
from pipeline.config.engines import ENGINES
from pipeline.config.evaluated import EvaluatedModel

_KINDS = ("white space", "words", "digits", "other")


def writing_recipe(recipe: Recipe, model: EvaluatedModel, folder: Path) -> Recipe:
    """Return the recipe by which a model writes on the recipe's prompts, into a folder named after it.

    Raises ValueError if the recipe has no generate section.
    """
    config, teacher = generate_config(recipe), recipe.teacher
    local = teacher.engine in ENGINES and not teacher.engine_spec.served
    section = teacher
    if model.name != "teacher" or not local:
        source, end = model.source, model.end
        kept = {key: getattr(teacher, key) for key in ("dtype", "head_dtype") if key in teacher.model_fields_set}
        section = TeacherConfig(
            model=source.source,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            engine=config.engine or (teacher.engine if local else "transformers"),
            start=model.start,
            end=(end,) if isinstance(end, str) else end or (),
            **kept,
        )
    writing = config.model_copy(update={"path": str(folder / model.name), "writer": "teacher"})
    return recipe.with_values(teacher=section, generate=writing)


def print_written(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Print for each model which of the tokens that it wrote are its tokenizer's own, by kind, in percent."""
    table = Table(title="Written tokens that are the tokenizer's own encoding of the text, %")
    for name in ("model", "all", *_KINDS, "tokens", "completions", "ended by itself, %"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, summary in summaries.items():
        counts = summary["segmentation"]
        sums = [sum(of_kind[index] for of_kind in counts.values()) for index in (0, 1)]
        shares = [_percent(*sums), *(_percent(*counts.get(kind, (0, 0))) for kind in _KINDS)]
        ended = _percent(summary["ended"], summary["kept"])
        table.add_row(name, *shares, f"{sums[1]:,}", f"{summary['kept']:,}", ended)
    Console().print(table)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"
