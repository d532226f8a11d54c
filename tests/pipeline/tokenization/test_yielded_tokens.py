"""Tokens that a tokenizer can yield."""

import json

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError
from pipeline.tokenization.yielded_tokens import completions, reachable
from tests.support.families import documents, load, load_sentencepiece, train_sentencepiece
from tests.support.tiny import tiny_tokenizer

NO_UTF8 = {bytes([byte]) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ByteTokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return load_sentencepiece(train_sentencepiece(folder / "t.model", model_type=request.param))


def unreachable(tokenizer: ByteTokenizer) -> dict[int, bytes]:
    found_V = reachable(tokenizer)
    return {token: spelled for token, spelled in enumerate(tokenizer.token_bytes) if spelled and not found_V[token]}


def test_byte_fallback_never_yields_the_byte_of_a_character_that_has_a_token(sentencepiece: ByteTokenizer) -> None:
    ids = list(enumerate(sentencepiece.token_bytes))
    bytes_first = {spelled: token for token, spelled in reversed(ids) if spelled}  # byte tokens have the lowest ids
    pieces = {spelled for token, spelled in ids if spelled and token != bytes_first[spelled]}
    assert len(pieces) > 80 and all(len(piece) == 1 for piece in pieces)
    assert set(unreachable(sentencepiece)) == {bytes_first[spelled] for spelled in pieces | NO_UTF8}


def test_every_token_of_a_byte_level_tokenizer_is_reached_but_bytes_that_are_in_no_text() -> None:
    tokenizer = ByteTokenizer.from_wrapped(tiny_tokenizer(["t h", "Ã ©", "Ĥ Ģ", "â Ĥ", "© Ã"]), "tiny")
    assert {b"\x82\x80", b"\xe2\x82", b"\xa9\xc3"} <= set(tokenizer.token_bytes)  # parts of one character, and of two
    assert set(unreachable(tokenizer).values()) == NO_UTF8
    assert not reachable(tokenizer)[tokenizer.control["<|endoftext|>"]]


def test_a_token_that_the_split_pattern_cuts_is_not_reached() -> None:
    backend = tiny_tokenizer(["a n", "an d", "1 2"]).backend_tokenizer
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    backend.pre_tokenizer = digits
    tokenizer = ByteTokenizer.from_definition(json.loads(backend.to_str()), None, None)
    assert set(unreachable(tokenizer).values()) == NO_UTF8 | {b"12"}


def test_a_token_that_comes_beside_something_alone_is_reached() -> None:
    backend = tiny_tokenizer(
        ["a b", "Ċ Ġ"]
    ).backend_tokenizer  # a line break and a space, which only a longer run of them holds
    split = pre_tokenizers.Split(Regex(r"\s*\n|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer = ByteTokenizer.from_definition(json.loads(backend.to_str()), None, None)
    alone, beside = tokenizer.encode(b"\n "), tokenizer.encode(b"\n \n")
    assert len(alone) == 2 and tokenizer.token_bytes[beside[0]] == b"\n "
    assert set(unreachable(tokenizer).values()) == NO_UTF8


@pytest.mark.parametrize("name", ["bytes", "mistral-v1"])
def test_no_text_has_a_token_that_is_said_to_be_unreachable(name: str) -> None:
    tokenizer = load(name)
    found_V = reachable(tokenizer)
    rng = np.random.default_rng()
    codes = rng.integers(0x20, 0xD800, 20_000).tolist() + rng.integers(0xE000, 0x110000, 5_000).tolist()
    texts = [*documents(), *("".join(map(chr, codes[i : i + 10])).encode() for i in range(0, len(codes), 10))]
    seen = {token for ids in tokenizer.encode_batch(texts) if not isinstance(ids, SpellingError) for token in ids}
    assert len(seen) > 100 and not [token for token in seen if not found_V[token]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_completions_are_texts_that_hold_the_part_and_all_characters_that_do(size: int) -> None:
    rng = np.random.default_rng()
    character = chr({1: 0x41, 2: 0x5D0, 3: 0x20AC, 4: 0x1F642}[size] + int(rng.integers(0, 20))).encode()
    for start in range(size):
        for stop in range(start + 1, size + 1):
            part = character[start:stop]
            if start == 0 or stop == size:
                text, held = (b"x" + character, b"x" + part) if start == 0 else (character + b"x", part + b"x")
                found = list(completions(held))
                assert found and all(held in text and text.decode() for text in found)
                assert size == 4 or text in found
    assert not list(completions(b"\xe0\x80")) and not list(completions(b"\x80" * 4)) and not list(completions(b"a\xff"))
