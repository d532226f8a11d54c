"""`bld clean` and `bld doctor`: the machine's disk, and whether it is ready."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import AsJson


def clean(
    dumps: Annotated[
        list[Path] | None, typer.Argument(metavar="DUMP...", help="Dumps to look for half-written files in.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Also the cache of downloads and conversions.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed (default: only list it).")] = False,
) -> None:
    """List half-written files and the cache, with sizes; --yes removes them."""
    from pipeline.dumps.clean import clean as clean_up

    if not dumps and not cache:
        raise ValueError("nothing to look at: give DUMP..., or --cache")
    clean_up(dumps or [], cache, yes)


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also import torch, vLLM and DeepSpeed, each in its own process.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Is this machine ready: versions, devices, disk, memory, known traps."""
    from pipeline.setup.doctor import diagnose

    if not diagnose(deep, json):
        raise typer.Exit(1)
