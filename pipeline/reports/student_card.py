"""The model card of an exported student, its `README.md`, as a hub shows it: a function of the run's files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.loading import read_values
from pipeline.dumps import hub
from pipeline.dumps.card import hub_licence, inline, public_name, rows_table, table
from pipeline.dumps.licence import binds, describe, find_licence
from pipeline.evaluation.results import format_figure, result_files
from pipeline.evaluation.task_table import table_rows
from pipeline.reports.runs import Dump, Run, read_dumps, read_run
from pipeline.runtime.plugins import is_own
from schemas import dump_files
from schemas.json_text import json_text
from schemas.manifest import flatten, read_json
from schemas.storage.atomic import committed

_ROWS_CODE = "rows_sha256"  # of a run's student section: hashes of the operator's files that make rows
_FIGURES = ("num_documents", "num_bytes", "bits_per_byte", "text_sha256")
_TRAINED_WITH = ("student", "train", "deepspeed")
_COUNTS = ("documents", "document_bytes", "positions")
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("REPO") for kind in (AutoModelForCausalLM, AutoTokenizer))
```
"""


def write_student_card(run: Path, model: Path) -> Path:
    """Write the card of an exported model and its `training.json`, and return the card's path.

    Args:
        run: the student's folder.
        model: its export.
    Raises:
        ValueError: one of them is not what it should be.
    """
    identity = public_identity(read_json(run / dump_files.RUN_IDENTITY))
    step = int(read_json(model / dump_files.DISTILLED, "step")["step"])
    found = read_run(run)
    text = student_card(found, model, identity, base_licence(found))
    for name, content in (
        (hub.TRAINING, json_text({"step": step, **identity}, indent=1) + "\n"),
        (dump_files.CARD, text),
    ):
        with committed(model / name) as partial:
            partial.write_text(content, encoding="utf-8")
    return model / dump_files.CARD


def public_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's identity in publishable form: its models and files without local folders."""
    student, train = dict(identity["student"]), dict(identity["train"])
    student |= {key: public_name(str(student[key])) for key in ("model", "interface") if key in student}
    for key, values in (("transfer", student.get("transfer")), (_ROWS_CODE, student.get(_ROWS_CODE))):
        if values is not None:  # files that make rows are named in both
            student[key] = {_file_name(name): _file_name(value) for name, value in values.items()}
    train["objectives"] = {Path(name).name: weight for name, weight in train["objectives"].items()}
    found = {**identity, "student": student, "train": train, **_public_dumps(identity)}
    if "corpora" in identity:
        found["corpora"] = {name: {**own, **_public_dumps(own)} for name, own in identity["corpora"].items()}
    if "trained_on" in identity:
        found["trained_on"] = [
            {**entry, **({"changed": [*map(_public_change, entry["changed"])]} if "changed" in entry else {})}
            for entry in identity["trained_on"]
        ]
    if "own_code" in identity:
        found["own_code"] = {Path(name).name: digest for name, digest in identity["own_code"].items()}
    return found


def _file_name(value: Any) -> Any:
    """Return the name of an operator's own file without its folders, and anything else as it is."""
    return Path(value).name if isinstance(value, str) and is_own(value) else value


def _public_change(text: str) -> str:
    """Return what changed, as `identity_differences` describes it, without local folders."""
    field, mark, values = text.partition(": ")
    field = re.sub(r"^(own_code|train\.objectives)\..*/", r"\1.", field)
    return field + mark + re.sub(r"'([^']*/[^']*)'", lambda found: repr(public_name(found[1])), values)


