"""What a tokenizer.json says about bytes: the bytes of every id, and a definition whose encoding cannot leave them.

Two kinds of tokenizer can spell every byte: byte-level ones, which write each byte as a letter of their own, and those
with byte fallback, which write a space as U+2581 and hold tokens <0x00> to <0xFF> for the rest. Others are refused.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

from pipeline.tokenizer_convert import byte_letters

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(byte_letters())}
_Definition = dict[str, Any]


def spellings(definition: _Definition) -> tuple[tuple[bytes | None, ...], dict[str, int]]:
    """Bytes by id (None: spells nothing), and control tokens' ids by name. ValueError where bytes are not known."""
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
    """The definition to encode with, and the prefix to put before a document.

    Differs from the original where that would not spell the text: tokens without bytes get names that no text can have
    (so neither a merge nor a whole-word lookup yields them), spelled-out byte tokens are not merged from text, and the
    dummy prefix is put once before the document, by the caller, instead of before each stretch between added tokens.
    """
    changed = copy.deepcopy(definition)
    changed |= {"truncation": None, "padding": None, "post_processor": None, "decoder": None}
    model = changed["model"]
    model["dropout"] = None
    barred = {name for name, index in _vocab(definition).items() if table[index] is None}
    new_name = {name: _unspellable(index) for name, index in _all_names(definition).items() if table[index] is None}
    _rename_vocab(model, new_name)
    for token in changed.get("added_tokens") or []:
        if table[token["id"]] is None:
            token |= {"content": new_name[token["content"]], "special": True, "normalized": False}
    if "merges" in model:
        byte_level = _kind(definition)
        model["merges"] = [pair for pair in model["merges"] if _allowed(_pair(pair), barred, byte_level)]
    changed["normalizer"], dummy_normalizer = _without_prefix(changed.get("normalizer"))
    changed["pre_tokenizer"], dummy_pre = _without_prefix(changed.get("pre_tokenizer"))
    return changed, b" " if dummy_normalizer or dummy_pre else b""


def text_changers(definition: _Definition) -> tuple[str, ...]:
    """Names of the normalizers that may alter text; writing a space as U+2581 is not counted, nor the dummy prefix."""
    names = []
    for step in _steps(definition.get("normalizer")):
        space = step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] == _SPACE
        if not space and step["type"] not in ("Prepend", "ByteLevel"):
            names.append(step["type"])
    return tuple(names)


def _kind(definition: _Definition) -> bool:
    """True: byte-level. False: byte fallback. ValueError: neither."""
    model = definition["model"]
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] in ("BPE", "Unigram") and not affixes:
        steps = [*_steps(definition.get("pre_tokenizer")), *_steps(definition.get("normalizer"))]
        if any(step["type"] == "ByteLevel" for step in steps):
            return True
        if model.get("byte_fallback"):
            return False
    lack = f"with {affixes[0]}" if affixes else "that is neither byte-level nor has byte fallback"
    raise ValueError(
        f"a {model['type']} tokenizer {lack} cannot spell every byte of a document. Choose a byte-level BPE or a "
        "SentencePiece BPE tokenizer with byte fallback."
    )


def _steps(part: _Definition | None) -> Iterator[_Definition]:
    """The steps of a normalizer or pre-tokenizer, sequences opened."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("normalizers") or part.get("pretokenizers") or []:
            yield from _steps(inner)
    else:
        yield part


def _without_prefix(part: _Definition | None) -> tuple[_Definition | None, bool]:
    """A normalizer or pre-tokenizer that puts no space first, and whether it did."""
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
    """Unicode noncharacters: in no byte-level alphabet, and in no merge; special added tokens are not matched."""
    return f"\ufdd0\ufdd1{index}\ufdd2"


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _allowed(pair: tuple[str, str], barred: set[str], byte_level: bool) -> bool:
    made = "".join(pair)
    if made in barred or pair[0] in barred or pair[1] in barred:
        return False
    return byte_level or not any(_BYTE_TOKEN.fullmatch(piece) for piece in (*pair, made))


def _letters_bytes(piece: str) -> bytes | None:
    values = [_BYTE_OF_LETTER.get(letter) for letter in piece]
    return None if None in values or not values else bytes(value for value in values if value is not None)


def _piece_bytes(piece: str) -> bytes | None:
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode() or None


def _added_bytes(token: _Definition, byte_level: bool) -> bytes:
    """A plain added token is looked for in the text as it is, or, `normalized`, after spaces became U+2581."""
    content = str(token["content"])
    return (content if byte_level or not token["normalized"] else content.replace(_SPACE, " ")).encode()
