"""Conversions into the cache: a .gguf into a plain Hugging Face folder, a tokenizer file into a tokenizer folder.

A converted folder is absent or complete (written under another name, then renamed), and keyed by its source file and
`VERSION`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.sources.pypi import cache_folder
from pipeline.tokenization.file_formats import LLAMA3_PATTERN, QWEN_PATTERN, Converted, convert, from_bytes
from schemas.storage.atomic import first_folder

VERSION = "1"  # increase it when a conversion writes something else; old folders are then ignored


def tokenizer_folder(path: Path) -> Path:
    """Convert any tokenizer file to a folder that AutoTokenizer loads; from a .gguf only the tokenizer is read."""
    if path.suffix == ".gguf":
        return _converted(path, "gguf-tokenizer", lambda out: _gguf_tokenizer(path).save_pretrained(out))
    return _converted(path, "tokenizer", lambda out: _save_tokenizer(convert(path), out))


def byte_tokenizer() -> Path:
    """Return the folder of the tokenizer of the 256 bytes."""
    return _make(cache_folder() / "converted" / f"bytes-{VERSION}", lambda out: _save_tokenizer(from_bytes(), out))


def own_tokenizer(file: str, converted: object) -> Path:
    """Save what a plug-in's `tokenizer()` returned, as a folder. Raises ValueError if it is not a `Converted`."""
    if not isinstance(converted, Converted):
        raise ValueError(
            f"{file}: tokenizer() returns a {type(converted).__name__}, but must return a "
            "pipeline.tokenization.file_formats.Converted"
        )
    key = json.dumps([converted.tokenizer.to_str(), converted.bos, converted.eos])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = cache_folder() / "converted" / f"{Path(file).name}-{VERSION}-{digest}"
    return _make(folder, lambda out: _save_tokenizer(converted, out))


def gguf_model(path: Path) -> Path:
    """Convert a .gguf to a plain Hugging Face folder in bfloat16 safetensors.

    It holds weights, tokenizer, chat template and generation config.
    """

    def write(out: Path) -> None:
        shutil.copytree(tokenizer_folder(path), out, dirs_exist_ok=True)  # reading a large one takes a minute
        _write_gguf_weights(path, out)

    return _converted(path, "model", write)


def _converted(path: Path, kind: str, write: Callable[[Path], Any]) -> Path:
    stat = path.stat()
    key = f"{VERSION} {kind} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return _make(cache_folder() / "converted" / f"{path.name}-{kind}-{digest}", write)


def _make(folder: Path, write: Callable[[Path], Any]) -> Path:
    if folder.exists():
        return folder
    with first_folder(folder) as ready:
        write(ready)
    return folder


def _save_tokenizer(converted: Converted, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": converted.bos, "eos_token": converted.eos}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=converted.tokenizer,
        clean_up_tokenization_spaces=False,
        **{key: name for key, name in names.items() if name is not None},
    )
    wrapped.save_pretrained(out)


def _write_gguf_weights(path: Path, out: Path) -> None:
    """Dequantise the weights and copy them into a fresh model, so that no trace of quantisation is saved."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name: values.float().clone() for name, values in loaded.state_dict().items()}, strict=True)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)


def _gguf_tokenizer(path: Path) -> Any:
    """Load the tokenizer inside a .gguf, and restore what the conversion by transformers loses.

    A GGUF only names its split rule. Raises ValueError for an unknown name.
    """
    from transformers import AutoTokenizer

    fields = _gguf_fields(path)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    if fields["tokenizer.ggml.model"] == "gpt2":
        backend.pre_tokenizer = _split_rule(fields.get("tokenizer.ggml.pre", "default"), path)
    elif str(fields["general.architecture"]).startswith("gemma"):
        _add_whitespace_runs(backend)
    return tokenizer


def _gguf_fields(path: Path) -> dict[str, Any]:
    import gguf

    names = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    fields = gguf.GGUFReader(path).fields
    return {name: fields[name].contents() for name in names if name in fields}


def _split_rule(pre: str, path: Path) -> Any:
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre_

    if pre == "smollm":  # digits one by one, then GPT-2's rule
        return pre_.Sequence(
            [pre_.Digits(individual_digits=True), pre_.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if pre in ("gpt-2", "default"):
        return pre_.ByteLevel(add_prefix_space=False, use_regex=True)
    patterns = {"llama-bpe": LLAMA3_PATTERN, "qwen2": QWEN_PATTERN}
    if pre in patterns:
        split = pre_.Split(Regex(patterns[pre]), behavior="isolated", invert=False)
        return pre_.Sequence([split, pre_.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ValueError(
        f"{path}: its tokenizer splits text by the rule {pre!r} (tokenizer.ggml.pre), which is unknown; use the "
        "model's Hugging Face folder or hub name instead of the .gguf"
    )


def _add_whitespace_runs(backend: Any) -> None:
    """Make Gemma's runs of 2 to 31 spaces added tokens: from the plain vocabulary they are never chosen."""
    from tokenizers import AddedToken

    vocab = backend.get_vocab(with_added_tokens=False)
    runs = ["▁" * length for length in range(2, 32)]
    backend.add_tokens([AddedToken(run, normalized=True, special=False) for run in runs if run in vocab])
