"""Tables of `bld start`: how the rows of a moved student were made, and where it stands."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.evaluation.results import format_figure

ROW_KINDS = ("copied", "averaged", "fallback", "control", "unreachable")
_BUCKETS = {"made": "tokens of made rows", "after": "two tokens after one", "other": "all others"}


def print_start(figures: Mapping[str, Any], console: Console | None = None) -> None:
    """Print how the rows were made, and a table per text with a row per kind of token."""
    console = console or Console()
    rows = figures["rows"]
    if rows:
        counts = ", ".join(f"{rows[kind]:,} {kind}" for kind in ROW_KINDS if rows.get(kind))
        made = f"embedding rows: {rows['input']}; head: {'tied to them' if rows['tied'] else rows['output']}"
        console.print(f"{counts}; {made}; {rows['seconds']:.0f} s", highlight=False)
    for name, of_text in figures["text"].items():
        table = Table(
            "tokens", "of tokens", "of bytes", "bits/byte", "before", "lost", title=name, title_justify="left"
        )
        for bucket, label in _BUCKETS.items():
            found = of_text["buckets"][bucket]
            shares = [f"{100 * found[share]:.1f} %" for share in ("share_of_tokens", "share_of_bytes")]
            table.add_row(label, *shares, *_bits(found["bits"], found["original_bits"]))
        table.add_row("all", "", "", *_bits(of_text["bits_per_byte"], of_text["original_bits_per_byte"]))
        console.print(table)


def _bits(after: float, before: float) -> list[str]:
    return [format_figure(value) for value in (after, before, after - before)]
