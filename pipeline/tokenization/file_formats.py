"""Conversion of tokenizer files to Hugging Face fast tokenizers: rank files, tekken, SentencePiece, tokenizer.json.

Each function returns the tokenizer and its beginning- and end-of-text tokens. Ids stay those of the original.
"""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

# Public split patterns: they decide which stretches of text are tokenized separately.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_PATTERN = _MODERN % r"\p{N}"
LLAMA3_PATTERN = _MODERN % r"\p{N}{1,3}"

_LLAMA3_NAMES = [
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
]
_TEKKEN_NAMES = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]
# Usual names of the begin and end tokens of a stand-alone tokenizer.json, the most specific first.
_BOS_NAMES = ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>", "<|endoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|endoftext|>")


class Converted(NamedTuple):
    """A fast tokenizer; `bos` and `eos` are spellings, None if the file names none."""

    tokenizer: Tokenizer
    bos: str | None
    eos: str | None


class RankFamily(NamedTuple):
    """Properties missing from a rank file: the split pattern and the control tokens that follow the ranks."""

    pattern: str
    special: tuple[str, ...]
    bos: str
    eos: str


# By the number of ranks, which decides the ids of the control tokens.
_FAMILIES = {
    50256: RankFamily(GPT2_PATTERN, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    151643: RankFamily(
        QWEN_PATTERN,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    128000: RankFamily(
        LLAMA3_PATTERN,
        (*(f"<|{name}|>" for name in _LLAMA3_NAMES), *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
}


class _RankConverter(TikTokenConverter):
    """The converter of transformers with ranks in memory: its own reader keeps a second cache, keyed by path only."""

    def __init__(self, ranks: dict[bytes, int], pattern: str) -> None:
        super().__init__(pattern=pattern)
        self.ranks = ranks

    def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:  # type: ignore[override]
        return self.ranks


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read `base64 rank` lines. Raises ValueError that names a malformed line."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not a base64 token and its rank") from error
    return ranks


def from_ranks(path: Path) -> Converted:
    """Convert a tiktoken rank file of GPT-2, Qwen or Llama 3. Raises ValueError for a family of unknown pattern."""
    ranks = read_ranks(path)
    family = _FAMILIES.get(len(ranks))
    if family is None or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{path} holds {len(ranks)} ranks; a rank file does not say how text is split, and only GPT-2 (50256), "
            "Qwen (151643) and Llama 3 (128000) are known. Give a Hugging Face folder or a tokenizer.json instead, or "
            "define the split in a Python file (stage2_student/interfaces/README.md)."
        )
    return rank_tokenizer(ranks, family)


def rank_tokenizer(ranks: dict[bytes, int], family: RankFamily) -> Converted:
    """Make a tokenizer from ranks 0 .. len(ranks) - 1; control tokens follow."""
    tokenizer = _RankConverter(ranks, family.pattern).converted()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in family.special])
    return Converted(tokenizer, family.bos, family.eos)


def from_tekken(path: Path) -> Converted:
    """Convert Mistral's tekken.json: control tokens take the first ids, ranks follow."""
    values = json.loads(path.read_text(encoding="utf-8"))
    config = values["config"]
    num_special = config["default_num_special_tokens"]
    listed = {entry["rank"]: entry["token_str"] for entry in values.get("special_tokens") or []}
    listed = listed or dict(enumerate(_TEKKEN_NAMES))
    special = [listed.get(rank, f"<SPECIAL_{rank}>") for rank in range(num_special)]
    # The file holds more entries than the model has embeddings; only the first ones are used.
    num_ranks = config["default_vocab_size"] - num_special
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in values["vocab"][:num_ranks]}
    converter = _RankConverter(ranks, config["pattern"])
    vocab, merges = converter.extract_vocab_merges_from_model(None)
    vocab = dict(zip(special, range(num_special), strict=True)) | {t: rank + num_special for t, rank in vocab.items()}
    tokenizer = converter.converted()
    tokenizer.model = models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return Converted(tokenizer, "<s>", "</s>")


