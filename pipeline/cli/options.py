"""Arguments and options shared by commands: a recipe, a dump, and the level and format of messages."""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.runtime import log

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
        help="Override one value of the recipe, or those in a YAML file; repeatable.",
    ),
]
DumpArgument = Annotated[
    str, typer.Argument(metavar="DUMP", help="Folder of a dump, or its address (s3://, gs:// or hf://).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe and print what would be done; load no weights.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print only warnings and errors (BLD_LOG_LEVEL=quiet).")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Print more, including vLLM's own messages (BLD_LOG_LEVEL=verbose).")
]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Messages on stderr as JSON, one object per line (BLD_LOG_FORMAT=json).")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (default: one line).")]


def set_logs(quiet: Quiet = False, verbose: Verbose = False, log_json: LogJson = False, debug: Debug = False) -> None:
    """Set the level and format of messages. `debug` is read in `main`, which catches what commands raise."""
    if quiet and verbose:
        raise ValueError("--quiet and --verbose cannot be combined: give one of them")
    if quiet or verbose:
        log.set_level("quiet" if quiet else "verbose")
    if log_json:
        log.set_format("json")


Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="[HOST:]PORT",
        help="Serve metrics for Prometheus at /metrics; without HOST, on loopback only (BLD_METRICS).",
    ),
]


def ask_for_metrics(address: str | None) -> None:
    """Set the address for this process and the ranks that it starts. Raises ValueError if it is not an address."""
    from pipeline.runtime import metrics

    if address is not None:
        metrics.parse_address(address)
        os.environ[metrics.VARIABLE] = address


def with_logs(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with these options after its own."""
    common = inspect.signature(set_logs).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        set_logs(**{key: values.pop(key) for key in common})
        if not log.is_verbose():
            log.silence_others()
        os.environ[log.COMMAND] = name
        command(**values)

    own = inspect.signature(command)
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in common.values()]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *options])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **set_logs.__annotations__, "return": None}
    return run


def load(recipe: str, overrides: list[str] | None) -> "Recipe":
    """Load the recipe of a command line."""
    from pipeline.config.loading import load_recipe

    return load_recipe(recipe, overrides or [])


def as_begun(recipe: "Recipe") -> "Recipe":
    """Return the recipe with the values that the dump in its folder was begun with. A store is not asked."""
    from stage1_teacher.dump import begun

    return recipe if "://" in recipe.dump.path else begun.as_begun(recipe)


def is_recipe(target: str) -> bool:
    """Return whether a command's target is a recipe: a YAML file, or the name of one in the package."""
    packaged = _PACKAGED / f"{target}.yaml"
    return target.endswith(RECIPE_SUFFIXES) or ("/" not in target and not Path(target).exists() and packaged.exists())
