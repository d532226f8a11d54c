"""Tables of a report on its runs. Every cell is escaped."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.results import format_figure
from pipeline.evaluation.start_table import ROW_KINDS
from pipeline.evaluation.task_table import table_rows
from pipeline.reports.curves import NUM_COLOURS, PLOTS
from pipeline.reports.html import html_text
from pipeline.reports.runs import Run, differences
from pipeline.runtime.format import rough_time
from pipeline.runtime.plugins import is_own
from schemas.manifest import flatten

MEASURES = (
    ("bits_per_byte", "bits per byte"),
    ("jsd_nats", "JSD, nats per position"),
    ("kl_clear_nats", "KL at clear positions, nats"),
)


def escape(value: object) -> str:
    """Format a value and escape it for a page."""
    return html_text(format_figure(value))


def is_number(value: object) -> bool:
    """Return whether a value is a finite number; a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def swatch(run: int) -> str:
    """Draw the colour of a run, by its number on the page."""
    dashed = " dashed" if run >= NUM_COLOURS else ""
    return f'<i class="swatch c{run % NUM_COLOURS}{dashed}"></i>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1) -> str:
    """Return a table whose cells are already HTML; a wide table scrolls.

    Columns after the first `num_text` are numbers.
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
    """Return a `table` of values, which are formatted and escaped."""
    return table([escape(cell) for cell in head], [[escape(cell) for cell in row] for row in rows], num_text)


def run_cells(names: Sequence[str]) -> list[str]:
    """Return each run's name with its colour; a single run has none."""
    return [(swatch(i) if len(names) > 1 else "") + html_text(name) for i, name in enumerate(names)]


