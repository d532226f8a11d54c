"""Figures of several runs' evaluations by method, as inline SVG: bits per byte and divergence against training steps.

Runs that differ in steps and seed alone are of one method: a line over steps, its seeds one point with their mean and,
for two or more, the 95 % interval of it (Student's t). The start stands at step 0, the teacher as a dashed line.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from pipeline.evaluation.results import format_figure
from pipeline.planning.estimates import student_t
from pipeline.reports import tables
from pipeline.reports.curves import AXES, BOTTOM, HEIGHT, LEFT, NUM_COLOURS, RIGHT, TOP, WIDTH, Scale, grid, nice_scale
from pipeline.reports.html import html_text
from pipeline.reports.runs import Run, flattened
from pipeline.runtime.format import count_of

_STEPS = AXES[0]
_OF_ONE_RUN = ("student.path", "train.steps", "train.seed", "trained_on")
_TWO_SEEDS = 12.7062  # the 97.5 % quantile of Student's t with one degree of freedom
_CAP = 4  # half the width of an interval's ends


class Point(NamedTuple):
    """Students of one method after as many steps.

    Attributes:
        low, high: of the 95 % interval over seeds; None if there is only one.
        gap: what the students still lack of their teacher; None if that is not known.
    """

    steps: int
    value: float
    low: float | None
    high: float | None
    num_runs: int
    gap: float | None


class Method(NamedTuple):
    """Runs that differ in steps and seed alone.

    Attributes:
        number: of its first run on the page, which determines its colour.
        start: the figure before the first step; None if it was not measured, or differs between the runs.
    """

    number: int
    name: str
    start: float | None
    points: list[Point]


def method_figures(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Draw a figure for each corpus and measure that two or more students have on the same text; else empty."""
    figures = ""
    corpora = dict.fromkeys(corpus for run in runs for corpora in run.evaluation.values() for corpus in corpora)
    for corpus in corpora:
        for measure, title in tables.MEASURES:
            scored = [
                number
                for number, run in enumerate(runs)
                if run.step and tables.figure_of(run, "student", corpus, measure) is not None
            ]
            alike = all(
                tables.same_text((runs[scored[0]], "student"), (runs[other], "student"), corpus) for other in scored
            )
            if len(scored) > 1 and alike:
                figures += _figure(runs, names, scored, (corpus, measure, title))
    if not figures:
        return ""
    said = (
        "By method: runs that differ in steps and seed alone are one line. A ring is the start, the dashed line the "
        "teacher, a bar the 95 % interval of the mean over seeds, of these very texts."
    )
    return f'<p class="soft">{said}</p><div class="plots methods">{figures}</div>'


def methods_of(
    runs: Sequence[Run], names: Sequence[str], scored: Sequence[int], figure: tuple[str, str]
) -> list[Method]:
    """Group runs, by their numbers, into methods.

    Args:
        figure: the corpus and the measure.
    """
    groups: dict[str, list[int]] = {}
    for number in scored:
        groups.setdefault(_method_key(runs[number], number), []).append(number)
    found = []
    for numbers in groups.values():
        starts = {_beside(runs[number], "start", *figure) for number in numbers}
        by_steps: dict[int, list[Run]] = {}
        for number in numbers:
            by_steps.setdefault(runs[number].step, []).append(runs[number])
        points = [_point(steps, by_steps[steps], *figure) for steps in sorted(by_steps)]
        found.append(
            Method(
                numbers[0],
                _common_name([names[n] for n in numbers]),
                starts.pop() if len(starts) == 1 else None,
                points,
            )
        )
    return found


def _method_key(run: Run, number: int) -> str:
    """Return a text that runs of one method share: their identity without steps and seed, else their recipe."""
    values: Mapping[str, Any] = flattened(run.identity or run.recipe)
    kept = {key: value for key, value in values.items() if not key.startswith(_OF_ONE_RUN)}
    return json.dumps(kept, sort_keys=True) if kept else str(number)


def _point(steps: int, runs: Sequence[Run], corpus: str, measure: str) -> Point:
    values = [value for run in runs if (value := tables.figure_of(run, "student", corpus, measure)) is not None]
    gaps = [
        value - teacher
        for run, value in zip(runs, values, strict=True)
        if (teacher := _beside(run, "teacher", corpus, measure)) is not None
    ]
    mean = statistics.fmean(values)
    gap = statistics.fmean(gaps) if len(gaps) == len(values) else None
    seeds = {str(dict(run.recipe.get("train") or {}).get("seed")) for run in runs}
    if len(values) < 2 or len(seeds) < len(values):  # the same seed twice says nothing of another
        return Point(steps, mean, None, None, len(values), gap)
    quantile = _TWO_SEEDS if len(values) == 2 else student_t(len(values) - 1)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Point(steps, mean, mean - half, mean + half, len(values), gap)


