"""The tables of a report about its runs. Every cell is escaped."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.results import format_figure
from pipeline.evaluation.task_table import rows_of
from pipeline.reports.curves import NUM_COLOURS, PLOTS
from pipeline.reports.html import shown
from pipeline.reports.runs import Run, differences
from pipeline.runtime.format import rough_time
from pipeline.runtime.plugins import is_own
from schemas.manifest import flatten

_MEASURES = (
    ("bits_per_byte", "bits per byte"),
    ("jsd_nats", "JSD, nats per position"),
    ("kl_clear_nats", "KL at clear positions, nats"),
)


def escape(value: object) -> str:
    return shown(format_figure(value))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def swatch(run: int) -> str:
    """The colour of a run, by its number on the page."""
    dashed = " dashed" if run >= NUM_COLOURS else ""
    return f'<i class="swatch c{run % NUM_COLOURS}{dashed}"></i>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1) -> str:
    """A table of cells that are HTML already; it scrolls by itself where it is wide. Columns after the first `num_text`
    are numbers.
    """
    kinds = ["" if i < num_text else ' class="n"' for i in range(len(head))]
    top = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr><th>{row[0]}</th>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def escaped_table(head: Sequence[object], rows: Sequence[Sequence[object]], num_text: int = 1) -> str:
    return table([escape(cell) for cell in head], [[escape(cell) for cell in row] for row in rows], num_text)


def run_cells(names: Sequence[str]) -> list[str]:
    """Each run's name with its colour; alone it needs none."""
    return [(swatch(i) if len(names) > 1 else "") + shown(name) for i, name in enumerate(names)]


