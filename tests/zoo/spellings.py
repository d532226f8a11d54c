"""Tokenizers of every kind, each beside what its own library says of it: bytes by id, and the ids of a text.

Small ones are trained here, a few hundred tokens; those of real models are the families of `tests.support.families`.
Nothing of what they say comes from the product: bytes are read from the tokenizer's file, ids come from tiktoken,
sentencepiece or tokenizers.
"""

import base64
import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.sources.resolve import resolve_file, resolve_tokenizer
from pipeline.tokenization.file_formats import GPT2_PATTERN, QWEN_PATTERN, RankFamily, rank_tokenizer
from tests.bench.texts import code
from tests.support import families

END_OF_TEXT = "<|endoftext|>"
SIZE = 420
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


class Spelling(NamedTuple):
    """A tokenizer as its own library has it.

    Attributes:
        folder: a Hugging Face folder of it, which the product makes of what a user has.
        token_bytes: by id; None spells nothing.
        encode: ids of a text, without start or end.
        prefix: what it puts before a text.
        start, end: names of its control tokens.
        fallback: ids of byte-fallback tokens, which it yields only for what no other token spells.
    """

    name: str
    folder: str
    token_bytes: tuple[bytes | None, ...]
    encode: Callable[[str], list[int]]
    prefix: bytes
    start: str
    end: str
    fallback: frozenset[int] = frozenset()

    @property
    def never_yielded(self) -> frozenset[int]:
        """Return byte-fallback tokens whose byte another token spells, and tokens with a byte no UTF-8 text has."""
        others = {spelled for i, spelled in enumerate(self.token_bytes) if i not in self.fallback}
        twins = (i for i in self.fallback if self.token_bytes[i] in others)
        foreign = (i for i, spelled in enumerate(self.token_bytes) if spelled and not _UTF8_BYTES.issuperset(spelled))
        return frozenset(chain(twins, foreign))

    def _is_a_part(self, byte: int, index: int) -> bool:
        """Tell if the tokenizer spells some character by this byte's token.

        It has all 64 of C2 and of C3 in Mistral's first two.
        """
        if not 0xC2 <= byte < 0xE0:
            return True
        return any(index in self.encode("x" + bytes([byte, last]).decode()) for last in range(0x80, 0xC0))

    def yielded(self) -> dict[bytes, int]:
        """Return by their bytes the tokens that it is seen to yield.

        For these bytes, after an `x`, or for a byte of a character it has not.
        """
        found, never = {}, self.never_yielded
        for index, spelled in enumerate(self.token_bytes):
            if not spelled or index in never:
                continue
            try:
                text = spelled.decode()
            except UnicodeDecodeError:
                if len(spelled) == 1 and self._is_a_part(spelled[0], index):
                    found[spelled] = index
                continue
            tried = [text, "x" + text, *([text[1:]] if self.prefix and text.startswith(" ") else [])]
            if any(index in self.encode(one) for one in tried):
                found[spelled] = index
        return found

    @property
    def wrapped(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer as transformers has it."""
        return PreTrainedTokenizerFast.from_pretrained(self.folder)


def small(name: str, work: Path) -> Spelling:
    """Return a trained tokenizer of the kind `name`, one of `SMALL`; its files are kept in `work`."""
    return SMALL[name](work)


def of_family(name: str) -> Spelling:
    """Return a real model's tokenizer, one of `tests.support.families`, with the library of its file."""
    source = families.FAMILIES[name].source
    path = Path(resolve_file(source)) if source != "bytes" else Path("bytes")
    if name == "bytes":
        return _bytes(path)
    if name == "tekken":
        return _of_tekken(name, path)
    if path.suffix == ".json":
        return _of_hugging_face(name, resolve_tokenizer(source))
    if ".model" in path.name and name != "llama3":
        return _of_sentencepiece(name, path)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in path.read_bytes().splitlines() if line}
    pattern = json.loads(Path(resolve_tokenizer(source), "tokenizer.json").read_text())["pre_tokenizer"]
    return _of_ranks(name, ranks, _regex_of(pattern), resolve_tokenizer(source))


def _lines() -> Iterator[str]:
    for _, text in code(8):
        yield from text.decode().splitlines(keepends=True)
    yield from ("the thing and the end, naïve élan\n", "日本 42 and 7 hills\n") * 40


