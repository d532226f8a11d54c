"""Models and tokenizers loaded by transformers, completely or not at all.

Whatever is missing or damaged is an error that names it.
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
    "trust_remote_code": (
        "It comes with its own Python code. If you have read and trust that code, set trust_remote_code: true where "
        "the recipe names the model."
    ),
    "no file named model.safetensors": (
        "It holds no model.safetensors. Pickled weights are not read because they run code: if you trust them, load "
        "them with transformers and `save_pretrained` the model into a folder; otherwise fetch the model again."
    ),
}


@contextmanager
def without_own_sampling(model: Any) -> Iterator[None]:
    """Generate without the settings that came with a model, except for its end tokens.

    A repetition penalty, beams or forbidden tokens of its `generation_config` fill in what a call of `generate` leaves
    open.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def load_model(source: ModelSource | str, dtype: "torch.dtype | str") -> Any:
    """Load a causal language model, on the CPU, from safetensors only.

    Args:
        source: a bare string is a local folder or hub name whose code is not run.
        dtype: "auto" for the checkpoint's own.

    Raises:
        ValueError: no safetensors, a damaged file, an unknown architecture, untrusted code, or weights missing from
            the checkpoint (transformers would continue with random ones).
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
    """Raise ValueError, naming the tensors, if a model's weights hold NaN or infinity.

    Everything computed with them would be NaN.
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
            f"{source}: weights that are NaN or infinite, in {named}{more}. Nothing can be computed with them: fetch "
            "the model again, or use an earlier checkpoint of it"
        )


def load_tokenizer(source: ModelSource | str) -> Any:
    """Load a tokenizer from a local folder or a hub name with AutoTokenizer.

    Args:
        source: a bare string is a local folder or hub name whose code is not run.
    Raises:
        ValueError: with the cause, if it cannot be loaded, or if AutoTokenizer turns a tokenizer with byte fallback
            into a byte-level one or the reverse.
    """
    from transformers import AutoTokenizer

    found = as_source(source)
    with _named(found.source, "tokenizer"):
        wrapped = AutoTokenizer.from_pretrained(found.source, **found.options)
    if type(wrapped).__name__ not in ("TokenizersBackend", "PreTrainedTokenizerFast"):  # these use tokenizer.json as is
        _check_kind(found, wrapped)
    return wrapped


def _check_kind(found: ModelSource, wrapped: Any) -> None:
    """Raise ValueError if transformers has turned one kind of tokenizer into another.

    For some model types (qwen2) it builds every tokenizer as that type's kind. A vocabulary of one kind under the rules
    of the other does not spell the text.
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
            f"{found.source}: transformers reads its tokenizer.json as a {type(wrapped).__name__}, as it does for "
            f"every model of this type ({load_config(found).model_type}). That is a different kind of tokenizer: its "
            "tokens would not spell the text. Use a model of another type, or give its tokenizer from a folder without "
            "the model's config.json"
        )


_COUNT_FROM_PADDING = frozenset(
    {"roberta", "roberta-prelayernorm", "camembert", "xlm-roberta", "xlm-roberta-xl", "data2vec-text", "xmod"}
)


def max_positions(config: Any) -> int | None:
    """Return the number of positions that a model was made for; None if its config names none, as for Mamba.

    Also None if the config scales positions (YaRN and others): the engine decides how many there are. RoBERTa and its
    relatives have fewer than their max_position_embeddings: the rows up to the padding id are not for text.
    """
    text = config.get_text_config()
    positions, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    kinds = {
        rope.get("rope_type", "default"),
        *(part.get("rope_type", "default") for part in rope.values() if isinstance(part, dict)),
    }
    if kinds != {"default"} or (positions or 0) <= 0:  # XLNet says -1
        return None
    return positions - text.pad_token_id - 1 if counts_from_padding(config) else positions


def counts_from_padding(config: Any) -> bool:
    """Return whether the model's first position is the one after the padding id, which then affects how it reads."""
    text = config.get_text_config()
    return text.model_type in _COUNT_FROM_PADDING and text.pad_token_id is not None


def _is_byte_level(definition: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")])


def learned_positions(config: Any) -> int | None:
    """Return the number of learned position rows, a hard limit; None if positions are computed (RoPE)."""
    return None if getattr(config.get_text_config(), "rope_parameters", None) else max_positions(config)


def check_positions(config: Any, tokens: int, key: str) -> None:
    """Raise ValueError if the recipe's `key` allows texts of `tokens`, more than the model's `max_positions`."""
    limit = max_positions(config)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{key} is {tokens}, and the model ({config.get_text_config().model_type}) has {limit} positions "
            f"(max_position_embeddings); give {key}={limit} or less"
        )


def load_config(source: ModelSource | str) -> Any:
    """Load the config of a local folder or hub name. Raises ValueError, with the cause, if that fails."""
    from transformers import AutoConfig

    found = as_source(source)
    with _named(found.source, "config"):
        return AutoConfig.from_pretrained(found.source, **found.options)


@contextmanager
def _named(source: str, what: str) -> Iterator[None]:
    """Turn any error of a loading library into a ValueError that names the source.

    Damaged files raise whatever the library happens to raise.
    """
    try:
        yield
    except Exception as error:
        remedy = next((text for word, text in _REMEDY.items() if word in str(error)), None)
        reason = remedy or f"{type(error).__name__}: {str(error).strip()}"
        raise ValueError(f"{source}: its {what} cannot be loaded. {reason}") from error
