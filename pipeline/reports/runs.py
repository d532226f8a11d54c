"""Data of a report, read from the folders of runs and of their dumps; nothing is drawn here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import Recipe
from pipeline.config.loading import read_values
from pipeline.evaluation.results import read_results
from pipeline.evaluation.task_table import load_tasks
from pipeline.runtime.plugins import is_own
from schemas import dump_files
from schemas.manifest import Manifest, read_json


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder; empty where a file does not exist yet.

    `tasks` are the harness' results by model. `start` says how the student was moved to its tokenizer, if it was.
    `identity` is everything that decides the trained weights.
    """

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Return the last logged step; 0 before the first."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def num_steps(self) -> int | None:
        """Return the planned number of steps; None if there is no recipe."""
        return dict(self.recipe.get("train") or {}).get("steps")

    @property
    def state(self) -> str:
        """Return the progress of the run, in words."""
        if not self.metrics:
            return "no step yet"
        if self.num_steps is None:
            return f"step {self.step:,}"
        if self.summary.get("ended_early") and self.summary.get("step") == self.step:
            return f"ended early: step {self.step:,} of {self.num_steps:,}"
        return "finished" if self.step >= self.num_steps else f"unfinished: step {self.step:,} of {self.num_steps:,}"

    @property
    def own_objectives(self) -> list[str]:
        """Return the names, as in the metrics, of objectives computed by the operator's own files."""
        weights = dict(dict(self.recipe.get("train") or {}).get("objectives") or {})
        return [Path(name).stem for name, weight in weights.items() if is_own(name) and weight]

    def logged_by(self, figure: str) -> list[str]:
        """Return the names of corpora, of a union or of held-out text, of which a figure is logged: `loss/NAME`."""
        keys = dict.fromkeys(key for line in self.metrics for key in line)
        return sorted(key.removeprefix(f"{figure}/") for key in keys if key.startswith(f"{figure}/"))

    @property
    def best_held_out(self) -> dict[str, Any] | None:
        """Return the logged step with the lowest held-out bits per byte; None if training had no evaluation."""
        measured = [line for line in self.metrics if line.get("eval_bits_per_byte") is not None]
        return min(measured, key=lambda line: float(line["eval_bits_per_byte"]), default=None)


def read_run(folder: Path) -> Run:
    """Read a run. Raises ValueError if the folder is not one, or if a line of its metrics is not JSON."""
    metrics, recipe = folder / "metrics.jsonl", folder / dump_files.RECIPE
    evaluation = read_results(folder)
    if not (metrics.exists() or evaluation):
        raise ValueError(f"{folder} is not a student's run: no metrics.jsonl, no eval.json. Run `bld student` first.")
    return Run(
        folder=folder,
        metrics=read_metrics(metrics) if metrics.exists() else [],
        evaluation=evaluation,
        recipe=with_defaults(read_values(recipe)) if recipe.exists() else {},
        tasks={model.name: load_tasks(model) for model in sorted((folder / "tasks").glob("*")) if model.is_dir()},
        start=_json(folder / dump_files.START / dump_files.TRANSFER),
        summary=_json(folder / dump_files.SUMMARY),
        identity=_json(folder / dump_files.RUN_IDENTITY),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read one dict per step, in order. If a resume repeated a step, the last counts; a cut last line is left out."""
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
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise ValueError(f"{path}, line {number} has no step; repair or delete that line")
        steps[values["step"]] = values
    return [steps[step] for step in sorted(steps)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest names that distinguish the runs' folders; for a single run, the last two parts.

    A common ending is left out; the name is the fewest parts before it.
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) == 1:
        return ["/".join(own[-2:]) for own in parts]
    while all(len(own) > 1 for own in parts) and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    longest = max(map(len, parts))
    enough = next((n for n in range(1, longest) if len({own[-n:] for own in parts}) == len(set(parts))), longest)
    return ["/".join(own[-enough:]) for own in parts]


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that are newer than the recipe; values that are no longer a valid recipe are left unchanged."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested values to `a.b.0.c: text`, with the text as in a recipe."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def differences(runs: Sequence[Run]) -> list[list[str | None]]:
    """Return the recipe keys whose values differ: the key, then each run's value; None if a recipe lacks the key.

    The runs' own paths always differ, and are left out.
    """
    flat = [flattened(run.recipe) for run in runs]
    keys = sorted({key for values in flat for key in values} - {"student.path"})
    rows: list[list[str | None]] = [[key, *[values.get(key) for values in flat]] for key in keys]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


@dataclass(frozen=True)
class Dump:
    """A dump that runs were trained on; `path` is None if it is not on this machine.

    Attributes:
        name: its path in the recipe.
        summary, audit: empty if the file does not exist.
        shards: number of existing shards and of planned ones.
    """

    name: str
    path: Path | None
    identity: dict[str, Any] = field(default_factory=dict)
    corpus_counts: dict[str, int] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    shards: tuple[int, int] = (0, 0)


def read_dumps(runs: Sequence[Run]) -> list[Dump]:
    """Read the dumps that the runs' recipes name, each once."""
    dumps: dict[tuple[str, Path | None], Dump] = {}
    for run in runs:
        for name in _dump_names(run.recipe):
            path = _find_dump(run, name)
            if (name, path) not in dumps:
                dumps[name, path] = Dump(name, None) if path is None else _read_dump(name, path)
    return list(dumps.values())


def _dump_names(recipe: Mapping[str, Any]) -> list[str]:
    several = [str(ref["path"]) for ref in dict(recipe.get("student") or {}).get("dumps") or ()]
    own = dict(recipe.get("dump") or {}).get("path")
    return several or ([str(own)] if own is not None else [])


def _find_dump(run: Run, name: str) -> Path | None:
    """Find a dump's folder, relative to where the run's own path starts, or to the current folder."""
    own = Path(str(dict(run.recipe.get("student") or {}).get("path", "")))
    folder = run.folder.resolve()
    bases = [Path()]
    if own.parts and not own.is_absolute() and folder.parts[-len(own.parts) :] == own.parts:
        bases.insert(0, Path(*folder.parts[: -len(own.parts)]))
    return next((base / name for base in bases if (base / name / dump_files.MANIFEST).exists()), None)


def _read_dump(name: str, path: Path) -> Dump:
    manifest = Manifest.load(path)
    num_existing = sum(shard.path(path).exists() for shard in manifest.shards)
    return Dump(
        name=name,
        path=path,
        identity=manifest.identity,
        corpus_counts=manifest.corpus_counts,
        summary=_json(path / dump_files.SUMMARY),
        audit=_json(path / dump_files.AUDIT),
        shards=(num_existing, len(manifest.shards)),
    )


def _json(path: Path) -> dict[str, Any]:
    """Read a file's values; empty if it does not exist yet."""
    return read_json(path) if path.exists() else {}
