"""`bld plan`: what a recipe would take, before it takes it."""

from pipeline.cli.common import Overrides, RecipeArgument, load


def show_plan(recipe: RecipeArgument, override: Overrides = None) -> None:
    """Check a recipe and print what it would fetch, make and write; needs no network and loads no weights."""
    from pipeline.plan import print_plan

    print_plan(load(recipe, override))
