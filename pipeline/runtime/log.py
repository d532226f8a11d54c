"""What commands say while they work, one line each, on stderr; what they find goes to stdout.

    15:20:31 bld teacher: runs/demo/dump: 4 shards planned, 4 to make
    15:20:33 bld teacher: warning: the teacher's engine failed; starting it again (2/3)

As JSON a line is an object: `time` (UTC), `level`, `command`, `message`, and the figures that it speaks of as fields of
their own.

How much is said, and how, stands in the environment, so that the processes which a command starts say it alike: `bld`'s
options put it there. Other packages are asked for silence but for `verbose`.
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
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # of C++ code, that of vLLM's kernels too, which says how it binds memory
}
_NAMES = {"warning": "warning: ", "error": "error: "}


def info(message: str, **figures: Any) -> None:
    """What an operator wants to know of work that goes as it should."""
    _settled().info(message, extra={"figures": figures})


def debug(message: str, **figures: Any) -> None:
    """What only someone who looks for a cause wants to know."""
    _settled().debug(message, extra={"figures": figures})


def warning(message: str, **figures: Any) -> None:
    """What went otherwise than it should, and was dealt with."""
    _settled().warning(message, extra={"figures": figures})


def error(message: str) -> None:
    """What ends the command."""
    _logger().error(message, extra={"figures": {}})


def as_json() -> bool:
    return os.environ.get(FORMAT) == "json"


def show_tracebacks() -> None:
    """Of errors, in this process and those that it starts."""
    os.environ[DEBUG] = "1"


def shows_tracebacks() -> bool:
    return bool(os.environ.get(DEBUG))


def is_shown() -> bool:
    """Whether `info` says anything."""
    return _settled().isEnabledFor(logging.INFO)


def set_level(level: Level) -> None:
    """For this process and those that it starts."""
    os.environ[LEVEL] = level
    _logger().setLevel(_LEVELS[level])
    if level == "verbose":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


def set_format(form: Literal["text", "json"]) -> None:
    """For this process and those that it starts."""
    os.environ[FORMAT] = form


def is_verbose() -> bool:
    """Return whether other packages say what they like."""
    return os.environ.get(LEVEL) == "verbose"


def silence_others() -> None:
    """Ask packages that load models for no bars and no remarks, in this process and those that it starts; read when
    they are imported.

    An operator's own values stay.
    """
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)


class _Stderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is when a line is written: a progress bar, or a test, may have put another in its
    place.
    """

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
    """Raise ValueError, naming the variable and its value, where the environment asks for a level or a format that does
    not exist.
    """
    for variable, known in ((LEVEL, tuple(_LEVELS)), (FORMAT, _FORMATS)):
        if (value := os.environ.get(variable)) and value not in known:
            raise ValueError(f"{variable} is {value!r}; give {', '.join(known[:-1])} or {known[-1]}, or leave it unset")


@cache
def _logger() -> logging.Logger:
    """The logger with its handler, at whatever level: an error is shown at each."""
    logger = logging.getLogger("bld")
    logger.addHandler(_Stderr())
    logger.propagate = False  # who configures the root logger must not get each line twice
    return logger


@cache
def _settled() -> logging.Logger:
    """The logger at the level that the environment asks for, from its first use on."""
    check_environment()
    _logger().setLevel(_LEVELS[os.environ.get(LEVEL) or "normal"])
    return _logger()
