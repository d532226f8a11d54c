"""A recipe that is mended amid its rounds: what is made stays as it was made, the rest is made by the recipe as it is.

A round's parts are text, dump, training and score; sections of its recipe decide each. What a part that is made was
made with stays in the round's `recipe.yaml`, and `mended.json` beside it lists what was changed, and when.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Recipe
from pipeline.rounds.recipes import FIRST
from pipeline.runtime import log
from schemas import dump_files
from schemas.manifest import Manifest, flatten, read_json, write_json
from schemas.text_corpus import TextManifest, is_text_corpus

MENDED = "mended.json"
REMEDY = "Delete it, then run the same command again"
_PLACEMENT = ("num_processes", "hostfile", "prefetch", "micro_batch_tokens", "gradient_checkpointing", "packing")
_WATCHING = ("save_every", "keep_last", "log_every", "eval_every", "eval_documents", "wandb")
_MAY_CHANGE = ("placement.", *(f"train.{key}" for key in (*_PLACEMENT, *_WATCHING)))
# Sections that decide a part, by the part; the writer's own are checked by `bld generate`.
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "text": ("generate",),
    "dump": ("corpus", "teacher", "dump"),
    "training": ("student", "train"),
}
# What `train.change` lets a begun run take up, by the keys that it changes.
_CHANGES: Mapping[str, tuple[str, ...]] = {
    "lr": ("train.lr",),
    "batch_tokens": ("train.batch_tokens",),
    "objectives": (
        *("train.objectives.", "train.kl_", "train.alm_", "train.token_", "train.cdm_", "train.balance"),
        *("student.max_doubt", "student.max_token_end", "student.max_dropped"),
    ),
}


def changed_keys(there: Recipe, here: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the values of two recipes by key, where they differ in what decides the result."""
    ours, theirs = _decisive(here), _decisive(there)
    keys = sorted(theirs.keys() | ours.keys())
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return changes as text, the first few."""
    return "; ".join(f"{key}: {there!r} there, {here!r} here" for key, (there, here) in list(changed.items())[:5])


def require_comparable(folder: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ValueError for changes that rounds cannot take up once a round is done: scores would not compare."""
    fixed = {key: values for key, values in changed.items() if key.startswith("eval.") or key == "student.path"}
    if fixed:
        raise ValueError(
            f"{folder} is done, and was made with another recipe ({describe(fixed)}), by which rounds are compared. "
            "Restore these values, or give a new rounds.path and student.path"
        )


def with_changes(recipe: Recipe, changed: Mapping[str, tuple[Any, Any]]) -> Recipe:
    """Return the recipe of a round whose training takes up what was changed."""
    names = [name for name, starts in _CHANGES.items() if any(key.startswith(starts) for key in changed)]
    change = tuple(dict.fromkeys((*recipe.train.change, *names)))
    return recipe.with_values(train=recipe.train.model_copy(update={"change": change}))


def mended(folder: Path, there: Recipe, here: Recipe, number: int) -> Recipe:
    """Return the recipe with which a begun round goes on, and record what is changed.

    Args:
        there: the recipe that it was begun with.
        here: the recipe as it is now.
    Raises:
        ValueError: a part that is half made was begun with other values.
    """
    changed = changed_keys(there, here)
    if not changed:
        return there
    if "student.path" in changed:
        raise ValueError(
            f"{folder} was begun with another recipe ({describe({'student.path': changed['student.path']})}). Restore "
            "this value, or give a new rounds.path, too"
        )
    made = _made_parts(folder)
    for part, sections in _SECTIONS.items():
        own = {key: values for key, values in changed.items() if key.split(".")[0] in _deciding(part, number)}
        if part in made:
            here = here.with_values(**{section: getattr(there, section) for section in sections})
        elif own and part != "training":  # `bld student` refuses what a begun run cannot take up
            _clear(folder / part, own)
            if part == "text":
                _clear(folder / "dump", own)
    taken = changed_keys(there, here)
    if not taken:
        log.info(f"{folder}: {', '.join(made)}: made before the recipe was changed, and kept as made")
        return there
    if "training" not in made:
        here = with_changes(here, taken)
    kept = f"; {', '.join(made)} stay as made" if made else ""
    log.warning(f"{folder}: the recipe was changed since this round began, and is followed ({describe(taken)}){kept}")
    entry = {"kept": made, "changed": {key: {"from": old, "to": new} for key, (old, new) in taken.items()}}
    write_json(folder / MENDED, {"mended": [*recorded(folder), entry]})
    return here


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return what was changed of a round's recipe since it began, oldest first."""
    path = folder / MENDED
    return list(read_json(path, "mended", remedy=REMEDY)["mended"]) if path.exists() else []


def is_text_made(folder: Path) -> bool:
    """Tell whether a round's text is complete, and holds something to dump."""
    text = folder / "text"
    summary = text / dump_files.SUMMARY
    if not summary.exists() or TextManifest.load(text).missing(text):
        return False
    return bool(read_json(summary, "kept", remedy=REMEDY)["kept"])


def require_text(folder: Path) -> None:
    """Raise ValueError, saying why, if everything that was written in a round was left out."""
    summary = folder / "text" / dump_files.SUMMARY
    if summary.exists() and not (values := read_json(summary, "kept", remedy=REMEDY))["kept"]:
        reasons = {**values.get("left_out_prompts", {}), **values.get("left_out_completions", {})}
        said = "; ".join(f"{counted['number']} {reason}" for reason, counted in reasons.items())
        raise ValueError(
            f"{folder}/text: nothing that was written is kept ({said}). Change what causes this, e.g. "
            "generate.max_new_tokens or generate.prompts, and run the same command again: this text is written anew"
        )


def _made_parts(folder: Path) -> list[str]:
    dump = folder / "dump"
    made = {
        "text": is_text_made(folder),
        "dump": (dump / dump_files.SUMMARY).exists() and not Manifest.load(dump).missing(dump),
        "training": (folder / "export").exists(),
    }
    return [part for part, is_made in made.items() if is_made]


def _deciding(part: str, number: int) -> Sequence[str]:
    """Return the sections that decide a part, the writer's included."""
    return (*_SECTIONS[part], "teacher") if part == "text" and number == FIRST else _SECTIONS[part]


def _clear(part: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Remove a part of which nothing is made, or of which nothing is kept. Raises ValueError if it is half made."""
    if not part.exists():
        return
    summary = part / dump_files.SUMMARY
    is_useless = is_text_corpus(part) and summary.exists() and not read_json(summary, "kept", remedy=REMEDY)["kept"]
    if not is_useless and (shards := len(list((part / dump_files.SHARDS).rglob("*.parquet")))):
        raise ValueError(
            f"{part} is half made ({shards} shards) with another recipe ({describe(changed)}). Restore these values, "
            "or delete that folder to make it anew with the new ones"
        )
    shutil.rmtree(part)


def _decisive(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = flatten(recipe.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not key.startswith(_MAY_CHANGE) and key != "train.change"}
