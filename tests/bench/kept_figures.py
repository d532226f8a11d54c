"""Figures per document in a file of results, so that a table grows by seeds and methods, on any machine.

What belongs to a document alone stands once; each model's figures are columns in the same order.

    documents:  {text: {ids, positions, bytes}}
    teacher, start, methods.NAME.seeds.SEED:  {text: {measure: values}}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stage2_student.evaluation.divergence import DocumentDivergence
from tests.bench.quality_measures import Figures

OF_DOCUMENTS = {"ids": "doc_id", "positions": "positions", "bytes": "num_bytes"}
OF_MODELS = {"nats": "token_nats", "jsd_nats": "jsd_nats", "clear": "clear", "kl_clear_nats": "kl_clear_nats"}
DIGITS = 6  # of a sum over a document; what is printed has four


def documents_of(found: Figures) -> dict[str, Any]:
    """Return what all models share of the documents of each text."""
    return {name: _columns(records, OF_DOCUMENTS) for name, records in found.documents.items()}


def figures_of(found: Figures) -> dict[str, Any]:
    """Return one model's figures of the documents of each text."""
    return {name: _columns(records, OF_MODELS) for name, records in found.documents.items()}


def read_figures(documents: Mapping[str, Any], figures: Mapping[str, Any]) -> Figures:
    """Return what `documents_of` and `figures_of` were given."""
    found = {}
    for name, shared in documents.items():
        columns = {field: shared[key] for key, field in OF_DOCUMENTS.items()}
        columns |= {field: figures[name][key] for key, field in OF_MODELS.items()}
        rows = zip(*(columns[field] for field in DocumentDivergence._fields), strict=True)
        found[name] = [DocumentDivergence(*row) for row in rows]
    return Figures(found, {})


class KeptSeeds:
    """Figures that a file of results already holds of a method, by its number of steps, setting and seed."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known

    def check(self, documents: Mapping[str, Any]) -> None:
        """Raise ValueError if the file's figures are of other documents."""
        if self.known and self.known["documents"] != documents:
            raise ValueError("the file holds figures of other documents; keep these under another name: --save NAME")

    def settled(self, method: str, searched: bool, steps: int) -> tuple[tuple[str, ...], int] | None:
        """Return the setting and steps that the file holds for this question; None if it was not asked."""
        entry = self._methods.get(method)
        if entry is None or (entry["searched"], entry["asked_steps"]) != (searched, steps):
            return None
        return tuple(entry["setting"]), entry["steps"]

    def entry(self, method: str, setting: Sequence[str], steps: int) -> dict[str, Any]:
        """Return the method's entry if it is of this setting and number of steps; empty otherwise."""
        entry = self._methods.get(method, {})
        same = entry and (tuple(entry["setting"]), entry["steps"]) == (tuple(setting), steps)
        return dict(entry) if same else {}

    @property
    def _methods(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.known.get("methods", {})
        return found


def _columns(records: Sequence[DocumentDivergence], fields: Mapping[str, str]) -> dict[str, list[Any]]:
    return {key: [_short(getattr(record, field)) for record in records] for key, field in fields.items()}


def _short(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
