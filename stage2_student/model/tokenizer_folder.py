"""Tokenizers saved beside a model so that AutoTokenizer loads them unchanged, whatever the model's type."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from pipeline.runtime.huggingface import load_tokenizer
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.byte_tokenizer import ByteTokenizer

_MODULE, _CLASS = "tokenizer_as_written", "TokenizerAsWritten"
_NAMED = f"{_MODULE}.{_CLASS}"
_CODE = f'''"""The tokenizer of tokenizer.json unchanged: transformers would replace it by this model type's class."""

from transformers import PreTrainedTokenizerFast


class {_CLASS}(PreTrainedTokenizerFast):
    pass
'''


def save_tokenizer(wrapped: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """Write a transformers tokenizer into the folder of a saved model, whose config.json exists.

    Beside some types of model (qwen2), transformers 5 reads every tokenizer as the type's own class, with its rule for
    splitting text, whatever class tokenizer_config.json names. It does not if that file names code in the folder
    (`auto_map`): then, without `trust_remote_code`, it uses the named class and tokenizer.json as they are; with it, it
    uses the code, which adds nothing.

    Raises:
        ValueError: the tokenizer that is read back still differs.
    """
    wrapped.save_pretrained(folder)
    written = ByteTokenizer.from_wrapped(wrapped, str(folder)).sha256
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if _NAMED not in str(config.get("auto_map")) and _read_back(folder, trust_remote_code) == written:
        return
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, _NAMED]}}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
    if _read_back(folder, trust_remote_code) != written:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        read = type(load_tokenizer(ModelSource(str(folder), None, trust_remote_code))).__name__
        raise ValueError(
            f"the student's tokenizer cannot be saved beside a model of type {kind}: transformers reads it as {read}, "
            "which splits text differently, so that the student would be used with tokens that it has not learnt. "
            "Use a student.model of another type, or leave student.tokenizer out"
        )


def read_tokenizer(folder: Path, sha256: str, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder.

    This is what AutoTokenizer loads if that has this `ByteTokenizer.sha256`, otherwise its tokenizer.json: releases
    before `save_tokenizer` wrote students of some types so that AutoTokenizer reads a different tokenizer there.
    """
    with suppress(ValueError):  # a tokenizer that is not a tokenizer.json
        wrapped = load_tokenizer(ModelSource(str(folder), None, trust_remote_code))
        if ByteTokenizer.from_wrapped(wrapped, str(folder)).sha256 == sha256:
            return wrapped
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _read_back(folder: Path, trust_remote_code: bool) -> str | None:
    """Return `ByteTokenizer.sha256` of what AutoTokenizer loads; None if that is nothing that spells bytes."""
    try:
        return ByteTokenizer.load(ModelSource(str(folder), None, trust_remote_code)).sha256
    except ValueError:
        return None