def from_sentencepiece(path: Path) -> Converted:
    """Convert a SentencePiece BPE or Unigram model with byte fallback.

    Raises ValueError for a model that cannot spell every byte.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, norm = proto.trainer_spec, proto.normalizer_spec
    kind = {trainer.BPE: "BPE", trainer.UNIGRAM: "Unigram"}.get(trainer.model_type, "word or character")
    if kind not in ("BPE", "Unigram") or not trainer.byte_fallback or norm.remove_extra_whitespaces:
        raise ValueError(
            f"{path} is a SentencePiece {kind} model with byte_fallback {trainer.byte_fallback} and "
            f"remove_extra_whitespaces {norm.remove_extra_whitespaces}: its tokens cannot spell every document. Only "
            "BPE and Unigram with byte fallback that keep all spaces can; choose another tokenizer."
        )
    pieces = list(proto.pieces)
    tokenizer = Tokenizer(_unigram(pieces) if kind == "Unigram" else _bpe(pieces, trainer.unk_piece))
    tokenizer.normalizer = _sentencepiece_normalizer(norm)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if norm.add_dummy_prefix else []))
    control = {pieces[0].CONTROL, pieces[0].UNKNOWN}
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, normalized=False, special=True) for p in pieces if p.type in control]
    )
    # SentencePiece never splits a user-defined piece: in a fast tokenizer that is an added token that spells text.
    own = [p.piece for p in pieces if p.type == p.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized="▁" in piece, special=False) for piece in own])
    return Converted(tokenizer, trainer.bos_piece, trainer.eos_piece)


def _bpe(pieces: list[Any], unknown: str) -> models.BPE:
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    normal = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
    merges = generate_merges(vocab, normal, skip_tokens=vocab.keys() - normal.keys())
    return models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _unigram(pieces: list[Any]) -> models.Unigram:
    unknown = next(index for index, piece in enumerate(pieces) if piece.type == piece.UNKNOWN)
    return models.Unigram([(piece.piece, piece.score) for piece in pieces], unknown, True)


def _sentencepiece_normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    if spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(spec.precompiled_charsmap))
    return normalizers.Sequence(steps)


def from_tokenizer_json(path: Path) -> Converted:
    """Convert a stand-alone tokenizer.json; its begin and end tokens are found by their usual names."""
    tokenizer = Tokenizer.from_file(str(path))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    bos = next((name for name in _BOS_NAMES if name in special), None)
    return Converted(tokenizer, bos, next((name for name in _EOS_NAMES if name in special), None))


def from_bytes() -> Converted:
    """Make the tokenizer of the 256 bytes: id = byte, and `<|endoftext|>` = 256."""
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(byte_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return Converted(tokenizer, "<|endoftext|>", "<|endoftext|>")


def byte_letters() -> list[str]:
    """List the letters of the 256 bytes in a byte-level vocabulary: printable Latin-1, the rest from U+0100 on.

    Source: GPT-2's encoder.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def convert(path: Path) -> Converted:
    """Convert a file by its content, not only its name. Raises ValueError for any other format."""
    with path.open("rb") as file:
        head = file.read(4096)
    if path.suffix == ".json":
        return from_tekken(path) if _is_tekken(path) else from_tokenizer_json(path)
    if _is_rank_line(head.split(b"\n", 1)[0]):
        return from_ranks(path)
    if ".model" in path.name:
        return from_sentencepiece(path)
    raise ValueError(
        f"{path} is not a known kind of tokenizer file: tokenizer.json, tekken.json, a tiktoken rank file, a "
        "SentencePiece .model or a .gguf"
    )


def _is_tekken(path: Path) -> bool:
    values = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(values.get("config"), dict) and "default_num_special_tokens" in values["config"]


def _is_rank_line(line: bytes) -> bool:
    parts = line.split()
    return len(parts) == 2 and parts[1].isdigit()
