"""Byte spellings from a tokenizer.json: the bytes of every id, and a definition whose encodings keep to them.

Two kinds of tokenizer can spell every byte: byte-level ones, which map each byte to a letter, and those with byte
fallback, which write a space as U+2581 and have tokens <0x00> to <0xFF> for the rest. Others are refused.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.tokenization.file_formats import byte_letters

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(byte_letters())}
_Definition = dict[str, Any]
_DROPPING = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")  # pre-tokenizers
_SUPPORTED = (
    "Supported are byte-level BPE (as in GPT-2, Qwen, Llama 3, DeepSeek, SmolLM2), tiktoken ranks and tekken, "
    "SentencePiece BPE and Unigram with byte fallback (as in Mistral, Llama 2, Gemma), and `bytes`."
)


def spellings(definition: _Definition) -> tuple[tuple[bytes | None, ...], dict[str, int]]:
    """Return bytes by id (None: spells nothing) and control ids by name. Raises ValueError if bytes are unknown."""
    byte_level = _kind(definition)
    vocab = _vocab(definition)
    added = definition.get("added_tokens") or []
    ids = [*vocab.values(), *(token["id"] for token in added)]
    table: list[bytes | None] = [None] * (max(ids) + 1)
    for piece, index in vocab.items():
        table[index] = _letters_bytes(piece) if byte_level else _piece_bytes(piece)
    for token in added:
        table[token["id"]] = None if token["special"] else _added_bytes(token, byte_level)
    unknown = _unknown(definition)
    if unknown in vocab:
        table[vocab[unknown]] = None
    names = vocab | {token["content"]: token["id"] for token in added}
    return tuple(table), {name: index for name, index in names.items() if table[index] is None}


def encoder_definition(definition: _Definition, table: tuple[bytes | None, ...]) -> tuple[_Definition, bytes]:
    """Return the definition to encode with, and the prefix to put before a document.

    It differs from the original where that would not spell the text: tokens without bytes get names that cannot occur
    in text (so neither a merge nor a whole-word lookup yields them), spelled-out byte tokens are not merged from text,
    and the dummy prefix is put once before the document, by the caller, instead of before each stretch between added
    tokens.
    """
    # Not a deep copy: a vocabulary has a hundred thousand entries; changed parts are rebuilt.
    changed = definition | {"truncation": None, "padding": None, "post_processor": None, "decoder": None}
    changed["model"] = model = definition["model"] | {"dropout": None}
    changed["added_tokens"] = [dict(token) for token in definition.get("added_tokens") or []]
    barred = {name for name, index in _vocab(definition).items() if table[index] is None}
    new_name = {name: _unspellable(index) for name, index in _all_names(definition).items() if table[index] is None}
    _rename_vocab(model, new_name)
    for token in changed["added_tokens"]:
        if table[token["id"]] is None:
            token |= {"content": new_name[token["content"]], "special": True, "normalized": False}
    if "merges" in model:
        barred |= set() if _kind(definition) else {f"<0x{byte:02X}>" for byte in range(256)}
        model["merges"] = [merge for merge in model["merges"] if barred.isdisjoint(_pieces(merge))]
    changed["normalizer"], dummy_normalizer = _without_prefix(changed.get("normalizer"))
    changed["pre_tokenizer"], dummy_pre = _without_prefix(changed.get("pre_tokenizer"))
    if model["type"] == "Unigram" and not _kind(definition):
        changed["pre_tokenizer"] = _byte_names_apart(changed["pre_tokenizer"])
    return changed, b" " if dummy_normalizer or dummy_pre else b""


def text_changers(definition: _Definition) -> tuple[str, ...]:
    """Name the normalizers that may alter text, other than writing a space as U+2581 and the dummy prefix."""
    names = []
    for step in _steps(definition.get("normalizer")):
        space = step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] == _SPACE
        if not space and step["type"] not in ("Prepend", "ByteLevel"):
            names.append("SentencePiece's own rules" if step["type"] == "Precompiled" else step["type"])
    return tuple(names)


class Prefixing(NamedTuple):
    """Places where a tokenizer with a dummy prefix puts its space in a text with control tokens."""

    every_stretch: bool  # after each control token; else only at the start of the whole text
    unless_space: bool  # not before a stretch that starts with a space


def prefixing(definition: _Definition) -> Prefixing:
    """Return how the tokenizer's own dummy prefix works; meaningless for one without."""
    for step in (*_steps(definition.get("normalizer")), *_steps(definition.get("pre_tokenizer"))):
        if step["type"] == "Prepend":
            return Prefixing(every_stretch=True, unless_space=False)
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return Prefixing(every_stretch=step.get("prepend_scheme", "always") == "always", unless_space=True)
    return Prefixing(every_stretch=True, unless_space=True)  # as byte-level tokenizers with a prefix do