def overview(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return a table with a row per run: its state, objectives and latest figures. Empty columns are left out."""
    columns: dict[str, list[str]] = {
        "state": [_state_cell(run) for run in runs],
        "learns by": [html_text(_learns_by(run)) for run in runs],
        "bits/byte": [_last(run, "bits_per_byte", format_figure) for run in runs],
        "held out": [_last(run, "eval_bits_per_byte", format_figure) for run in runs],
        "best held out": [_best_cell(run) for run in runs],
        "tokens/s": [_median(run, "tokens_per_second", lambda v: f"{v:,.0f}") for run in runs],
        "data wait": [_median(run, "data_wait_share", lambda v: f"{v:.1%}") for run in runs],
        "memory": [_last(run, "memory_bytes", lambda v: f"{v / 2**30:.1f} GiB") for run in runs],
        "time": [_last(run, "seconds", rough_time) for run in runs],
    }
    used = {head: cells for head, cells in columns.items() if any(cell != "-" for cell in cells)}
    num_text = 1 + len({"state", "learns by"} & used.keys())
    return table(["run", *used], list(zip(run_cells(names), *used.values(), strict=True)), num_text)


def corpora_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the last figures of each corpus that a run learns from, and its share; empty if no run has several."""
    rows = []
    for run, name in zip(runs, run_cells(names), strict=True):
        refs = [dict(ref) for ref in dict(run.recipe.get("student") or {}).get("dumps") or ()]
        total = sum(float(ref.get("weight", 1.0)) for ref in refs)
        for corpus in run.logged_by("bytes_share"):
            share = sum(float(ref.get("weight", 1.0)) for ref in refs if ref.get("corpus") == corpus) / (total or 1.0)
            figures = [_last(run, f"{key}/{corpus}", format_figure) for key in _OF_CORPORA]
            rows.append([name, html_text(corpus), f"{share:.1%}", *figures])
    head = ["run", "corpus", "share of bytes", *(text for text in _OF_CORPORA.values())]
    return table(head, rows, num_text=2) if rows else ""


_OF_CORPORA = {
    "epoch": "epochs completed",
    "loss": "loss, nats/byte",
    "kl": "divergence, nats/byte",
    "bits_per_byte": "bits/byte",
    "eval_bits_per_byte": "held out, bits/byte",
}


def start_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return how each moved student's rows were made; empty if no student was moved."""
    kinds = [kind for kind in ROW_KINDS if any(run.start.get(kind) for run in runs)]
    columns = [
        *(("embedding rows", "input"), ("head rows", "output"), ("head", "tied"), ("seconds", "seconds")),
        *((f"{kind} rows", kind) for kind in kinds),
    ]
    rows = [
        [name, *(_start_cell(run.start, key) for _, key in columns)]
        for run, name in zip(runs, run_cells(names), strict=True)
        if run.start
    ]
    return table(["run", *(head for head, _ in columns)], rows, num_text=4) if rows else ""


def _start_cell(start: Mapping[str, Any], key: str) -> str:
    value = start.get(key)
    if key == "tied" and value is not None:
        return "the embedding" if value else "its own"
    return escape(value)


def _state_cell(run: Run) -> str:
    evaluated = "" if run.evaluation else ' <span class="soft">not evaluated</span>'
    done = "done" if run.state == "finished" else "open"
    return f'<span class="{done}">{html_text(run.state)}</span>{evaluated}'


def _learns_by(run: Run) -> str:
    """Return the interface and the objectives with their weights."""
    weights = dict(dict(run.recipe.get("train") or {}).get("objectives") or {})
    used = [f"{Path(name).stem} {weight:g}" for name, weight in weights.items() if is_number(weight) and weight]
    interface = dict(run.recipe.get("student") or {}).get("interface")
    reads_bytes = any(weight for name, weight in weights.items() if name in ("byte_ce", "kl") or is_own(name))
    shown_interface = [str(interface)] if interface and reads_bytes else []
    return ", ".join([*shown_interface, *used]) or "-"


def _best_cell(run: Run) -> str:
    best = run.best_held_out
    return "-" if best is None else html_text(f"{format_figure(best['eval_bits_per_byte'])} at step {best['step']:,}")


def _last(run: Run, key: str, form: Callable[[float], str]) -> str:
    """Return the last logged value of a run; a dash if it logged none."""
    values = [line[key] for line in run.metrics if is_number(line.get(key))]
    return html_text(form(values[-1])) if values else "-"


def _median(run: Run, key: str, form: Callable[[float], str]) -> str:
    """Return the median over a run's steps; a dash if it logged none."""
    values = [line[key] for line in run.metrics if is_number(line.get(key))]
    return html_text(form(statistics.median(values))) if values else "-"


def final_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the figures of every eval.json: a table per corpus and measure, with rows for runs, columns for models."""
    groups = [
        (corpus, measure, title)
        for corpus in _ordered(corpus for run in runs for corpora in run.evaluation.values() for corpus in corpora)
        for measure, title in MEASURES
        if any(figure_of(run, model, corpus, measure) is not None for run in runs for model in run.evaluation)
    ]
    if not groups:
        return "<p>No eval.json yet: run <code>bld eval</code> for a recipe of these runs.</p>"
    tables = "".join(f"<div>{_group_table(runs, names, *group)}</div>" for group in groups)
    return f'<div class="beside">{tables}</div>{_all_figures(runs, names)}'


def _ordered(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def figure_of(run: Run, model: str, corpus: str, measure: str) -> float | None:
    """Return a figure of eval.json; None if the model has none."""
    value = run.evaluation.get(model, {}).get(corpus, {}).get(measure)
    return float(value) if isinstance(value, int | float) and is_number(value) else None


def _group_table(runs: Sequence[Run], names: Sequence[str], corpus: str, measure: str, title: str) -> str:
    models = _ordered(
        model for run in runs for model in run.evaluation if figure_of(run, model, corpus, measure) is not None
    )
    scored = [(run, model) for run in runs for model in models if figure_of(run, model, corpus, measure) is not None]
    comparable = all(same_text(first, other, corpus) for first in scored for other in scored)
    of_students = [v for run in runs if (v := figure_of(run, "student", corpus, measure)) is not None]
    best = min(of_students) if len(set(of_students)) > 1 and comparable else None
    closes = measure == "bits_per_byte" and {"start", "student", "teacher"} <= set(models)
    rows = []
    for run, name in zip(runs, run_cells(names), strict=True):
        cells = [
            _figure_cell(figure_of(run, model, corpus, measure), best if model == "student" else None)
            for model in models
        ]
        rows.append([name, *cells, *([_gap_closed(run, corpus)] if closes else [])])
    head = ["run", *map(html_text, models), *(["gap closed"] if closes else [])]
    caption = f"{corpus.replace('_', ' ')}: {title}"
    return f"<h3>{html_text(caption)}</h3>{table(head, rows)}{'' if comparable else _DIFFERENT_TEXT}"


_DIFFERENT_TEXT = (
    '<p class="soft">Not all of these were measured on the same text, so they are not comparable: the figures below '
    "give the bytes of each. <code>bld eval RECIPE</code> scores all models of a run on the same text.</p>"
)


def same_text(first: tuple[Run, str], other: tuple[Run, str], corpus: str) -> bool:
    """Return whether two models were scored on the same text, according to their figures.

    Compares digests of the text; in figures of earlier releases, which have none, its bytes and positions.
    """
    of_first, of_other = (run.evaluation[model][corpus] for run, model in (first, other))
    keys = ("text_sha256",) if "text_sha256" in of_first and "text_sha256" in of_other else ("num_bytes", "positions")
    return all(of_first.get(key) == of_other.get(key) for key in keys)


def _figure_cell(value: float | None, best: float | None) -> str:
    return f"<b>{escape(value)}</b>" if value is not None and value == best else escape(value)


def _gap_closed(run: Run, corpus: str) -> str:
    """Return the share of the gap between the start and the teacher that the student has closed.

    A dash if the teacher is no better than the start, or if their texts differ.
    """
    start, student, teacher = (
        figure_of(run, model, corpus, "bits_per_byte") for model in ("start", "student", "teacher")
    )
    if start is None or student is None or teacher is None or teacher >= start:
        return "-"
    if not all(same_text((run, "student"), (run, other), corpus) for other in ("start", "teacher")):
        return "-"
    return f"{(start - student) / (start - teacher):.0%}"


def _all_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
    all_figures = [
        (name, model, corpus, flatten(figures))
        for run, name in zip(runs, names, strict=True)
        for model, corpora in run.evaluation.items()
        for corpus, figures in corpora.items()
    ]
    keys = _ordered(key for *_, figures in all_figures for key in figures)
    rows = [[run, model, corpus, *[figures.get(key) for key in keys]] for run, model, corpus, figures in all_figures]
    head = ["run", "model", "corpus", *[key.replace("_", " ") for key in keys]]
    return f"<details><summary>All figures</summary>{escaped_table(head, rows, num_text=3)}</details>"


def task_tables(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the figures of tasks, a table per run that has any, with the published figures from its recipe."""
    return "".join(
        (f"<h3>{cell}</h3>" if len(runs) > 1 else "") + escaped_table(*_task_rows(run), num_text=2)
        for run, cell in zip(runs, run_cells(names), strict=True)
        if run.tasks
    )


def _task_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    section = dict(run.recipe.get("eval") or {})
    groups = dict(section.get("tasks") or {}).values()
    metrics = {task: metric for group in groups for task, metric in dict(group.get("metrics") or {}).items()}
    return table_rows(run.tasks, metrics, dict(section.get("published") or {}))


def last_steps_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the values of the last step of each run that has metrics."""
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
    """Return the recipe keys whose values differ between runs, a column per run."""
    rows = [["not set" if cell is None else cell for cell in row] for row in differences(runs)]
    if not rows:
        return "<p>The recipes are identical.</p>"
    return table(["key", *run_cells(names)], [[html_text(cell) for cell in row] for row in rows], len(rows[0]))
