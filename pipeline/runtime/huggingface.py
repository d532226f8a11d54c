"""Models and tokenizers loaded by transformers, whole or not at all: what is missing or damaged is an error that names
it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime.model_source import ModelSource, as_source

if TYPE_CHECKING:
    import torch

_REMEDY = {
    "trust_remote_code": "It comes with Python code of its own. If you have read that and trust it, set trust_remote_code: true "
    "where the recipe names the model.",
    "no file named model.safetensors": "It holds no model.safetensors. Weights that are pickles are not read, for they run code: where you trust "
    "them, load them with transformers and `save_pretrained` the model into a folder, else fetch the model again.",
}


def load_model(source: ModelSource | str, dtype: "torch.dtype | str") -> Any:
    """Load a causal language model, on the CPU, from safetensors only.

    Args:
        source: a mere string is a local folder or hub name of which no code runs.
        dtype: "auto" for the checkpoint's own.

    Raises:
        ValueError: no safetensors, a damaged file, an architecture that is not known, code that is not trusted, or
            weights that the checkpoint does not hold: transformers would go on with random ones.
    """
    from transformers import AutoModelForCausalLM

    found = as_source(source)
    with _named(found.source, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            found.source,
            **found.options,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    lacking = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if lacking:
        raise ValueError(
            f"{found.source}: the checkpoint lacks weights of the model, or holds them in another shape: "
            f"{', '.join(lacking[:5])}{f' and {len(lacking) - 5} more' if len(lacking) > 5 else ''}. Fetch it again"
        )
    return model


def check_finite(model: Any, source: str) -> None:
    """Raise ValueError, naming tensors, where a model's weights hold NaN or infinity: all that is computed with them
    would be NaN.
    """
    import torch

    faulty = {
        name: int((~torch.isfinite(weight)).sum())
        for name, weight in model.named_parameters()
        if weight.numel() and not torch.isfinite(weight.detach().abs().max())
    }
    if faulty:
        named = ", ".join(f"{name} ({count:,} values)" for name, count in list(faulty.items())[:3])
        more = f" and {len(faulty) - 3} more" if len(faulty) > 3 else ""
        raise ValueError(
            f"{source}: weights that are NaN or infinite, in {named}{more}. Nothing can be computed with them: fetch the model again, or take "
            "an earlier checkpoint of it"
        )


def load_tokenizer(source: ModelSource | str) -> Any:
    """Load what AutoTokenizer makes of a local folder or a hub name.

    Args:
        source: a mere string is a local folder or hub name of which no code runs.
    Raises:
        ValueError: with the cause, where it makes nothing, or of a tokenizer with byte fallback a byte-level one or
            the reverse.
    """
    from transformers import AutoTokenizer

    found = as_source(source)
    with _named(found.source, "tokenizer"):
        wrapped = AutoTokenizer.from_pretrained(found.source, **found.options)
    if type(wrapped).__name__ not in (
        "TokenizersBackend",
        "PreTrainedTokenizerFast",
    ):  # these take tokenizer.json as it is
        _check_kind(found, wrapped)
    return wrapped


def _check_kind(found: ModelSource, wrapped: Any) -> None:
    """Raise ValueError where transformers has made a tokenizer of one kind into one of another.

    Beside some types of model (qwen2) it makes every tokenizer into that of the type: the vocabulary of one kind,
    written by the rules of the other, spells nothing.
    """
    from transformers.utils import cached_file

    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(found.source, "tokenizer.json", revision=found.revision, **missing_is_none)
    backend = getattr(wrapped, "backend_tokenizer", None)
    if path is None or backend is None:
        return
    written, made = (json.loads(text) for text in (Path(path).read_text(encoding="utf-8"), backend.to_str()))
    if _is_byte_level(written) != _is_byte_level(made):
        raise ValueError(
            f"{found.source}: transformers reads its tokenizer.json as a {type(wrapped).__name__}, as it does beside "
            f"every model of its type ({load_config(found).model_type}), and that is a tokenizer of another kind: its "
            "tokens would not be the text. Take a model of another type, or give its tokenizer from a folder without "
            "the model's config.json"
        )


_COUNT_FROM_PADDING = frozenset(
    {"roberta", "roberta-prelayernorm", "camembert", "xlm-roberta", "xlm-roberta-xl", "data2vec-text", "xmod"}
)


def max_positions(config: Any) -> int | None:
    """Positions that a model was made for; None where its config names none, as of Mamba.

    Nor where it scales them (YaRN and others): how many it has then is the engine's own business. RoBERTa and its kin
    have fewer than their max_position_embeddings: the rows up to the id that pads are not for text.
    """
    text = config.get_text_config()
    most, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    kinds = {
        rope.get("rope_type", "default"),
        *(part.get("rope_type", "default") for part in rope.values() if isinstance(part, dict)),
    }
    if kinds != {"default"} or (most or 0) <= 0:  # XLNet says -1
        return None
    return most - text.pad_token_id - 1 if counts_from_padding(config) else most


def counts_from_padding(config: Any) -> bool:
    """Return whether the model's first position is the one behind the id that pads, which is so a part of how it
    reads.
    """
    text = config.get_text_config()
    return text.model_type in _COUNT_FROM_PADDING and text.pad_token_id is not None


def _is_byte_level(definition: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")])


def learned_positions(config: Any) -> int | None:
    """Positions that the model has a row for each, so that there is none beyond them; None where they are computed
    (rotated).
    """
    return None if getattr(config.get_text_config(), "rope_parameters", None) else max_positions(config)


def check_positions(config: Any, tokens: int, key: str) -> None:
    """Raise ValueError where a text of `tokens`, which the recipe's `key` allows, has more than the model's
    `max_positions`.
    """
    most = max_positions(config)
    if most is not None and tokens > most:
        raise ValueError(
            f"{key} is {tokens}, and the model ({config.get_text_config().model_type}) has {most} positions (max_position_embeddings); "
            f"give {key}={most} or less"
        )


def load_config(source: ModelSource | str) -> Any:
    """Load the config of a local folder or hub name. Raises ValueError, with the cause, where it cannot be loaded."""
    from transformers import AutoConfig

    found = as_source(source)
    with _named(found.source, "config"):
        return AutoConfig.from_pretrained(found.source, **found.options)


@contextmanager
def _named(source: str, what: str) -> Iterator[None]:
    """Damaged files raise whatever the library that stumbled over them raises; a ValueError here says which file's
    folder it was.
    """
    try:
        yield
    except Exception as error:
        remedy = next((text for word, text in _REMEDY.items() if word in str(error)), None)
        said = remedy or f"{type(error).__name__}: {str(error).strip()}"
        raise ValueError(f"{source}: its {what} cannot be loaded. {said}") from error