def _kind(definition: _Definition) -> bool:
    """Return True for byte-level and False for byte fallback. Raises ValueError for neither."""
    steps = list(_steps(definition.get("pre_tokenizer")))
    lack = _lack(definition["model"], steps)
    byte_level = any(step["type"] == "ByteLevel" for step in (*steps, *_steps(definition.get("normalizer"))))
    if lack is None and not byte_level and not definition["model"].get("byte_fallback"):
        lack = "is neither byte-level nor has byte fallback, so that it has one token for everything unknown"
    if lack is not None:
        raise ValueError(
            f"a {definition['model']['type']} tokenizer that {lack} cannot spell every byte of a document. {_SUPPORTED}"
        )
    return byte_level


def _lack(model: _Definition, pre_tokenizers: list[_Definition]) -> str | None:
    """Say why no tokenizer of this kind can spell every byte, whatever its vocabulary; None if one could."""
    if model["type"] == "WordPiece":
        return "drops the spaces, and has one token for all unknown words,"
    if model["type"] not in ("BPE", "Unigram"):
        return "knows whole words only"
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if affixes:
        return f"marks where words begin or end ({affixes[0]}) instead of writing the spaces"
    # "Removed" with `invert` drops what its pattern does not match: nothing, in the tokenizers that use it.
    dropping = [
        step["type"]
        for step in pre_tokenizers
        if step["type"] in _DROPPING or (step.get("behavior") == "Removed" and not step.get("invert"))
    ]
    return f"drops text where it splits ({dropping[0]})" if dropping else None


def _steps(part: _Definition | None) -> Iterator[_Definition]:
    """Yield the steps of a normalizer or pre-tokenizer, with sequences flattened."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("normalizers") or part.get("pretokenizers") or []:
            yield from _steps(inner)
    else:
        yield part


def _without_prefix(part: _Definition | None) -> tuple[_Definition | None, bool]:
    """Return a normalizer or pre-tokenizer without its leading space, and whether it had one."""
    if part is None:
        return None, False
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        inner = [_without_prefix(step) for step in part[key]]
        return part | {key: [step for step, _ in inner if step is not None]}, any(found for _, found in inner)
    if part["type"] == "Prepend":
        return None, True
    if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
        return part | {"prepend_scheme": "never"}, True
    if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}, True
    return part, False


def _byte_names_apart(pre_tokenizer: _Definition | None) -> _Definition:
    """Split `<0x0A>` in a text after its `<`: Unigram would otherwise read it as a byte's token.

    Neither the names nor the scores of byte tokens can be changed instead: byte fallback depends on the names, the
    unknown token on the scores.
    """
    pattern = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
    split = {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, *_steps(pre_tokenizer)]}


def _vocab(definition: _Definition) -> dict[str, int]:
    vocab = definition["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}


def _all_names(definition: _Definition) -> dict[str, int]:
    return _vocab(definition) | {token["content"]: token["id"] for token in definition.get("added_tokens") or []}


def _unknown(definition: _Definition) -> str | None:
    model = definition["model"]
    if isinstance(model["vocab"], list) and model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _rename_vocab(model: _Definition, new_name: dict[str, str]) -> None:
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new_name.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[new_name.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = new_name.get(model["unk_token"], model["unk_token"])


def _unspellable(index: int) -> str:
    """Name a token with Unicode noncharacters, which are in no byte-level alphabet and in no merge.

    Special added tokens are not matched.
    """
    return f"\ufdd0\ufdd1{index}\ufdd2"


def _pieces(merge: str | list[str]) -> tuple[str, str, str]:
    """Return the two pieces that a merge joins, and the result."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _letters_bytes(piece: str) -> bytes | None:
    values = [_BYTE_OF_LETTER.get(letter) for letter in piece]
    return None if None in values or not values else bytes(value for value in values if value is not None)


def _piece_bytes(piece: str) -> bytes | None:
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode() or None


def _added_bytes(token: _Definition, byte_level: bool) -> bytes:
    """Return the bytes of a plain added token.

    It is matched in the text as it is or, if `normalized`, after spaces have become U+2581.
    """
    content = str(token["content"])
    return (content if byte_level or not token["normalized"] else content.replace(_SPACE, " ")).encode()