def overview(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A row per run: what it is, how far it is, where it stands. What no run has is not there."""
    columns: dict[str, list[str]] = {
        "state": [_state_cell(run) for run in runs],
        "learns by": [shown(_learns_by(run)) for run in runs],
        "bits/byte": [_last(run, "bits_per_byte", format_figure) for run in runs],
        "held out": [_last(run, "eval_bits_per_byte", format_figure) for run in runs],
        "best held out": [_best_cell(run) for run in runs],
        "tokens/s": [_middle(run, "tokens_per_second", lambda v: f"{v:,.0f}") for run in runs],
        "data wait": [_middle(run, "data_wait_share", lambda v: f"{v:.1%}") for run in runs],
        "memory": [_last(run, "memory_bytes", lambda v: f"{v / 2**30:.1f} GiB") for run in runs],
        "time": [_last(run, "seconds", rough_time) for run in runs],
    }
    used = {head: cells for head, cells in columns.items() if any(cell != "-" for cell in cells)}
    num_text = 1 + len({"state", "learns by"} & used.keys())
    return table(["run", *used], list(zip(run_cells(names), *used.values(), strict=True)), num_text)


def _state_cell(run: Run) -> str:
    evaluated = "" if run.evaluation else ' <span class="soft">not evaluated</span>'
    done = "done" if run.state == "finished" else "open"
    return f'<span class="{done}">{shown(run.state)}</span>{evaluated}'


def _learns_by(run: Run) -> str:
    """The interface and the objectives' weights."""
    weights = dict(dict(run.recipe.get("train") or {}).get("objectives") or {})
    used = [f"{Path(name).stem} {weight:g}" for name, weight in weights.items() if is_number(weight) and weight]
    interface = dict(run.recipe.get("student") or {}).get("interface")
    reads_bytes = any(weight for name, weight in weights.items() if name in ("byte_ce", "kl") or is_own(name))
    needed = interface if reads_bytes else None
    return ", ".join([*([str(needed)] if needed else []), *used]) or "-"


def _best_cell(run: Run) -> str:
    best = run.best_held_out
    return "-" if best is None else shown(f"{format_figure(best['eval_bits_per_byte'])} at step {best['step']:,}")


def _last(run: Run, key: str, form: Callable[[float], str]) -> str:
    """The last logged value of a run; a dash where it logged none."""
    values = [line[key] for line in run.metrics if is_number(line.get(key))]
    return shown(form(values[-1])) if values else "-"


def _middle(run: Run, key: str, form: Callable[[float], str]) -> str:
    """The median over a run's steps."""
    values = [line[key] for line in run.metrics if is_number(line.get(key))]
    return shown(form(statistics.median(values))) if values else "-"


def final_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What every eval.json says: a row per run, a group of columns per corpus and measure, in it a column per model."""
    groups = [
        (corpus, measure, title)
        for corpus in _ordered(corpus for run in runs for found in run.evaluation.values() for corpus in found)
        for measure, title in _MEASURES
        if any(_figure(run, model, corpus, measure) is not None for run in runs for model in run.evaluation)
    ]
    if not groups:
        return "<p>No eval.json yet: run <code>bld eval</code> for a recipe of these runs.</p>"
    shown = "".join(f"<div>{_group_table(runs, names, *group)}</div>" for group in groups)
    return f'<div class="beside">{shown}</div>{_all_figures(runs, names)}'


def _ordered(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _figure(run: Run, model: str, corpus: str, measure: str) -> float | None:
    value = run.evaluation.get(model, {}).get(corpus, {}).get(measure)
    return float(value) if isinstance(value, int | float) and is_number(value) else None


def _group_table(runs: Sequence[Run], names: Sequence[str], corpus: str, measure: str, title: str) -> str:
    models = _ordered(
        model for run in runs for model in run.evaluation if _figure(run, model, corpus, measure) is not None
    )
    scored = [(run, model) for run in runs for model in models if _figure(run, model, corpus, measure) is not None]
    alike = all(_same_text(first, other, corpus) for first in scored for other in scored)
    of_students = [v for run in runs if (v := _figure(run, "student", corpus, measure)) is not None]
    best = min(of_students) if len(set(of_students)) > 1 and alike else None
    closes = measure == "bits_per_byte" and {"start", "student", "teacher"} <= set(models)
    rows = []
    for run, name in zip(runs, run_cells(names), strict=True):
        cells = [
            _figure_cell(_figure(run, model, corpus, measure), best if model == "student" else None) for model in models
        ]
        rows.append([name, *cells, *([_gap_closed(run, corpus)] if closes else [])])
    head = ["run", *map(shown, models), *(["gap closed"] if closes else [])]
    caption = f"{corpus.replace('_', ' ')}: {title}"
    return f"<h3>{shown(caption)}</h3>{table(head, rows)}{'' if alike else _UNLIKE}"


_UNLIKE = (
    '<p class="soft">Not all of these are of the same text, so they do not compare: the figures below say how many bytes each is of. '
    "<code>bld eval RECIPE</code> scores all models of a run on the same.</p>"
)


def _same_text(first: tuple[Run, str], other: tuple[Run, str], corpus: str) -> bool:
    """Whether two models were scored on the same text, as far as their figures say: by its digest, in older ones by its
    bytes.
    """
    of_first, of_other = (run.evaluation[model][corpus] for run, model in (first, other))
    keys = ("text_sha256",) if "text_sha256" in of_first and "text_sha256" in of_other else ("num_bytes", "positions")
    return all(of_first.get(key) == of_other.get(key) for key in keys)


def _figure_cell(value: float | None, best: float | None) -> str:
    return f"<b>{escape(value)}</b>" if value is not None and value == best else escape(value)


def _gap_closed(run: Run, corpus: str) -> str:
    """How much of the way from the start to the teacher the student has gone; a dash where the teacher is no better, or
    the text unlike.
    """
    found = [_figure(run, model, corpus, "bits_per_byte") for model in ("start", "student", "teacher")]
    start, student, teacher = found
    if start is None or student is None or teacher is None or teacher >= start:
        return "-"
    if not all(_same_text((run, "student"), (run, other), corpus) for other in ("start", "teacher")):
        return "-"
    return f"{(start - student) / (start - teacher):.0%}"


def _all_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
    found = [
        (name, model, corpus, flatten(figures))
        for run, name in zip(runs, names, strict=True)
        for model, corpora in run.evaluation.items()
        for corpus, figures in corpora.items()
    ]
    keys = _ordered(key for *_, figures in found for key in figures)
    rows = [[run, model, corpus, *[figures.get(key) for key in keys]] for run, model, corpus, figures in found]
    head = ["run", "model", "corpus", *[key.replace("_", " ") for key in keys]]
    return f"<details><summary>All figures</summary>{escaped_table(head, rows, num_text=3)}</details>"


def task_tables(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The tasks that were asked, a table per run that has any, beside what its recipe says that others have
    published.
    """
    return "".join(
        (f"<h3>{cell}</h3>" if len(runs) > 1 else "") + escaped_table(*_task_rows(run), num_text=2)
        for run, cell in zip(runs, run_cells(names), strict=True)
        if run.tasks
    )


def _task_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    section = dict(run.recipe.get("eval") or {})
    groups = dict(section.get("tasks") or {}).values()
    metrics = {task: metric for group in groups for task, metric in dict(group.get("metrics") or {}).items()}
    return rows_of(run.tasks, metrics, dict(section.get("published") or {}))


def last_steps_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The last step of each run that has metrics."""
    last = [run.metrics[-1] for run in runs if run.metrics]
    keys = [
        key
        for key in _ordered(["step", *[plot.key for plot in PLOTS], *(k for line in last for k in line)])
        if any(key in line for line in last)
    ]
    rows = [
        [name, *[run.metrics[-1].get(k) for k in keys]] for run, name in zip(runs, names, strict=True) if run.metrics
    ]
    return escaped_table(["run", *[key.replace("_", " ") for key in keys]], rows)


def differences_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The recipe keys in which runs differ, a column per run."""
    rows = [["not set" if cell is None else cell for cell in row] for row in differences(runs)]
    if not rows:
        return "<p>Nothing but their folders.</p>"
    return table(["key", *run_cells(names)], [[shown(cell) for cell in row] for row in rows], len(rows[0]))
