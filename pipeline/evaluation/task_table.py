"""Table of the harness' results, a row per task: our models, and figures published by others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.runtime.harness_figures import Results, TaskFigure, task_figures
from schemas.json_text import json_text
from schemas.manifest import read_json

_MAX_WIDTH = 1000  # characters of a printed table


def table_rows(
    results: Mapping[str, Results], metrics: Mapping[str, str], published: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Return the head and rows of the table, with figures in percent and their standard errors.

    Args:
        results: by model.
        published: percent, by source and task.
    """
    ours = {model: task_figures(of_model, metrics) for model, of_model in results.items()}
    tasks = dict.fromkeys(task for figures in ours.values() for task in figures)
    rows = []
    for task in tasks:
        known = next(figures[task] for figures in ours.values() if task in figures)
        cells = [_cell(figures.get(task)) for figures in ours.values()]
        theirs = [f"{figures[task]:.2f}" if task in figures else "-" for figures in published.values()]
        rows.append([task, known.metric, known.num_fewshot, f"{known.num_questions:,}", *cells, *theirs])
    return ["task", "metric", "shots", "questions", *ours, *(f"{source} (published)" for source in published)], rows


def _cell(figure: TaskFigure | None) -> str:
    if figure is None:
        return "-"
    error = "" if figure.stderr is None else f" ± {100 * figure.stderr:.2f}"
    return f"{100 * figure.value:.2f}{error}"


def print_tasks(
    results: Mapping[str, Results],
    metrics: Mapping[str, str],
    published: Mapping[str, Mapping[str, float]],
    console: Console | None = None,
) -> None:
    """Print the table of `table_rows` in full: rich takes a log to be 80 columns wide, and would cut figures off."""
    head, rows = table_rows(results, metrics, published)
    table = Table(*head, title="tasks, in percent")
    for row in rows:
        table.add_row(*row)
    out = console or Console()
    out.width = max(out.width, out.measure(table, options=out.options.update_width(_MAX_WIDTH)).maximum)
    out.print(table)


def save_tasks(results: Results, folder: Path) -> list[Path]:
    """Write each group's results to `folder`/GROUP.json, and any answers to GROUP.TASK.jsonl.

    Returns the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, group in results.items():
        samples = group.get("samples", {})
        texts = {f"{name}.{task}.jsonl": "".join(_line(row) for row in rows) for task, rows in samples.items()}
        texts[f"{name}.json"] = json_text({k: v for k, v in group.items() if k != "samples"}, indent=2) + "\n"
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
            written.append(folder / file)
    return written


_REMEDY = "Delete it, and run `bld eval --tasks` again"


def load_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Load the results that `save_tasks` wrote; empty if there are none."""
    return {path.stem: read_json(path, remedy=_REMEDY) for path in sorted(folder.glob("*.json"))}


def _line(row: Any) -> str:
    return json_text(row, ensure_ascii=False) + "\n"