def _public_dumps(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identities of a corpus' dumps in publishable form."""
    found = {"dump": _public_dump(corpus["dump"])} if "dump" in corpus else {}
    others = corpus.get("other_dumps") or {}
    return found | ({"other_dumps": {key: _public_dump(dump) for key, dump in others.items()}} if others else {})


def _public_dump(dump: Mapping[str, Any]) -> dict[str, Any]:
    teacher = dict(dump.get("teacher") or {})
    return {**dump, "teacher": {**teacher, "model": public_name(str(teacher.get("model", "unknown")))}}


def student_card(run: Run, model: Path, identity: Mapping[str, Any], licence: str | None) -> str:
    """Return the text of the card.

    Args:
        model: the exported model.
        identity: the run's, in publishable form.
        licence: the base model's; None if it is not known.
    """
    step = int(read_json(model / dump_files.DISTILLED, "step")["step"])
    dumps = read_dumps([run])
    licences = [_teacher_licence(dump) for dump in dumps]
    base = str(identity["student"]["model"])
    history = identity.get("trained_on") or []
    parts = [
        f"---\n{yaml.safe_dump(front_matter(base, licence, licences), sort_keys=False, allow_unicode=True)}---\n",
        f"# {inline(base)}, distilled through bytes\n",
        "A causal language model trained from a teacher's next-byte distributions, which need no common tokenizer "
        "(Byte-Level Distillation, arXiv 2604.07466). What it was trained with is no longer part of it: these are "
        "ordinary weights with an ordinary tokenizer.\n",
        _USE,
        "## Base model\n",
        table(_base_facts(run, base, licence)),
        "## Teachers and their licences\n",
        *[_teacher(dump, of_teacher) for dump, of_teacher in zip(dumps, licences, strict=True)],
        "These are pointers, not legal advice; the base model's licence applies as well.\n",
        "## Training\n",
        table({"steps": step, **_shares(identity), **flatten({key: identity[key] for key in _TRAINED_WITH})}),
        *(["Trained on with changes, each from the step named:\n", _history(history)] if history else []),
        "## Figures\n",
        *_figures(run, model),
    ]
    return "\n".join(parts)


def front_matter(base: str, licence: str | None, of_teachers: Sequence[str | None]) -> dict[str, Any]:
    """Return the metadata that a hub reads.

    The licence is the base model's, unless a teacher's binds its students or is not known.
    """
    stated = hub_licence(licence)
    if any(binds(of_teacher) for of_teacher in of_teachers):
        stated = {"license": "other", "license_name": "see-teachers-and-their-licences"}
    is_on_hub = base.count("/") == 1 and ":" not in base
    return {
        **stated,
        **({"base_model": base, "base_model_relation": "finetune"} if is_on_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "byte-level-distillation"],
    }


def _base_facts(run: Run, base: str, licence: str | None) -> dict[str, Any]:
    student = dict(run.recipe.get("student") or {})
    tokenizer = student.get("tokenizer")
    rows = {f"rows: {name.replace('_', ' ')}": value for name, value in run.start.items() if isinstance(value, int)}
    return {
        "model": base,
        "revision": student.get("revision") or "not pinned",
        "licence": licence or "not known",
        "tokenizer": public_name(str(tokenizer)) if tokenizer else "the model's own",
        **rows,
    }


def base_licence(run: Run) -> str | None:
    """Return the licence that the base model states, on its own card or in its file; None if it states none."""
    student = dict(run.recipe.get("student") or {})
    source = str(student.get("model", ""))
    return find_licence(source, source, student.get("revision"))


def _teacher_licence(dump: Dump) -> str | None:
    if dump.path is None or not (dump.path / dump_files.RECIPE).exists():
        return None
    found = dict(read_values(dump.path / dump_files.RECIPE).get("teacher") or {}).get("license")
    return None if found is None else str(found)


def _teacher(dump: Dump, licence: str | None) -> str:
    facts = {k.removeprefix("teacher."): v for k, v in flatten(dump.identity).items() if k.startswith("teacher.")}
    model = public_name(str(facts.pop("model", "unknown")))
    corpus = flatten(dict(dump.identity.get("corpus") or {}))
    counts = {name: dump.summary[name] for name in _COUNTS if name in dump.summary}
    rows: dict[str, Any] = {"dump": public_name(dump.name), "model": model, **facts}
    rows |= {f"corpus: {key}": value for key, value in corpus.items()} | counts
    return f"{table(rows)}\n**Licence**: {inline(describe(licence))}.\n"


def _shares(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return the share of the supervised bytes that each corpus of a union has."""
    return {f"share of {name}": f"{own['share']:.1%}" for name, own in (identity.get("corpora") or {}).items()}


def _history(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [str(entry["from_step"]), "; ".join(entry.get("changed") or ["schedule"]).replace(" there, ", " before, ")]
        for entry in entries
    ]
    return rows_table(["from step", "what changed"], rows)


def _figures(run: Run, model: Path) -> list[str]:
    if not run.evaluation and not run.tasks:
        return ["Not evaluated: `bld eval` measures bits per byte and tasks.\n"]
    written = (model / "config.json").stat().st_mtime
    is_older = any(path.stat().st_mtime < written for path in result_files(run.folder))
    rows = [
        [of_model, corpus, *(_cell(figures.get(name)) for name in _FIGURES)]
        for of_model, corpora in run.evaluation.items()
        for corpus, figures in corpora.items()
    ]
    text = rows_table(["model", "text", *(name.replace("_", " ") for name in _FIGURES)], rows) if rows else ""
    parts = [*(["**Measured before this export was written**; `bld eval` measures it.\n"] if is_older else []), text]
    if run.tasks:
        head, of_tasks = table_rows(run.tasks, {}, {})
        parts.append(rows_table(head, of_tasks))
    return parts


def _cell(value: object) -> str:
    return value[:12] if isinstance(value, str) else format_figure(value)
