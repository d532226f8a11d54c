"""A run's log: one line per logged step, with the same figures in metrics.jsonl and in the trackers.

The lines form a table, whose header is repeated regularly. Units: losses in nats per supervised byte; memory in bytes
in the files, in GiB on the line; tokens are the student's; `seconds` is the run's total time, including the time before
a resume.
"""

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.config import Recipe
from pipeline.runtime import log
from pipeline.runtime.format import clock_time
from schemas import dump_files
from schemas.json_text import json_text
from schemas.manifest import parse_json
from schemas.storage.atomic import sync_and_rename
from stage2_student.losses.objectives import OBJECTIVES
from stage2_student.runs.retention import best_step, evaluation_of
from stage2_student.runs.trackers import open_trackers

METRICS = "metrics.jsonl"
_LINES_PER_HEAD = 25
LEGEND = (
    "loss and its parts: nats per supervised byte; "
    "bits/byte: of the student's own tokens, on the step's text and held out",
    "uncount: share of positions that the interface masks; wait: share of the step without data; left: h:mm:ss",
)


class Column(NamedTuple):
    """A column of the table, by its key in metrics.jsonl."""

    key: str
    head: str
    width: int
    form: Callable[[float], str]


_LOSS: Callable[[float], str] = "{:.4f}".format
_SHARE: Callable[[float], str] = "{:.0%}".format
COLUMNS = (
    Column("loss", "loss", 7, _LOSS),
    *(Column(name, name, 7, _LOSS) for name in OBJECTIVES),
    Column("bits_per_byte", "bits/byte", 9, _LOSS),
    Column("eval_bits_per_byte", "held out", 8, _LOSS),
    Column("uncounted_share", "uncount", 7, _SHARE),
    Column("lr", "lr", 7, "{:.1e}".format),
    Column("grad_norm", "grad", 6, "{:.2f}".format),
    Column("tokens_per_second", "tokens/s", 8, "{:,.0f}".format),
    Column("data_wait_share", "wait", 4, _SHARE),
    Column("memory_bytes", "GiB", 5, lambda size: f"{size / 2**30:.1f}"),
)


_NUM_LOSSES = 1 + len(OBJECTIVES)


class RunLog:
    """The log of a run, opened by rank 0: one line per call, with a progress bar below if stderr is a terminal."""

    def __init__(self, run: Path, first_step: int, recipe: Recipe) -> None:
        self.first_step, self.num_steps = first_step, recipe.train.steps
        self._held_out = recipe.train.eval_every > 0
        own = [Column(name, name, max(7, len(name)), _LOSS) for name in recipe.train.objectives.files]
        self._known = (*COLUMNS[:_NUM_LOSSES], *own, *COLUMNS[_NUM_LOSSES:])
        self._lines = 0
        self.seconds_before = _seconds_taken(run / METRICS)
        self.started = time.monotonic()
        self._trackers = open_trackers(recipe, first_step)
        self._file = (run / METRICS).open("a", encoding="utf-8")
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal and log.is_shown() and not log.as_json():
            columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.num_steps, completed=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a step's figures to the file, the trackers and the log."""
        elapsed = time.monotonic() - self.started
        values = {**values, "seconds": self.seconds_before + elapsed}
        self._file.write(json_text({"step": step, **values}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(step, values)
        if self._lines == 0 and not log.as_json():
            for line in LEGEND:
                log.info(line)
        if self._lines % _LINES_PER_HEAD == 0 and not log.as_json():
            log.info(self.head(values))
        log.info(self.line(step, values, elapsed), step=step, **values)
        if (by_name := figures_by_name(values)) and not log.as_json():
            log.info(by_name)
        self._lines += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def head(self, values: Mapping[str, float]) -> str:
        """Format the header of the table."""
        names = [f"{column.head:>{column.width}}" for column in self._columns(values)]
        return " ".join([f"{'step':>{self._step_width}}", *names, f"{'left':>7}"])

    def line(self, step: int, values: Mapping[str, float], elapsed: float) -> str:
        """Format a step's figures; `elapsed` seconds have passed since the first step of this process."""
        left = elapsed / (step - self.first_step) * (self.num_steps - step)
        cells = [
            f"{column.form(values[column.key]) if column.key in values else '':>{column.width}}"
            for column in self._columns(values)
        ]
        time_left = f"{clock_time(left, short=True):>7}"
        return " ".join([f"{f'{step}/{self.num_steps}':>{self._step_width}}", *cells, time_left])

    def _columns(self, values: Mapping[str, float]) -> list[Column]:
        """Return the columns that this run fills."""
        return [c for c in self._known if c.key in values or (c.key == "eval_bits_per_byte" and self._held_out)]

    @property
    def _step_width(self) -> int:
        return 2 * len(str(self.num_steps)) + 1

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def where_to_look(run: Path) -> str:
    """Describe the results of a finished run, and the commands that show more."""
    best = best_step(run)
    quoted = shlex.quote(str(run))
    lines = [f"model:   {run / 'export'} (a Hugging Face folder)"]
    if best is not None and (evaluation := evaluation_of(run, best)) is not None:
        out = shlex.quote(str(run / "best"))
        held_out = f"{evaluation.bits_per_byte:.4f} bits/byte held out"
        lines.append(f"best:    step {best}, {held_out}: bld export {quoted} --best --out {out}")
    lines += [f"measure: bld eval {shlex.quote(str(run / dump_files.RECIPE))}", f"curves:  bld report {quoted}"]
    return "\n".join(lines)


def figures_by_name(values: Mapping[str, float]) -> str:
    """Format the loss by corpus, and held-out bits per byte by text; empty if there is one of each."""
    parts = []
    for key, said in (("loss", "loss"), ("eval_bits_per_byte", "held out")):
        named = {name.partition("/")[2]: value for name, value in values.items() if name.startswith(f"{key}/")}
        if named:
            parts.append(f"{said} by corpus: " + ", ".join(f"{name} {value:.4f}" for name, value in named.items()))
    return "; ".join(parts)


def _seconds_taken(metrics: Path) -> float:
    """Return the `seconds` of the last line; 0 if there is none."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return (
        float(parse_json(lines[-1], f"{metrics}, last line", remedy="Delete it").get("seconds", 0.0)) if lines else 0.0
    )


def cut_lines(path: Path, step: int) -> None:
    """Keep only the lines of a file up to `step`: later ones will be written again."""
    if not path.exists():
        return
    # A line that a kill left incomplete is the last one, and has no newline.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    partial = path.with_suffix(".partial")
    remedy = "Repair or delete that line, then run the same command again"
    steps = [parse_json(text, f"{path}, line {n}", "step", remedy=remedy)["step"] for n, text in enumerate(lines, 1)]
    kept = (line for line, line_step in zip(lines, steps, strict=True) if line_step <= step)
    partial.write_text("".join(kept), encoding="utf-8")
    sync_and_rename(partial, path)
