"""Options that every command has, before its name or after: how much is said, and how."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pipeline.runtime import log as logs

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say only what goes wrong (BLD_LOG_LEVEL=quiet).")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more, vLLM's own messages too (BLD_LOG_LEVEL=verbose).")
]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Messages on stderr as JSON, one object a line (BLD_LOG_FORMAT=json).")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (default: one line).")]


def set_logs(quiet: Quiet = False, verbose: Verbose = False, log_json: LogJson = False, debug: Debug = False) -> None:
    """`debug` is read in `main`, which catches what commands raise."""
    if quiet and verbose:
        raise ValueError("--quiet and --verbose do not go together: give one of them")
    if quiet or verbose:
        logs.set_level("quiet" if quiet else "verbose")
    if log_json:
        logs.set_format("json")


Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="[HOST:]PORT",
        help="Serve figures for Prometheus there, at /metrics; without HOST to this machine alone (BLD_METRICS).",
    ),
]


def ask_for_metrics(address: str | None) -> None:
    """Put it where this process, or the rank that it starts, finds it. Raises ValueError for what is no address."""
    from pipeline.runtime import metrics

    if address is not None:
        metrics.parse_address(address)
        os.environ[metrics.VARIABLE] = address


def with_logs(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """The command, with these options after its own."""
    common = inspect.signature(set_logs).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        set_logs(**{key: values.pop(key) for key in common})
        if not logs.is_verbose():
            logs.silence_others()
        os.environ[logs.COMMAND] = name
        command(**values)

    own = inspect.signature(command)
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in common.values()]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *options])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **set_logs.__annotations__, "return": None}
    return run
