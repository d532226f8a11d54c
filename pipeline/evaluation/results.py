"""Figures on text: their files in a run, and their table."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import CorpusConfig
from schemas.manifest import read_json


def result_path(run: Path, custom: Mapping[str, CorpusConfig]) -> Path:
    """Return the file in which a run's figures are stored.

    Args:
        run: the student's folder.
        custom: the `custom_corpus` of a command line. Its figures are stored beside eval.json, which has those of
            the recipe's own text.
    """
    if not custom:
        return run / "eval.json"
    [(name, corpus)] = custom.items()
    # Different texts may have files of the same name. The number of documents is not part of the name: a later
    # evaluation of the same text replaces an earlier one.
    which = hashlib.sha256(json.dumps([corpus.source, corpus.field]).encode()).hexdigest()[:6]
    return run / f"eval-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{which}.json"


def result_files(run: Path) -> list[Path]:
    """Return the files of a run that hold figures on text, the recipe's own text first."""
    own = run / "eval.json"
    return [*([own] if own.exists() else []), *sorted(run.glob("eval-*.json"))]


def read_results(run: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read all figures on text in a run, by model and corpus; empty if there are none.

    A corpus of a command line whose name is already in use is shown with the name of its file.
    """
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for path in result_files(run):
        remedy = "Delete it, and run `bld eval` again"
        read = read_json(path, remedy=remedy)
        if not all(isinstance(corpora, dict) for corpora in read.values()):
            raise ValueError(f"{path} is damaged: it holds no figures by model and corpus. {remedy}")
        used_names = {corpus for corpora in results.values() for corpus in corpora}
        for model, corpora in read.items():
            for corpus, figures in corpora.items():
                name = f"{corpus} ({path.stem.removeprefix('eval-')})" if corpus in used_names else corpus
                results.setdefault(model, {})[name] = figures
    return results


_HIDDEN = ("nats", "num_tokens", "num_windows", "text_sha256")  # only in the JSON


def print_results(results: Mapping[str, Mapping[str, Mapping[str, Any]]], console: Console | None = None) -> None:
    """Print a table with a row per model and corpus and a column per figure."""
    rows = [(model, corpus, figures) for model, corpora in results.items() for corpus, figures in corpora.items()]
    # Leave out columns that are empty or follow from others: the table would be too wide to read.
    names = dict.fromkeys(name for _, _, figures in rows for name, value in figures.items() if value != {})
    names = {name: None for name in names if name not in _HIDDEN}
    table = Table("model", "corpus", *[name.replace("_", " ") for name in names])
    for model, corpus, figures in rows:
        table.add_row(model, corpus, *[format_figure(figures.get(name)) for name in names])
    (console or Console()).print(table)


def format_figure(value: object) -> str:
    """Format a figure.

    Four decimals (four digits below 0.01), or thousands separators; a dash for None.
    """
    if isinstance(value, float):
        return f"{value:.4g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else ("-" if value is None else str(value))
