"""Text that evaluated models write: a recipe for each, and the table of how they segment it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import PromptsConfig, Recipe, TeacherConfig, generate_config
from pipeline.config.engines import ENGINES
from pipeline.config.evaluated import EvaluatedModel
from pipeline.evaluation.python_functions import Parsed, write_prompts
from schemas.storage.atomic import make_folder

_PROMPTS = "prompts.jsonl"
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


def with_functions(recipe: Recipe, folder: Path, number: int) -> tuple[Recipe, Path]:
    """Return the recipe with functions of Python's standard library as prompts, and a folder of its own for them."""
    folder = folder / f"python-{sys.version_info.major}.{sys.version_info.minor}-{number}"
    make_folder(folder)
    write_prompts(folder / _PROMPTS, number)
    prompts = PromptsConfig(source=str(folder / _PROMPTS), id_field="id")
    return recipe.with_values(generate=generate_config(recipe).model_copy(update={"prompts": prompts})), folder


def print_written(summaries: Mapping[str, Mapping[str, Any]], parsed: Mapping[str, Parsed]) -> None:
    """Print for each model which of the tokens that it wrote are its tokenizer's own, by kind, in percent.

    Beside them: its tokens and texts, how many of the texts it ended by itself, and how many parse.

    Args:
        parsed: by model, how many of its completions parse; empty if they are not code.
    """
    table = Table(title="Written tokens that are the tokenizer's own encoding of the text, %")
    table.add_column("model", no_wrap=True)
    for name in ("all", *_KINDS, "tokens", "texts", "ended, %", *(("parse, %",) if parsed else ())):
        table.add_column(name, justify="right")
    for name, summary in summaries.items():
        counts = summary["segmentation"]
        sums = [sum(of_kind[index] for of_kind in counts.values()) for index in (0, 1)]
        shares = [_percent(*sums), *(_percent(*counts.get(kind, (0, 0))) for kind in _KINDS)]
        ended = _percent(summary["ended"], summary["kept"])
        functions = [_percent(*parsed[name])] if parsed else []
        table.add_row(name, *shares, f"{sums[1]:,}", f"{summary['kept']:,}", ended, *functions)
    Console().print(table)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"
