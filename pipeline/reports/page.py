"""Report on one or more runs as one self-contained page: overview, curves, final figures, differences and dumps.

The page loads nothing, which its content security policy enforces.

The curves are already drawn (`pipeline.reports.curves`); the script only shows values under the pointer, hides runs and
changes the axis. Without it the page lacks only these.
"""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Objectives
from pipeline.reports import tables
from pipeline.reports.curves import AXES, PLOTS, Axis, Plot, Series, draw
from pipeline.reports.dump_section import dump_section
from pipeline.reports.html import asset, content_policy, html_text, script_data
from pipeline.reports.method_figures import method_figures
from pipeline.reports.runs import Run, flattened, read_dumps, read_run, short_names
from schemas.storage.atomic import committed

# (light, dark) mode. They differ in lightness as well as hue, and are readable as a line on either background.
COLOURS = (
    ("#0b6e99", "#56b4e9"),
    ("#d95f02", "#ff9e4a"),
    ("#1b8a5a", "#3ecf8e"),
    ("#b0308f", "#e58ad0"),
    ("#7a5c00", "#e3c341"),
    ("#5b4fc4", "#a79cff"),
    ("#c0272d", "#ff7b7b"),
    ("#4d7c0f", "#a3d65c"),
    ("#555b66", "#b8bec9"),
    ("#0f766e", "#5eead4"),
)
_MAX_ROWS = 600  # steps per run whose values the pointer shows; of a longer run every second, third ... step


