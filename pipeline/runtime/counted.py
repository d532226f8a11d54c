"""Progress of a loop: a bar on a terminal, a plain line every ten seconds if the output is a file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pipeline.runtime import log

_LINE_SECONDS = 10.0


class Counted:
    """A count that grows to a total, displayed with the time left.

    Args:
        what: what is done, and to what: "reads old tokens in two parts".
        total: how many there are.
        console: where to draw; None for the error output.
    """

    def __init__(self, what: str, total: int, console: Console | None = None) -> None:
        self._what, self._total, self._done = what, total, 0
        console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(True))
        draws = console.is_terminal and log.is_shown() and not log.as_json()
        self._bar = RichProgress(*columns, console=console, transient=True) if draws else None

    def __enter__(self) -> "Counted":
        self._began = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total)
        return self

    def add(self, number: int) -> None:
        """Count so many more as done."""
        self._done += number
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_SECONDS and self._done:
            left = (now - self._began) * (self._total - self._done) / self._done
            log.info(f"{self._what}: {self._done:,} of {self._total:,}, {left:.0f} s left")
            self._last_line = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
