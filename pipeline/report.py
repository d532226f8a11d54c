"""One self-contained HTML page about one or more runs: curves, final figures, how the recipes differ, the dump."""

import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.evaluation import format_figure
from schemas.manifest import Manifest, flatten

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #fff; --line: #d0d7de; --head: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --back: #14171b; --line: #3a414a; --head: #20252b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 70rem;
       margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; overflow-wrap: anywhere; }
th { background: var(--head); } figure { margin: 0; } svg { width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
"""
_GREY = "#808890"  # reads on white and on near-black
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
)  # Okabe and Ito: safe for colour blindness


class Plot(NamedTuple):
    """A curve of metrics.jsonl."""

    key: str
    title: str
    unit: str


PLOTS = (
    Plot("loss", "Loss", "nats per byte"),
    Plot("ce", "Cross-entropy of tokens", "nats per byte"),
    Plot("byte_ce", "Cross-entropy of bytes", "nats per byte"),
    Plot("kl", "Divergence from the teacher", "nats per byte"),
    Plot("alm", "Likelihood matching of chunks", "nats per byte"),
    Plot("bits_per_byte", "Bits per byte", "bits"),
    Plot("lr", "Learning rate", ""),
    Plot("grad_norm", "Gradient norm", ""),
    Plot("tokens_per_second", "Speed", "tokens per second"),
)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds; empty where a file is not there yet."""

    name: str
    metrics: list[dict[str, Any]]
    evaluation: dict[str, dict[str, dict[str, Any]]]
    recipe: dict[str, Any]


def read_run(folder: Path) -> Run:
    """Read a run. Raises ValueError where the folder is not one, or a line of its metrics is not JSON."""
    metrics, evaluation, recipe = folder / "metrics.jsonl", folder / "eval.json", folder / "recipe.yaml"
    if not (metrics.exists() or evaluation.exists()):
        raise ValueError(f"{folder} is not a student's run: no metrics.jsonl, no eval.json. Run `bld student` first.")
    return Run(
        name=str(folder),
        metrics=read_metrics(metrics) if metrics.exists() else [],
        evaluation=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.exists() else {},
        recipe=yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.exists() else {},
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One dict per step, in order. Of a step repeated by a resume the last counts; a cut last line is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the run was killed, or is writing it now
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}); repair or delete that line") from error
        steps[int(values["step"])] = values
    return [steps[step] for step in sorted(steps)]


def escape(value: object) -> str:
    return html.escape(format_figure(value))


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table, every cell escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def draw(plot: Plot, runs: Sequence[Run]) -> str:
    """The curves of one quantity as inline SVG; empty where no run has it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = False
    for index, run in enumerate(runs):
        points = [(m["step"], m[plot.key]) for m in run.metrics if _is_number(m.get(plot.key))]
        if points:
            steps, values = zip(*points, strict=True)
            # A dollar sign would start a formula.
            name = run.name.replace("$", r"\$")
            marker = "." if len(points) == 1 else None
            axes.plot(steps, values, color=_COLOURS[index % len(_COLOURS)], linewidth=1.4, marker=marker, label=name)
            drawn = True
    if not drawn:
        return ""
    axes.set_title(plot.title, color=_GREY)
    axes.set_xlabel("step", color=_GREY)
    axes.set_ylabel(plot.unit, color=_GREY)
    axes.tick_params(colors=_GREY)
    axes.grid(alpha=0.25)
    for spine in axes.spines.values():
        spine.set_color(_GREY)
    if len(runs) > 1:
        axes.legend(labelcolor=_GREY, frameon=False)
    return f"<figure>{_svg(figure, plot.key)}</figure>"


def _svg(figure: Any, salt: str) -> str:
    """The figure's SVG element alone, transparent, its ids unlike those of other figures on the page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows both; nothing on the page is an address
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def final_table(runs: Sequence[Run]) -> str:
    """The figures of every eval.json, a row per run, model and corpus."""
    rows = [
        (run.name, model, corpus, figures)
        for run in runs
        for model, corpora in run.evaluation.items()
        for corpus, figures in corpora.items()
    ]
    if not rows:
        return "<p>No eval.json yet: run <code>bld eval</code>.</p>"
    keys = list(dict.fromkeys(key for *_, figures in rows for key in figures))
    cells = [[run, model, corpus, *[figures.get(key) for key in keys]] for run, model, corpus, figures in rows]
    return html_table(["run", "model", "corpus", *[key.replace("_", " ") for key in keys]], cells)


def last_steps_table(runs: Sequence[Run]) -> str:
    """The last step of each run that has metrics."""
    keys = ["step", *[plot.key for plot in PLOTS], "data_wait_share", "memory_bytes"]
    rows = [[run.name, *[run.metrics[-1].get(key) for key in keys]] for run in runs if run.metrics]
    return html_table(["run", *[key.replace("_", " ") for key in keys]], rows) if rows else "<p>No metrics yet.</p>"


def differences(runs: Sequence[Run]) -> list[list[object]]:
    """The recipe keys in which the runs differ: the key, then each run's value."""
    flat = [flatten(run.recipe) for run in runs]
    keys = sorted({key for values in flat for key in values})
    rows = [[key, *[_plain(values.get(key)) for values in flat]] for key in keys]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def _plain(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


def dump_table(recipe: Mapping[str, Any]) -> str:
    """The summary and the identity of the dump that a recipe names; empty where there is none on this machine."""
    path = Path(str(flatten(recipe).get("dump.path", "")))
    if not (path / "manifest.json").exists():
        return ""
    manifest = Manifest.load(path)
    summary = path / "summary.json"
    counts: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    counts["shards"] = f"{sum(shard.path(path).exists() for shard in manifest.shards)} of {len(manifest.shards)}"
    rows = [[key, _plain(value)] for key, value in (flatten(counts) | flatten(manifest.identity, "identity.")).items()]
    return f"<h2>Dump {html.escape(str(path))}</h2>" + html_table(["what", "value"], rows)


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    parts = [
        "<h2>Final figures</h2>",
        final_table(runs),
        "<h2>Last step</h2>",
        last_steps_table(runs),
        "<h2>Curves</h2>",
    ]
    parts += ['<div class="plots">', *[draw(plot, runs) for plot in PLOTS], "</div>"]
    if len(runs) > 1:
        parts.append("<h2>What differs between the recipes</h2>")
        rows = differences(runs)
        parts.append(html_table(["key", *[run.name for run in runs]], rows) if rows else "<p>Nothing.</p>")
    parts += dict.fromkeys(dump_table(run.recipe) for run in runs)
    if len(runs) == 1 and runs[0].recipe:
        rows = [[key, _plain(value)] for key, value in flatten(runs[0].recipe).items()]
        parts += ["<h2>Recipe</h2>", html_table(["key", "value"], rows)]
    title = html.escape(", ".join(run.name for run in runs))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page about some runs; returns its path."""
    text = page([read_run(folder) for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out