def write_report(folders: Sequence[Path], out: Path) -> list[Run]:
    """Write the report on some runs and return them. Raises ValueError if a folder is not a run."""
    runs = [read_run(folder) for folder in folders]
    text = page(runs, short_names(folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return runs


def page(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the whole page on some runs."""
    title = html_text(names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}")
    heading = html_text(names[0]) if len(runs) == 1 else f"{len(runs)} runs"
    dumps = read_dumps(runs)
    sections = [
        ("Runs", tables.overview(runs, names)),
        ("Start", tables.start_table(runs, names)),
        ("Corpora", tables.corpora_table(runs, names)),
        ("Evaluation", tables.final_table(runs, names) + method_figures(runs, names)),
        ("Tasks, in percent", tables.task_tables(runs, names)),
        ("Curves", _curves(runs, names)),
        *_recipe_section(runs, names),
        ("Dump" if len(dumps) == 1 else "Dumps", "".join(map(dump_section, dumps))),
    ]
    body = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections if text)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{content_policy(asset("report.js"))}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{style()}</style></head>
<body><header><p class="over">Report</p><h1>{heading}</h1></header>{body}
<div id="tip" hidden></div>
<script type="application/json" id="data">{script_data(_values(runs, names))}</script>
<script>{asset("report.js")}</script></body></html>
"""


def style() -> str:
    """Return the page's style sheet, with the runs' colours."""
    light = " ".join(f"--c{i}: {pair[0]};" for i, pair in enumerate(COLOURS))
    dark = " ".join(f"--c{i}: {pair[1]};" for i, pair in enumerate(COLOURS))
    classes = " ".join(f".c{i} {{ --own: var(--c{i}); }}" for i in range(len(COLOURS)))
    return asset("report.css").replace("/*light*/", light).replace("/*dark*/", dark) + classes


def series(runs: Sequence[Run], plot: Plot, axis: Axis) -> list[Series]:
    """Return each run's points of a quantity over an axis; runs without any are left out."""
    curves = []
    for number, run in enumerate(runs):
        lines = [m for m in run.metrics if tables.is_number(m.get(plot.key)) and tables.is_number(m.get(axis.key))]
        if lines:
            curves.append(Series(number, [m[axis.key] for m in lines], [m[plot.key] for m in lines]))
    return curves


def plots_of(runs: Sequence[Run]) -> list[Plot]:
    """Return the quantities these runs may have curves of; the operator's own objectives follow the built-in ones."""
    own = dict.fromkeys(name for run in runs for name in run.own_objectives)
    after = 1 + max(i for i, plot in enumerate(PLOTS) if plot.key in Objectives.model_fields)
    of_corpora = [
        plot._replace(key=f"{plot.key}/{name}", title=f"{plot.title}, {name}")
        for plot in PLOTS
        for name in dict.fromkeys(name for run in runs for name in run.logged_by(plot.key))
        if plot.key in ("loss", "bits_per_byte", "eval_bits_per_byte")
    ]
    of_tasks = [
        Plot(f"task/{name}", f"Task {name}", "share of 1", noisy=False)
        for name in dict.fromkeys(name for run in runs for name in run.logged_by("task"))
    ]
    of_own = [Plot(name, name, "nats per byte") for name in own]
    return [*PLOTS[:after], *of_own, *PLOTS[after:], *of_tasks, *of_corpora]


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    figures = "".join(_figure(plot, runs) for plot in plots_of(runs))
    if not figures:
        return "<p>No metrics yet.</p>"
    buttons = "".join(
        f'<button type="button" data-axis="{axis.key}" aria-pressed="{str(axis.key == "step").lower()}">'
        f"{axis.name}</button>"
        for axis in AXES
    )
    legend = "".join(
        f'<button type="button" data-run="{number}" aria-pressed="true">{cell}</button>'
        for number, cell in enumerate(tables.run_cells(names))
    )
    legend = f'<div class="legend" role="group" aria-label="runs shown">{legend}</div>' if len(runs) > 1 else ""
    last = f"<details><summary>Values of the last step</summary>{tables.last_steps_table(runs, names)}</details>"
    faint = (
        '<p class="soft">Faint: each step. Strong: the running mean over one fortieth of the steps.</p>'
        if 'class="raw"' in figures
        else ""
    )
    return (
        f'<div class="controls">{legend}<div class="axes" role="group" aria-label="axis">{buttons}</div></div>{faint}'
        f'<div class="plots" id="plots" data-axis="step">{figures}</div>{last}'
    )


def _figure(plot: Plot, runs: Sequence[Run]) -> str:
    """Draw a quantity over each axis, one of them shown; empty if no run has it."""
    drawn = [draw(plot, axis, series(runs, plot, axis)) for axis in AXES]
    if not any(drawn):
        return ""
    none = [
        f'<p class="none" data-axis="{axis.key}">These runs did not log {axis.name.lower()}.</p>'
        for axis, svg in zip(AXES, drawn, strict=True)
        if not svg
    ]
    unit = f' <span class="soft">{html_text(plot.unit)}</span>' if plot.unit else ""
    return f"<figure><figcaption>{html_text(plot.title)}{unit}</figcaption>{''.join(drawn)}{''.join(none)}</figure>"


def _recipe_section(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    if len(runs) > 1:
        return [("Differences between the recipes", tables.differences_table(runs, names))]
    rows = list(flattened(runs[0].recipe).items())
    text = f"<details><summary>All values</summary>{tables.escaped_table(['key', 'value'], rows, 2)}</details>"
    return [("Recipe", text)] if rows else []


def _values(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, object]]:
    """Return the values behind the curves, a list per key; None where a step lacks one."""
    keys = [axis.key for axis in AXES] + [plot.key for plot in plots_of(runs)]
    values: list[dict[str, object]] = []
    for run, name in zip(runs, names, strict=True):
        every = -(-len(run.metrics) // _MAX_ROWS) or 1
        # Evaluations and tasks are few: none of them may be skipped.
        few = ("eval_bits_per_byte", *(key for key in keys if key.startswith("task/")))
        rows = [m for i, m in enumerate(run.metrics) if i % every == 0 or any(m.get(key) is not None for key in few)]
        columns = {key: [_rounded(m.get(key)) for m in rows] for key in keys}
        used = {key: column for key, column in columns.items() if any(value is not None for value in column)}
        values.append({"name": name, "columns": used})
    return values


def _rounded(value: object) -> float | int | None:
    if not tables.is_number(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")
