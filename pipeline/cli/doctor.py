"""`bld doctor`: a check of this machine."""

from typing import Annotated

import typer

from pipeline.cli.options import AsJson


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also import torch, vLLM and DeepSpeed, each in its own process.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Check whether this machine is ready: versions, devices, disk, memory, known traps."""
    from pipeline.setup.doctor import diagnose

    if not diagnose(deep, json):
        raise typer.Exit(1)
