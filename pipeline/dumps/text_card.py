"""The card of a written corpus, its `README.md`, as a hub shows it: a function of the files beside it."""

from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.dumps.card import hub_licence, inline, public_name, size_category, table
from pipeline.dumps.licence import describe
from schemas import dump_files
from schemas.manifest import flatten
from schemas.storage.atomic import committed
from schemas.storage.locations import Location
from schemas.text_corpus import COLUMNS, TextManifest


def write_text_card(folder: Location, manifest: TextManifest, summary: Mapping[str, Any], licence: str | None) -> None:
    """Write the card of a complete corpus."""
    with committed(folder / dump_files.CARD) as partial:
        partial.write_text(text_card(manifest, summary, licence), encoding="utf-8")


def text_card(manifest: TextManifest, summary: Mapping[str, Any], licence: str | None) -> str:
    """Return the text of the card; `licence` is the writer's."""
    identity = flatten(manifest.identity)
    model = public_name(str(identity["writer.model"]))
    front = {
        **hub_licence(licence),
        "pretty_name": f"Text written by {model}",
        "tags": ["synthetic", "knowledge-distillation"],
        "task_categories": ["text-generation"],
        "size_categories": [size_category(int(summary["kept"]))],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": dump_files.SHARD_FILES}]}],
    }
    left_out = {
        f"left out: {reason}": counted["number"]
        for name in ("left_out_prompts", "left_out_completions")
        for reason, counted in summary[name].items()
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# Text written by {inline(model)}\n",
        "Prompts, and what a language model wrote after them. What it wrote is marked as supervised, by the bytes of a "
        "text or the messages of a chat; END is, too, where the model ended by itself.\n",
        "## Writer\n",
        table(_facts_of_writer(identity) | {"model": model}),
        f"**Licence**: {inline(describe(licence).replace('the teacher', 'the writer'))}. "
        "This is a pointer, not legal advice.\n",
        "## Prompts and sampling\n",
        table({key: value for key, value in identity.items() if not key.startswith("writer.")}),
        "The prompts have their own licence, which this corpus does not change.\n",
        "## Contents\n",
        table({key: value for key, value in summary.items() if isinstance(value, int | float)} | left_out),
        "## Columns\n",
        table({name: meaning for name, _, meaning in COLUMNS}),
    ]
    return "\n".join(parts)


def _facts_of_writer(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("writer."): value for key, value in identity.items() if key.startswith("writer.")}
