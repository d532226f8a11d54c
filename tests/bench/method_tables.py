"""Tables of the benchmark `methods`, from the figures per document that its file holds."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from tests.bench.kept_figures import read_figures
from tests.bench.quality import CONTROL, row
from tests.bench.quality_measures import SCALES, Figures, paired_interval

REFERENCES = ("teacher", "start")
OURS = "token_marginal"
MEASURES = {
    "bits/byte out of domain": ("out_of_domain", "bits_per_byte"),
    "bits/byte in domain": ("in_domain", "bits_per_byte"),
    "JSD out of domain, nats": ("out_of_domain", "jsd"),
    "JSD in domain, nats": ("in_domain", "jsd"),
}


def tables(figures: Mapping[str, Any], ours: str = OURS) -> dict[str, list[dict[str, Any]]]:
    """Return all tables: each method beside the control, `ours` beside each other one, and bits by kind of text."""
    found = {"table": _beside_control(figures), "kinds": _kinds(figures)}
    return found | ({"against": _against(figures, ours)} if ours in figures["methods"] else {})


def weights_of(setting: Sequence[str]) -> str:
    """Return the weights of the objectives that a setting's overrides give, as `1 kl + 0.3 ce`."""
    weights: dict[str, float] = {}
    for override in setting:
        key, _, value = override.partition("=")
        if key == "train.objectives":
            weights = dict(yaml.safe_load(value))
        elif key.startswith("train.objectives."):
            weights[key.removeprefix("train.objectives.")] = float(value)
    cross_entropy = weights.pop("ce", 0.0)
    parts = [f"{weight:g} {PurePath(name).stem}" for name, weight in weights.items() if weight]
    return " + ".join(parts + [f"{cross_entropy:g} ce"] * bool(cross_entropy))


def _beside_control(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [row(name, _seeds(figures, name), None) for name in REFERENCES]
    for name, entry in figures["methods"].items():
        seeds, control = list(entry["seeds"]), None
        if name != CONTROL and CONTROL in figures["methods"]:
            seeds = _shared(figures, name, CONTROL)
            control = _seeds(figures, CONTROL, seeds)
        made = row(name.split()[0], _seeds(figures, name, seeds), control)
        of_run = {"steps": entry["steps"], "seeds": len(seeds), "s/step": round(entry["step_seconds"], 2)}
        rows.append({"method": made.pop("method"), "weights": weights_of(entry["setting"])} | made | of_run)
    return rows


def _against(figures: Mapping[str, Any], ours: str) -> list[dict[str, Any]]:
    """Return what `ours` has less (negative) or more than each other method, with intervals."""
    rows = []
    heading_of_ours = f"{ours.split()[0]}, {weights_of(figures['methods'][ours]['setting'])}, less"
    for other in figures["methods"]:
        seeds = _shared(figures, ours, other)
        if other == ours or not seeds:
            continue
        setting = figures["methods"][other]["setting"]
        cells: dict[str, Any] = {heading_of_ours: other.split()[0], "weights": weights_of(setting)}
        for heading, (text, measure) in MEASURES.items():
            both = [[f.per_document(text, measure) for f in _seeds(figures, name, seeds)] for name in (ours, other)]
            value, *bounds = (round(SCALES.get(measure, 1.0) * bound, 4) for bound in paired_interval(*both))
            cells[heading] = {"value": value, "interval": bounds}
        rows.append(cells | {"seeds": len(seeds)})
    return rows


def _kinds(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return bits per byte by the kind that a document's id begins with, means over seeds."""
    rows = []
    for name in (*REFERENCES, *figures["methods"]):
        found = _seeds(figures, name)
        kinds = {record.doc_id.split("/")[0]: text for text, of in found[0].documents.items() for record in of}
        cells: dict[str, Any] = {"bits/byte of": name.split()[0]}
        if name in figures["methods"]:
            cells["weights"] = weights_of(figures["methods"][name]["setting"])
        for kind, text in kinds.items():
            of_kind = [
                Figures({text: [r for r in f.documents[text] if r.doc_id.split("/")[0] == kind]}, {}) for f in found
            ]
            cells[kind] = round(sum(f.mean(text, "bits_per_byte") for f in of_kind) / len(of_kind), 4)
        rows.append(cells)
    return rows


def _seeds(figures: Mapping[str, Any], name: str, wanted: Sequence[str] | None = None) -> list[Figures]:
    if name in REFERENCES:
        return [read_figures(figures["documents"], figures[name])]
    seeds = figures["methods"][name]["seeds"]
    return [read_figures(figures["documents"], seeds[seed]) for seed in (seeds if wanted is None else wanted)]


def _shared(figures: Mapping[str, Any], one: str, other: str) -> list[str]:
    seeds = figures["methods"][other]["seeds"]
    return [seed for seed in figures["methods"][one]["seeds"] if seed in seeds]
