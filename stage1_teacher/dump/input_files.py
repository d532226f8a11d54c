"""A quick check, by sizes and times of files, that a dump is complete and its inputs unchanged: nothing to do then.

`inputs.json` in the dump's folder holds a hash of the inputs, one of the manifest and one of the shards' sizes and
times; it names no path. If it is missing or does not match, or an input has no file here (a hub's data set, an
address), everything is read and compared, as for an incomplete dump.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import snapshot_download

from pipeline.config import CorpusConfig, Recipe
from pipeline.corpus.rows import source_files
from pipeline.sources.file_hash import file_state
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from schemas import dump_files
from schemas.manifest import Manifest, read_json, write_json
from schemas.storage.locations import Location, location, names_below
from stage1_teacher.engines.registry import engine_name

_PLAN_VERSION = 1  # raised with any change of what is planned from the same files under the same arithmetic
# What a store's file system tells of a file that changes with its content.
_CHANGES = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "Last-Modified", "mtime")
_WHEN_DONE = (dump_files.INPUTS, dump_files.MANIFEST, dump_files.SUMMARY, dump_files.AUDIT, dump_files.CARD)


class _UntoldError(Exception):
    """An input without a file on this machine."""


def inputs_sha256(recipe: Recipe) -> str | None:
    """Return a hash of everything that decides the dump's content; None if an input has no file here.

    That is the recipe, the engine's version, and path, size and time of each input file. No file's content is read.
    """
    try:
        stated = [(str(file), *file_state(file.stat())) for file in sorted(set(_files(recipe)))]
    except _UntoldError:
        return None
    settings = {
        "corpus": recipe.corpus.model_dump(mode="json"),
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"license"}),
        "dump": recipe.dump.model_dump(mode="json", exclude={"path"}),
        "engine": engine_name(recipe.teacher, recipe.placement),
        "files": stated,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _files(recipe: Recipe) -> Iterator[Path]:
    teacher = recipe.teacher
    yield from _corpus_files(recipe.corpus, recipe.dump.arithmetic_used)
    if teacher.engine_spec.served:  # its weights are elsewhere, and only the server can say which they are
        raise _UntoldError
    yield from _folder_files(resolve_model(teacher.source).source, teacher.revision)
    if teacher.tokenizer is not None:
        yield from _folder_files(resolve_tokenizer(teacher.tokenizer), None)


def _corpus_files(corpus: CorpusConfig, arithmetic: int) -> Iterator[Path]:
    for name in _corpus_names(corpus, arithmetic):
        if "://" in name:
            raise _UntoldError
        yield Path(name).absolute()


def _corpus_names(corpus: CorpusConfig, arithmetic: int) -> Iterator[str]:
    files = source_files(corpus.source, arithmetic)
    if files is None:
        raise _UntoldError
    yield from files
    for other in corpus.exclude:
        yield from _corpus_names(other, arithmetic)


def plan_sha256(recipe: Recipe) -> str | None:
    """Return a hash of everything that decides the plan, with size and time of each file of the corpus.

    None if there is no telling whether the corpus has changed: it is a hub's, or a server tells neither time nor hash
    of its file.
    """
    try:
        names = list(_corpus_names(recipe.corpus, recipe.dump.arithmetic_used))
        states = [_address_state(name) if "://" in name else file_state(Path(name).stat()) for name in names]
    except _UntoldError:
        return None
    settings = {
        "version": _PLAN_VERSION,
        "corpus": recipe.corpus.model_dump(mode="json"),
        "arithmetic": recipe.dump.arithmetic_used,
        "shard_bytes": int(recipe.dump.shard_bytes),
        "audit_documents": recipe.dump.audit_documents,
        "files": list(zip(names, states, strict=True)),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _address_state(address: str) -> tuple[int | str, ...]:
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
        told = filesystem.info(path)
    except (ImportError, OSError, ValueError) as error:  # reading it says what is wrong
        raise _UntoldError from error
    changing = [str(told[key]) for key in _CHANGES if told.get(key)]
    if not changing or told.get("size") is None:
        raise _UntoldError
    return int(told["size"]), *changing


def _folder_files(source: str, revision: str | None) -> Iterator[Path]:
    """Yield the files of a local model or tokenizer, or of the hub's in the cache."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
        except (OSError, ValueError) as error:  # it is not in the cache
            raise _UntoldError from error
    yield from (file.absolute() for file in folder.rglob("*") if file.is_file())


def is_done(recipe: Recipe) -> bool:
    """Return whether a recipe's dump is complete and its inputs are unchanged since."""
    dump = location(recipe.dump.path)
    if not all((dump / name).exists() for name in _WHEN_DONE):
        return False
    noted = _noted(dump)
    return (
        noted.get("manifest_sha256") == _manifest_sha256(dump)
        and is_summed_up(dump, Manifest.load(dump))
        and are_as_noted(dump)
        and noted.get("inputs_sha256") == inputs_sha256(recipe)
    )


def is_summed_up(dump: Location, manifest: Manifest) -> bool:
    """Return whether `summary.json` lists the planned shards, and all exist with those sizes (in a store: exist)."""
    if not (dump / dump_files.SUMMARY).exists():
        return False
    listed = {str(shard["name"]): shard["bytes"] for shard in read_json(dump / dump_files.SUMMARY, "shards")["shards"]}
    planned = {dump_files.shard_name(shard.index): shard.file for shard in manifest.shards}
    if listed.keys() != planned.keys():
        return False
    if not isinstance(dump, Path):
        return not manifest.missing(dump)
    states = _shard_states(dump)
    return all(states.get(file, (None,))[0] == listed[name] for name, file in planned.items())


def are_as_noted(dump: Location) -> bool:
    """Return whether sizes and times of the shards are unchanged since the dump was complete.

    Also True in a store, and for a dump without a note.
    """
    noted = _noted(dump).get("shards_sha256")
    return noted is None or noted == _shards_sha256(dump)


def _noted(dump: Location) -> dict[str, Any]:
    """Read the note; empty if it is missing or damaged, in which case everything is checked and it is rewritten."""
    try:
        return read_json(dump / dump_files.INPUTS) if (dump / dump_files.INPUTS).exists() else {}
    except ValueError:
        return {}


def _shards_sha256(dump: Location) -> str | None:
    if not isinstance(dump, Path):
        return None
    stated = [(name, *state) for name, state in sorted(_shard_states(dump).items())]
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def _shard_states(dump: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of the files in `shards`, by their path within.

    Not the time of change (ctime), which a merge alters when it hard-links a shard.
    """
    folder = str(dump / dump_files.SHARDS)
    shards = [name for name in names_below(dump / dump_files.SHARDS) if name.endswith(dump_files.SHARD_SUFFIX)]
    # Not Path, which takes longer than the file system for thousands of files.
    stats = ((name, file_state(os.stat(f"{folder}/{name}"))) for name in shards)  # noqa: PTH116
    return {name: state[:2] for name, state in stats}


def note_inputs(dump: Location, recipe: Recipe, at_start: str | None) -> None:
    """Record the inputs of a complete dump, unless something has changed since the start."""
    if at_start is not None and at_start == inputs_sha256(recipe):
        shards = {} if (stated := _shards_sha256(dump)) is None else {"shards_sha256": stated}
        noted = {"inputs_sha256": at_start, "manifest_sha256": _manifest_sha256(dump), **shards}
        write_json(dump / dump_files.INPUTS, noted)


def _manifest_sha256(dump: Location) -> str:
    return hashlib.sha256((dump / dump_files.MANIFEST).read_text(encoding="utf-8").encode()).hexdigest()