def _beside(run: Run, model: str, corpus: str, measure: str) -> float | None:
    """Return the figure of a run's start or teacher, if it was measured on the student's text."""
    value = tables.figure_of(run, model, corpus, measure)
    return value if value is not None and tables.same_text((run, "student"), (run, model), corpus) else None


def _common_name(names: Sequence[str]) -> str:
    """Return what the names of a method's runs begin with: `sft` of `sft-20` and `sft-40`; else the first name."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike).rstrip("0123456789-_./ ") or names[0]


def _figure(runs: Sequence[Run], names: Sequence[str], scored: Sequence[int], measured: tuple[str, str, str]) -> str:
    corpus, measure, title = measured
    methods = methods_of(runs, names, scored, (corpus, measure))
    teachers = sorted({v for n in scored if (v := _beside(runs[n], "teacher", corpus, measure)) is not None})
    caption = html_text(f"{corpus.replace('_', ' ')}: {title}")
    legend = " ".join(f"<span>{tables.swatch(m.number)}{html_text(m.name)}</span>" for m in methods)
    svg = draw_methods(f"{corpus}: {title} over steps, by method", methods, teachers)
    return (
        f'<figure><figcaption>{caption} <span class="soft">over steps</span></figcaption>{svg}<p>{legend}</p></figure>'
    )


def draw_methods(label: str, methods: Sequence[Method], teachers: Sequence[float]) -> str:
    """Draw an <svg> element; each point has a title that says its figures."""
    starts = [method.start for method in methods if method.start is not None]
    points = [point for method in methods for point in method.points]
    bounds = [bound for point in points for bound in (point.value, point.low, point.high) if bound is not None]
    x = nice_scale(0.0, max(point.steps for point in points), 5, tight=True)
    y = nice_scale(min([*bounds, *starts, *teachers]), max([*bounds, *starts, *teachers]), 4)
    parts = [grid(_STEPS, x, y), *(_teacher(value, y) for value in teachers), *(_method(m, x, y) for m in methods)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html_text(label)}" '
        f'data-x="{x.low:.9g} {x.high:.9g}" data-y="{y.low:.9g} {y.high:.9g}" '
        f'data-frame="{LEFT} {WIDTH - RIGHT} {HEIGHT - BOTTOM} {TOP}">{"".join(parts)}</svg>'
    )


def _teacher(value: float, y: Scale) -> str:
    at = y.at(value, HEIGHT - BOTTOM, TOP)
    title = f"<title>teacher: {tables.escape(value)}</title>"
    label = f'<text x="{WIDTH - RIGHT}" y="{at - 4:.1f}" text-anchor="end">teacher</text>'
    return f'<g class="teacher">{title}<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>{label}</g>'


def _method(method: Method, x: Scale, y: Scale) -> str:
    """Draw the line from the start over the points, the intervals, and the points with what they are."""
    places = [
        (x.at(point.steps, LEFT, WIDTH - RIGHT), y.at(point.value, HEIGHT - BOTTOM, TOP)) for point in method.points
    ]
    parts = []
    if method.start is not None:
        places.insert(0, (x.at(0.0, LEFT, WIDTH - RIGHT), y.at(method.start, HEIGHT - BOTTOM, TOP)))
        title = f"<title>{html_text(method.name)}, start: {tables.escape(method.start)}</title>"
        parts.append(f'<circle class="start" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3.2">{title}</circle>')
    line = f'<path d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in places)}"/>' if len(places) > 1 else ""
    for point, (px, py) in zip(method.points, places[-len(method.points) :], strict=True):
        if point.low is not None and point.high is not None:
            low, high = (y.at(bound, HEIGHT - BOTTOM, TOP) for bound in (point.low, point.high))
            caps = "".join(f"M{px - _CAP:.1f} {end:.1f}h{2 * _CAP}" for end in (low, high))
            parts.append(f'<path class="bar" d="M{px:.1f} {low:.1f}V{high:.1f}{caps}"/>')
        title = f"<title>{html_text(f'{method.name}, {_told(point)}')}</title>"
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2">{title}</circle>')
    dashed = " dashed" if method.number >= NUM_COLOURS else ""
    return f'<g class="method c{method.number % NUM_COLOURS}{dashed}">{line}{"".join(parts)}</g>'


def _told(point: Point) -> str:
    """Return a point in words: `40 steps: 1.2019 [1.1990, 1.2048] over 3 seeds, 0.1087 from the teacher`."""
    interval = "" if point.low is None else f" [{point.low:.4f}, {point.high:.4f}] over {point.num_runs} seeds"
    several = f", mean of {point.num_runs} runs" if point.num_runs > 1 and not interval else ""
    gap = "" if point.gap is None else f", {point.gap:.4f} from the teacher"
    return f"{count_of(point.steps, 'step')}: {format_figure(point.value)}{interval}{several}{gap}"