@cache
def _trained(digits: bool) -> Tokenizer:
    """Train byte-level BPE; with `digits`, each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    split: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 1, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _ranks() -> dict[bytes, int]:
    """Return the ranks of the trained tokenizer, its 256 bytes first."""
    spelled = [_letters(piece) for piece, _ in sorted(_trained(False).get_vocab().items(), key=lambda pair: pair[1])]
    ordered = [token for token in spelled if len(token) == 1] + [token for token in spelled if len(token) > 1]
    return {token: rank for rank, token in enumerate(ordered)}


def _letters(piece: str) -> bytes:
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(byte_of[letter] for letter in piece)


def _byte_level(work: Path) -> Spelling:
    folder = work / "byte-bpe"
    if not folder.exists():
        wrapped = PreTrainedTokenizerFast(tokenizer_object=_trained(True), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        wrapped.save_pretrained(folder)
    return _of_hugging_face("byte-bpe", str(folder))


def _of_hugging_face(name: str, folder: str) -> Spelling:
    """Return the spelling of a byte-level tokenizer.json.

    It is not asked about text that spells a control token.
    """
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    added = tokenizer.get_added_tokens_decoder()
    spelled: list[bytes | None] = [None] * tokenizer.get_vocab_size()
    for piece, index in tokenizer.get_vocab(with_added_tokens=True).items():
        special = index in added and added[index].special
        spelled[index] = None if special else (piece.encode() if index in added else _letters(piece))
    names = PreTrainedTokenizerFast.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return Spelling(name, folder, tuple(spelled), encode, b"", str(names.bos_token), str(names.eos_token))


def _ranks_small(work: Path) -> Spelling:
    ranks = _ranks()
    folder = work / "ranks"
    if not folder.exists():
        converted = rank_tokenizer(ranks, RankFamily(GPT2_PATTERN, (END_OF_TEXT,), END_OF_TEXT, END_OF_TEXT))
        PreTrainedTokenizerFast(
            tokenizer_object=converted.tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
        ).save_pretrained(folder)
    return _of_ranks("ranks", ranks, GPT2_PATTERN, str(folder))


def _of_ranks(name: str, ranks: dict[bytes, int], pattern: str, folder: str, before: int = 0) -> Spelling:
    """Train a SentencePiece model; `before`: control tokens that take the first ids."""
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    by_rank = sorted(ranks, key=ranks.__getitem__)
    names = PreTrainedTokenizerFast.from_pretrained(folder)
    after = len(names) - before - len(by_rank)

    def encode(text: str) -> list[int]:
        return [rank + before for rank in encoding.encode_ordinary(text)]

    table = (*[None] * before, *by_rank, *[None] * after)
    return Spelling(name, folder, table, encode, b"", str(names.bos_token), str(names.eos_token))


def _tekken_small(work: Path) -> Spelling:
    path = work / "tekken.json"
    ranks = _ranks()
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    config = {
        "pattern": QWEN_PATTERN, "num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) + len(special),
        "default_num_special_tokens": len(special), "version": "v3",
    }  # fmt: skip
    listed = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)]
    if not path.exists():
        path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": listed}), encoding="utf-8")
    return _of_tekken("tekken-like", path)


def _of_tekken(name: str, path: Path) -> Spelling:
    values = json.loads(path.read_text(encoding="utf-8"))
    config = values["config"]
    num_special = config["default_num_special_tokens"]
    entries = values["vocab"][: config["default_vocab_size"] - num_special]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    return _of_ranks(name, ranks, config["pattern"], resolve_tokenizer(str(path)), before=num_special)


def _sentencepiece(kind: str, **options: Any) -> Callable[[Path], Spelling]:
    def make(work: Path) -> Spelling:
        path = work / f"{kind}.model"
        if not path.exists():
            families.train_sentencepiece(path, vocab_size=SIZE, character_coverage=0.98, **options)
        return _of_sentencepiece(kind, path)

    return make


def _of_sentencepiece(name: str, path: Path) -> Spelling:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    spelled: list[bytes | None] = []
    fallback = set()
    for index in range(processor.get_piece_size()):
        piece = processor.id_to_piece(index)
        if processor.is_byte(index):
            spelled.append(bytes([int(piece[3:5], 16)]))
            fallback.add(index)
        elif processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
            spelled.append(None)
        else:
            spelled.append(piece.replace("▁", " ").encode())
    prefix = b"".join(spelled[i] or b"" for i in processor.encode("x"))[:-1]
    folder = resolve_tokenizer(str(path))
    names = PreTrainedTokenizerFast.from_pretrained(folder)
    marks = str(names.bos_token), str(names.eos_token)
    return Spelling(name, folder, tuple(spelled), processor.encode, prefix, *marks, frozenset(fallback))


def _bytes(work: Path) -> Spelling:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    table = (*(bytes([byte]) for byte in range(256)), None)
    return Spelling("bytes", resolve_tokenizer("bytes"), table, encode, b"", END_OF_TEXT, END_OF_TEXT)


def _regex_of(pre_tokenizer: dict[str, Any]) -> str:
    """Return the pattern that a converted rank file splits by."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    return patterns[0] if patterns else GPT2_PATTERN


SMALL: dict[str, Callable[[Path], Spelling]] = {
    "byte-bpe": _byte_level,
    "ranks": _ranks_small,
    "tekken-like": _tekken_small,
    "sp-bpe": _sentencepiece("sp-bpe", model_type="bpe"),
    "sp-bpe-no-prefix": _sentencepiece("sp-bpe-no-prefix", model_type="bpe", add_dummy_prefix=False),
    "sp-unigram": _sentencepiece("sp-unigram", model_type="unigram"),
    "bytes": _bytes,
}
