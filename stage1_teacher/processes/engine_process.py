"""The process of one engine: it opens the engine, asks for shards, makes and commits them, and reports each batch."""

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any

from pipeline.runtime import log, metrics
from pipeline.runtime.termination import Terminated, terminable
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.coordination.shard_work import ShardWork, Task, make_all
from stage1_teacher.processes.messages import Ask, Failed, Made, Message, Ready

_STOPPED, _FAILED = 143, 1
_COUNTED = ("engine", "request", "writer")  # failures that are counted where they happen


class ParentGoneError(Exception):
    """The process that started this one has no more work, or is gone."""


class Parent:
    """The process that started this one. Every method may raise ParentGoneError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: Message) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ParentGoneError from error

    def task(self) -> Task:
        task: Task = self._receive()
        return task

    def ask(self, is_idle: bool) -> ShardWork | None:
        self.send(Ask(is_idle))
        work: ShardWork | None = self._receive()
        return work

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise ParentGoneError from error

    def passes(self) -> Iterator[Iterator[ShardWork]]:
        """Yield passes over shards: each ends when there is none to be had at once."""
        while (first := self.ask(is_idle=True)) is not None:
            yield chain([first], iter(lambda: self.ask(is_idle=False), None))


def main() -> None:
    """Serve the process at the other end of the connection whose file descriptor is the argument."""
    parent = Parent(Connection(int(sys.argv[1])))
    try:
        with terminable():
            serve(parent)
    except (KeyboardInterrupt, Terminated):
        raise SystemExit(_STOPPED) from None
    except ParentGoneError:
        raise SystemExit(0) from None
    except Exception as error:
        known = isinstance(error, (ValueError, OSError))
        if log.shows_tracebacks() or not known:
            traceback.print_exc()
        text = str(error) if known else f"{type(error).__name__}: {error}".removesuffix(": ")
        with suppress(ParentGoneError):
            parent.send(Failed(text, ends_all=known and not isinstance(error, EngineError)))
        raise SystemExit(_FAILED) from None


def serve(parent: Parent) -> None:
    """Make shards until there are no more."""
    with parent.task().open() as engine:
        parent.send(Ready())
        known = _failures()
        for shards in parent.passes():
            for made in make_all(engine, shards):
                before, known = known, _failures()
                parent.send(Made(made, known - before))


def _failures() -> Counter[str]:
    get = metrics.figures().registry.get_sample_value
    return Counter({kind: int(get("bld_failures_total", {"kind": kind}) or 0) for kind in _COUNTED})
