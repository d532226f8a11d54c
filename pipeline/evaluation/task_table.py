"""Table of the harness' results, a row per task: our models, and figures published by others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from schemas.json_text import json_text
from schemas.manifest import read_json

Results = Mapping[str, Mapping[str, Any]]  # the harness' JSON, by group of tasks
_MAX_WIDTH = 1000  # characters of a printed table


class TaskFigure(NamedTuple):
    """One task's figure for one model.

    Attributes:
        value, stderr: as the harness reports them, usually shares of 1; `stderr` is None if it reports none.
        num_questions: number of questions asked; for a group, the sum over its tasks.
    """

    metric: str
    value: float
    stderr: float | None
    num_fewshot: str
    num_questions: int


def task_figures(results: Results, metrics: Mapping[str, str]) -> dict[str, TaskFigure]:
    """Return a figure for each requested task: the one in `metrics`, else acc_norm, else the task's first metric.

    A group represents its tasks. Raises ValueError if a task does not have the metric.
    """
    figures = {}
    for group in results.values():
        members = group.get("group_subtasks", {})
        inner = {name for names in members.values() for name in names}
        for task, values in group["results"].items():
            if task not in inner and (key := _metric(task, values, metrics.get(task))) is not None:
                figures[task] = _figure(group, task, key)
    return figures


def _metric(task: str, values: Mapping[str, Any], name: str | None) -> str | None:
    """Return a key of the harness, `metric,filter`; None for a group without a figure of its own."""
    keys = [key for key, value in values.items() if "," in key and "_stderr," not in key and isinstance(value, float)]
    if name is None:
        return next((key for key in keys if key.startswith("acc_norm,")), keys[0] if keys else None)
    chosen = [key for key in keys if name in (key, key.partition(",")[0])]
    if not chosen:
        raise ValueError(f"metrics: {task} has no {name!r}; it has {', '.join(keys) or 'none'}")
    return chosen[0]


def _figure(group: Mapping[str, Any], task: str, key: str) -> TaskFigure:
    values, (metric, _, filtered) = group["results"][task], key.partition(",")
    stderr = values.get(f"{metric}_stderr,{filtered}")
    leaves = _leaves(task, group.get("group_subtasks", {}))
    shots = sorted({int(group["n-shot"][leaf]) for leaf in leaves if leaf in group["n-shot"]})
    return TaskFigure(
        metric=metric if filtered == "none" else key,
        value=values[key],
        stderr=stderr if isinstance(stderr, float) else None,
        num_fewshot="-".join(map(str, dict.fromkeys((shots[0], shots[-1])))) if shots else "",
        num_questions=sum(int(group["n-samples"][leaf]["effective"]) for leaf in leaves if leaf in group["n-samples"]),
    )


def _leaves(task: str, members: Mapping[str, list[str]]) -> list[str]:
    """Return the tasks in a group, at any depth, or the task itself."""
    return [leaf for name in members[task] for leaf in _leaves(name, members)] if members.get(task) else [task]


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
