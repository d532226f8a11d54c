"""Curves as inline SVG: one quantity of several runs over one axis.

A drawing is 560 x 250 units and scales with the page. Colours are the classes `c0` ... of the page's style. Attributes
let a script find the value under the pointer: the ranges of both axes (`data-x`, `data-y`) and of the frame
(`data-frame`).
"""

import html
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from pipeline.runtime.format import rough_time, short_number

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 34
NUM_COLOURS = 10
_MAX_COLUMNS = 200  # per curve, two points each; more cannot be distinguished on a screen
_NOISY_FROM = 80  # points from which a noisy curve gets its running mean, over one in _MEANS of them
_MEANS = 40


class Plot(NamedTuple):
    """A quantity of metrics.jsonl. A `noisy` one varies from step to step because the text does."""

    key: str
    title: str
    unit: str
    noisy: bool = True


PLOTS = (
    Plot("loss", "Loss", "nats per byte, weighted"),
    Plot("ce", "Cross-entropy of tokens", "nats per byte"),
    Plot("byte_ce", "Cross-entropy of bytes", "nats per byte"),
    Plot("kl", "Divergence from the teacher", "nats per byte"),
    Plot("alm", "Likelihood matching of chunks", "nats per byte"),
    Plot("bits_per_byte", "Bits per byte, training text", "bits"),
    Plot("eval_bits_per_byte", "Bits per byte, held out", "bits", noisy=False),
    Plot("lr", "Learning rate", "", noisy=False),
    Plot("grad_norm", "Gradient norm", "before clipping"),
    Plot("tokens_per_second", "Speed", "student tokens per second"),
)


class Axis(NamedTuple):
    """A horizontal axis, by its key in metrics.jsonl."""

    key: str
    name: str


AXES = (Axis("step", "Steps"), Axis("supervised_bytes", "Supervised bytes"), Axis("seconds", "Time"))


class Series(NamedTuple):
    """A run's curve, with increasing x."""

    run: int  # its number on the page, which determines its colour
    xs: Sequence[float]
    ys: Sequence[float]


class Scale(NamedTuple):
    """The values at the two ends of an axis, and its ticks."""

    low: float
    high: float
    ticks: list[float]

    def at(self, value: float, start: float, end: float) -> float:
        """Return the coordinate of a value on an axis between two coordinates of the drawing."""
        return start + (end - start) * (value - self.low) / (self.high - self.low)


def nice_scale(low: float, high: float, num_ticks: int, tight: bool = False) -> Scale:
    """Return a scale with ticks 1, 2 or 5 times a power of ten apart; a `tight` one ends where the values end."""
    if high <= low:
        spread = abs(low) * 0.05 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if not tight:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, [round(number * step, 12) for number in range(first, last + 1)])


def thinned(xs: Sequence[float], ys: Sequence[float], columns: int = _MAX_COLUMNS) -> list[tuple[float, float]]:
    """Return the points of a curve; for a long one, the minimum and maximum in each of `columns` columns, in order."""
    if len(xs) <= 2 * columns:
        return list(zip(xs, ys, strict=True))
    kept: set[int] = {0, len(xs) - 1}
    for column in range(columns):
        inside = range(column * len(xs) // columns, (column + 1) * len(xs) // columns)
        kept |= {min(inside, key=ys.__getitem__), max(inside, key=ys.__getitem__)}
    return [(xs[i], ys[i]) for i in sorted(kept)]


def running_mean(ys: Sequence[float], width: int) -> list[float]:
    """Return the mean of the `width` (odd) values around each value, fewer at the ends."""
    sums = [0.0, *accumulate(ys)]
    half = width // 2
    ends = [(max(0, i - half), min(len(ys), i + half + 1)) for i in range(len(ys))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]


def format_ticks(ticks: Sequence[float]) -> list[str]:
    """Format the values at an axis, all with the same decimals: `0.8`, `1.0`, `1.2`."""
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 1e3 or 0 < largest < 1e-3:
        return [short_number(tick) for tick in ticks]
    decimals = max((len(f"{tick:.6g}".partition(".")[2]) for tick in ticks), default=0)
    return [f"{tick:.{decimals}f}" for tick in ticks]


def draw(plot: Plot, axis: Axis, series: Sequence[Series]) -> str:
    """Draw an <svg> element; empty if no run has the quantity over that axis."""
    series = [curve for curve in series if curve.xs]
    if not series:
        return ""
    x = _x_scale(axis, max(curve.xs[-1] for curve in series), min(curve.xs[0] for curve in series))
    y = nice_scale(min(min(curve.ys) for curve in series), max(max(curve.ys) for curve in series), 4)
    ends = (LEFT, WIDTH - RIGHT), (HEIGHT - BOTTOM, TOP)
    parts = [grid(axis, x, y), *[_curve(curve, x, y, plot.noisy) for curve in series]]
    label = html.escape(f"{plot.title} over {axis.name.lower()}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-axis="{axis.key}" data-key="{plot.key}" '
        f'data-x="{x.low:.9g} {x.high:.9g}" data-y="{y.low:.9g} {y.high:.9g}" '
        f'data-frame="{ends[0][0]} {ends[0][1]} {ends[1][0]} {ends[1][1]}">{"".join(parts)}</svg>'
    )


def _x_scale(axis: Axis, last: float, first: float) -> Scale:
    """Return a scale from 0, or from the first value if that is far from 0; times have ticks in their own unit."""
    low = 0.0 if first <= 0.2 * last else first
    if axis.key != "seconds":
        return nice_scale(low, last, 5, tight=True)
    unit = 86400 if last >= 172800 else 3600 if last >= 7200 else 60 if last >= 300 else 1
    scale = nice_scale(low / unit, last / unit, 5, tight=True)
    return Scale(scale.low * unit, scale.high * unit, [tick * unit for tick in scale.ticks])


def grid(axis: Axis, x: Scale, y: Scale) -> str:
    """Draw horizontal lines at the ticks of y, tick marks at those of x, and the labels of both."""
    parts = []
    for tick, name in zip(y.ticks, format_ticks(y.ticks), strict=True):
        at = y.at(tick, HEIGHT - BOTTOM, TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{name}</text>')
    names = [rough_time(tick, x.high) for tick in x.ticks] if axis.key == "seconds" else format_ticks(x.ticks)
    for tick, name in zip(x.ticks, names, strict=True):
        at = x.at(tick, LEFT, WIDTH - RIGHT)
        parts.append(f'<path class="grid" d="M{at:.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{name}</text>')
    return "".join(parts)


def _curve(curve: Series, x: Scale, y: Scale, noisy: bool) -> str:
    """Draw a line, with dots if there are few points; many noisy ones get their running mean over a faint line."""
    line, points = line_path(curve.xs, curve.ys, x, y), len(curve.xs)
    if points <= 12:
        line += "".join(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>' for px, py in _places(curve.xs, curve.ys, x, y)
        )
    if noisy and points >= _NOISY_FROM:
        means = running_mean(curve.ys, 2 * (points // _MEANS // 2) + 1)
        line = f'<g class="raw">{line}</g>{line_path(curve.xs, means, x, y)}'
    dashed = " dashed" if curve.run >= NUM_COLOURS else ""
    return f'<g class="curve c{curve.run % NUM_COLOURS}{dashed}" data-run="{curve.run}">{line}</g>'


def line_path(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    return f'<path d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in _places(xs, ys, x, y))}"/>'


def _places(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> list[tuple[float, float]]:
    return [(x.at(px, LEFT, WIDTH - RIGHT), y.at(py, HEIGHT - BOTTOM, TOP)) for px, py in thinned(xs, ys)]
