"""Figures of tasks out of the results of lm-evaluation-harness; the harness itself is not needed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Results = Mapping[str, Mapping[str, Any]]  # the harness' JSON, by group of tasks


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
