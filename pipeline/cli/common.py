"""What commands share: how a recipe, a dump and their options are given."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config import Recipe

RECIPE_SUFFIXES = (".yaml", ".yml")
_PACKAGED = Path(__file__).resolve().parents[1] / "recipes"

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or the name of one in pipeline/recipes.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--override",
        metavar="SECTION.KEY=VALUE",
        help="Replace one value of the recipe, or those of a YAML file; repeatable.",
    ),
]
DumpArgument = Annotated[
    str, typer.Argument(metavar="DUMP", help="Folder of a dump, or its address (s3://, gs:// or hf://).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe and print what would be done; load no weights.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def load(recipe: str, overrides: list[str] | None) -> "Recipe":
    """The recipe of a command line."""
    from pipeline.config.loading import load_recipe

    return load_recipe(recipe, overrides or [])


def is_recipe(target: str) -> bool:
    """Whether a command's target is a recipe: a YAML file, or the name of one that comes with the package."""
    named = _PACKAGED / f"{target}.yaml"
    return target.endswith(RECIPE_SUFFIXES) or ("/" not in target and not Path(target).exists() and named.exists())
