"""The card of a dump, its `README.md`, as a hub shows it: a function of the files beside it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.loading import read_values
from pipeline.dumps.licence import describe
from pipeline.runtime.format import count_of
from schemas import dump_files
from schemas.dump_files import Key
from schemas.manifest import Manifest, flatten, read_json
from schemas.snippets import snippets
from schemas.storage.atomic import committed
from schemas.storage.locations import Location

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)
# Licence ids that a hub accepts; any other is given as `other`, with its name.
_HUB_IDS = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause)?|isc|cc0-1\.0|cc-by-(nc-|sa-|nc-sa-|nd-|nc-nd-)?[34]\.0|unlicense|zlib|"
    r"gemma|llama[234]|llama3\.[123]|openrail|bigscience-openrail-m|creativeml-openrail-m|openrail\+\+|"
    r"bigscience-bloom-rail-1\.0|deepl|wtfpl|mpl-2\.0|l?gpl-[23](\.0|\.1)?|agpl-3\.0"
)


def write_card(dump: Location) -> Location:
    """Write the card of a complete dump and return its path. Raises ValueError if there is no summary yet."""
    summary_path = dump / dump_files.SUMMARY
    if not summary_path.exists():
        raise ValueError(f"{dump} is not complete: it has no summary.json. Run `bld teacher` again to finish it.")
    summary = read_json(summary_path)
    recipe_path, audit_path = dump / dump_files.RECIPE, dump / dump_files.AUDIT
    recipe = read_values(recipe_path)
    audit = read_json(audit_path) if audit_path.exists() else None
    out = dump / dump_files.CARD
    with committed(out) as partial:
        partial.write_text(card(Manifest.load(dump), summary, recipe, audit), encoding="utf-8")
    return out


def card(manifest: Manifest, summary: Mapping[str, Any], recipe: Mapping[str, Any], audit: Any) -> str:
    """Return the text of the card.

    Args:
        recipe: the resolved recipe, as plain values; may be empty.
        audit: the contents of audit.json, or None if there is none.
    """
    teacher = recipe.get("teacher") or {}
    licence = teacher.get("license")
    identity = flatten(manifest.identity)
    model = public_name(str(identity.get("teacher.model", "unknown")))
    parts = [
        f"---\n{yaml.safe_dump(front_matter(model, licence, summary), sort_keys=False, allow_unicode=True)}---\n",
        f"# Next-byte distributions of {inline(model)}\n",
        "For every byte position of a corpus, a teacher's sparse next-byte distribution, for offline distillation "
        "into students with any tokenizer (Byte-Level Distillation, arXiv 2604.07466). "
        "Each row is a document, or a window of a long one.\n",
        "## Teacher\n",
        table({"model": model, **{k.removeprefix("teacher."): v for k, v in identity.items() if _teacher_fact(k)}}),
        f"**Licence**: {inline(describe(licence))}. This is a pointer, not legal advice.\n",
        "## Corpus\n",
        table(corpus_facts(manifest, summary, recipe)),
        "The text has its own licence, which this dump does not change.\n",
        "## Settings\n",
        table({k: v for k, v in identity.items() if not k.startswith(("teacher.", "corpus."))}),
        "## Contents\n",
        table({k: v for k, v in summary.items() if isinstance(v, int | float) and k != "schema_version"}),
        *(
            ["## Audit\n", "Fidelity measured on a sample while dumping (`audit.json`):\n", table(flatten(audit))]
            if audit
            else []
        ),
        "## Reading it\n",
        "Columns and units are in each file's Parquet metadata. Position 10 of document `0`, from this folder:\n",
        *_snippets(summary.get("schema_versions") or [manifest.schema_version]),
    ]
    return "\n".join(parts)


def front_matter(model: str, licence: str | None, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that a hub reads."""
    return {
        **hub_licence(licence),
        "pretty_name": f"Next-byte distributions of {model}",
        "tags": ["knowledge-distillation", "byte-level-distillation", "logits"],
        "task_categories": ["text-generation"],
        "size_categories": [size_category(int(summary.get("records", 0)))],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": dump_files.SHARD_FILES}]}],
    }


def size_category(number: int) -> str:
    """Return a hub's category for a data set of so many rows."""
    return next((name for limit, name in _SIZES if number < limit), "n>100M")


def hub_licence(licence: str | None) -> dict[str, str]:
    """Return a licence as a hub's metadata: by an id that it knows, or as another one by name."""
    if licence is None:
        return {"license": "unknown"}
    known = licence.lower()
    if _HUB_IDS.fullmatch(known):
        return {"license": known}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9._]+", "-", known).strip("-") or "unnamed"}


def _teacher_fact(key: str) -> bool:
    return key.startswith("teacher.") and key != "teacher.model"


def corpus_facts(manifest: Manifest, summary: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the text came from and how much of it was left out, by reason."""
    corpus = recipe.get("corpus") or {}
    settings = {key: corpus.get(key) for key in ("split", "limit", "skip", "unique", "key_pattern") if corpus.get(key)}
    excluded = ", ".join(public_name(str(other["source"])) for other in corpus.get("exclude") or [])
    merged = summary.get("merged_from")
    facts = {
        "source": public_name(str(corpus.get("source", "unknown"))),
        **flatten(manifest.identity.get("corpus") or {}),
        **settings,
        **({"excluded": excluded} if excluded else {}),
        **manifest.corpus_counts,
    }
    if merged:
        facts["source"] = "; ".join(f"{m['source']} ({count_of(m['documents'], 'document')})" for m in merged)
    unspelled = len(summary.get("left_out_unspellable") or {})
    changed = ", or its chat template changes it" if manifest.has_chats else ""
    return facts | ({f"left out: the tokenizer cannot spell it{changed}": unspelled} if unspelled else {})


def public_name(source: str) -> str:
    """Return a source in publishable form: a hub or package name unchanged, a local path without its folders."""
    if source.startswith("pypi:") or "://" in source:
        return source
    path = Path(source).expanduser()
    local = path.is_absolute() or source.startswith((".", "~")) or path.exists() or source.count("/") > 1
    return path.name if local and path.name else source


def inline(text: object) -> str:
    """Escape text so that Markdown and HTML show it unchanged."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ".join(str(text).split()))


def table(values: Mapping[str, Any]) -> str:
    """Return a Markdown table of two columns: a name and its value."""
    return rows_table(["what", "value"], list(values.items()))


def rows_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(map(inline, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{' --- |' * len(head)}", *lines[1:], ""])


def _snippets(versions: Sequence[int]) -> list[str]:
    """Return snippets for a dump whose shards are of these versions of the format."""
    shown = []
    for version in versions:
        of_version = snippets(version=version)
        code = [of_version[name] for name in ("pyarrow", "datasets")]
        if len(versions) > 1:
            shown.append(f"Of its shards whose `{Key.SCHEMA_VERSION}` is {version}, the only ones in `shards`:\n")
        shown += [f"```{one.language}\n{one.code}```\n" for one in code]
    return shown
