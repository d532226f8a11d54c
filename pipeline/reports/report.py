"""One self-contained HTML page about one or more runs: what they are, their curves, how they end and differ, and their dumps."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.reports.page import page
from pipeline.reports.runs import read_run, short_names
from schemas.storage.atomic import committed


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page about some runs; returns its path. Raises ValueError where a folder is not a run."""
    text = page([read_run(folder) for folder in folders], short_names(folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return out
