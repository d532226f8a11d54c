"""Log of a running command: one line a message, on stderr; results go to stdout.

    15:20:31 bld teacher: runs/demo/dump: 4 shards planned, 4 to make
    15:20:33 bld teacher: warning: the teacher's engine failed; starting it again (2/3)

As JSON a line is an object: `time` (UTC), `level`, `command`, `message`, and the message's figures as separate fields.

Level and format are kept in environment variables, so that child processes log alike; `bld`'s options set them. Other
packages are asked to be silent, except at `verbose`.
"""

import datetime
import logging
import os
import sys
from functools import cache
from typing import Any, Literal

from schemas.json_text import json_text

LEVEL, FORMAT, COMMAND, DEBUG = "BLD_LOG_LEVEL", "BLD_LOG_FORMAT", "BLD_COMMAND", "BLD_DEBUG"
Level = Literal["quiet", "normal", "verbose"]
_LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
_FORMATS = ("text", "json")
_SILENCE = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # of C++ code, including vLLM's kernels, which log how they bind memory
}
_NAMES = {"warning": "warning: ", "error": "error: "}


def info(message: str, **figures: Any) -> None:
    """Log what an operator wants to know while all goes well."""
    _settled().info(message, extra={"figures": figures})


def debug(message: str, **figures: Any) -> None:
    """Log what is of use only when looking for a cause."""
    _settled().debug(message, extra={"figures": figures})


def warning(message: str, **figures: Any) -> None:
    """Log what went wrong and was dealt with."""
    _settled().warning(message, extra={"figures": figures})


def error(message: str) -> None:
    """Log the error that ends the command."""
    _logger().error(message, extra={"figures": {}})


def as_json() -> bool:
    return os.environ.get(FORMAT) == "json"


def show_tracebacks() -> None:
    """Show tracebacks of errors, in this process and its children."""
    os.environ[DEBUG] = "1"


def shows_tracebacks() -> bool:
    return bool(os.environ.get(DEBUG))


def is_shown() -> bool:
    """Return whether `info` messages are shown."""
    return _settled().isEnabledFor(logging.INFO)


def set_level(level: Level) -> None:
    """Set the level of this process and its children."""
    os.environ[LEVEL] = level
    _logger().setLevel(_LEVELS[level])
    if level == "verbose":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


def set_format(form: Literal["text", "json"]) -> None:
    """Set the format of this process and its children."""
    os.environ[FORMAT] = form


def is_verbose() -> bool:
    """Return whether other packages may log freely."""
    return os.environ.get(LEVEL) == "verbose"


def silence_others() -> None:
    """Ask packages that load models for no progress bars and no remarks, in this process and its children.

    They read these variables when they are imported. Values that the operator has set are kept.
    """
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)


class _Stderr(logging.StreamHandler):
    """Handler that looks up `sys.stderr` for each line: a progress bar, or a test, may have replaced it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        if as_json():
            return self._object(record, level)
        time = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        command = os.environ.get(COMMAND)
        return f"{time} bld{f' {command}' if command else ''}: {_NAMES.get(level, '')}{record.getMessage()}"

    def _object(self, record: logging.LogRecord, level: str) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        values = {"time": time, "level": level, "command": os.environ.get(COMMAND), "message": record.getMessage()}
        return json_text(values | getattr(record, "figures", {}), ensure_ascii=False, default=str)


def check_environment() -> None:
    """Raise ValueError, naming variable and value, if the environment asks for an unknown level or format."""
    for variable, known in ((LEVEL, tuple(_LEVELS)), (FORMAT, _FORMATS)):
        if (value := os.environ.get(variable)) and value not in known:
            raise ValueError(f"{variable} is {value!r}; give {', '.join(known[:-1])} or {known[-1]}, or leave it unset")


@cache
def _logger() -> logging.Logger:
    """Return the logger with its handler, at any level: errors are shown at every level."""
    logger = logging.getLogger("bld")
    logger.addHandler(_Stderr())
    logger.propagate = False  # a configured root logger must not repeat each line
    return logger


@cache
def _settled() -> logging.Logger:
    """Return the logger, at the level that the environment asked for at its first use."""
    check_environment()
    _logger().setLevel(_LEVELS[os.environ.get(LEVEL) or "normal"])
    return _logger()
