"""Progress of stage 1: a bar on a terminal, a plain line every ten seconds if the output is a file."""

import time
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pipeline.runtime import log, metrics

_LINE_SECONDS = 10.0


class Progress:
    """Counts of the work done, displayed.

    The time left is estimated from the bytes of text, `total_bytes`; for prompts from their number, because what is
    written after one does not depend on its length.
    """

    def __init__(
        self,
        total_documents: int,
        total_bytes: int,
        console: Console | None = None,
        unit: Literal["documents", "prompts"] = "documents",
    ) -> None:
        self.total_documents, self.total_bytes, self._unit = total_documents, total_bytes, unit
        self.documents = self.text_bytes = self.tokens = self.stored_bytes = 0
        self._last_counts: tuple[int, int] | None = None  # documents and stored bytes, in the last line
        self._console = console or Console(stderr=True)
        self._started = self._last_line = time.monotonic()
        metrics.figures().planned_bytes.set(total_bytes)
        self._bar = (
            RichProgress(
                TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True), console=self._console
            )
            if self._console.is_terminal and log.is_shown() and not log.as_json()
            else None
        )

    def __enter__(self) -> "Progress":
        self._started = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=max(self._amounts()[1], 1))
        return self

    def update(self, documents: int = 0, text_bytes: int = 0, tokens: int = 0, stored_bytes: int = 0) -> None:
        """Add what was done since the last call: documents, bytes of text, teacher tokens, bytes of shards."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        self.stored_bytes += stored_bytes
        counted = metrics.figures()
        for counter, more in (
            (counted.documents, documents),
            (counted.text_bytes, text_bytes),
            (counted.tokens, tokens),
            (counted.stored_bytes, stored_bytes),
        ):
            counter.inc(more)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._amounts()[0], description=self.describe())
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._print_line()

    def describe(self) -> str:
        """Return the counts and rates so far, in one line."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self.documents}/{self.total_documents} {self._unit}"]
        if self._unit == "prompts":
            return ", ".join(
                [*parts, f"{self.documents / seconds:,.1f} prompts/s", f"{self.tokens / seconds:,.0f} tokens/s written"]
            )
        parts += [f"{self.text_bytes / seconds:,.0f} bytes/s", f"{self.tokens / seconds:,.0f} tokens/s"]
        if self.stored_bytes and self.text_bytes:
            parts.append(f"{self.stored_bytes / self.text_bytes:.2f} stored/text byte")
        return ", ".join(parts)

    def _amounts(self) -> tuple[int, int]:
        """Return how much of the work is done, and all of it."""
        if self._unit == "prompts":
            return self.documents, self.total_documents
        return self.text_bytes, self.total_bytes

    def _print_line(self) -> None:
        elapsed = time.monotonic() - self._started
        done, total = self._amounts()
        left = elapsed * (total - done) / done if done else None
        more = f", {left:.0f} s left" if left and left > 0 else ""
        log.info(
            f"{self.describe()}{more}",
            documents=self.documents,
            text_bytes=self.text_bytes,
            tokens=self.tokens,
            stored_bytes=self.stored_bytes,
            seconds=round(elapsed, 3),
            seconds_left=None if left is None else round(left, 3),
        )
        self._last_line = time.monotonic()
        self._last_counts = (self.documents, self.stored_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last_counts != (self.documents, self.stored_bytes):
            self._print_line()
