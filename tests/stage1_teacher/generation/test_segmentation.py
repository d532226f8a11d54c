"""The share of written tokens that are the tokenizer's own, against a comparison byte by byte."""

import numpy as np
import pytest

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.generation.segmentation import add_counts, count_own, describe, kind_of
from tests.support.tiny import tiny_tokenizer

TOKENIZER = ByteTokenizer.from_wrapped(tiny_tokenizer(), "tiny")


def starts(tokens: list[int], at: int) -> dict[int, int]:
    """Return where each token starts, and where it ends."""
    found = {}
    for token in tokens:
        size = len(TOKENIZER.token_bytes[token] or b"")
        found[at] = at + size
        at += size
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_token_is_own_just_where_the_encoding_has_the_same_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ascii_tokens = [i for i, b in enumerate(TOKENIZER.token_bytes) if b is not None and b.isascii() and b.isalnum()]
    known = [TOKENIZER.token_bytes.index(b) for b in (b"th", b"the", b" the", b"in", b"an", b"and", b" ", b"t", b"h")]
    for _ in range(50):
        before = "".join(rng.choice(["the", " ", "in", "th", "7"], size=3))
        tokens = rng.choice([*ascii_tokens, *(known * 5)], size=rng.integers(1, 12)).tolist()
        text = before.encode() + b"".join(TOKENIZER.token_bytes[token] or b"" for token in tokens)
        own = starts(TOKENIZER.encode(text), 0)
        first = min((at for at in [*own, len(text)] if at >= len(before)), default=0)
        expected = [
            (own.get(start) == end) for start, end in starts(tokens, len(before.encode())).items() if start >= first
        ]
        counts = count_own(before.encode(), tokens, TOKENIZER)
        assert sum(number for number, _ in counts.values()) == sum(expected)
        assert sum(number for _, number in counts.values()) == len(expected)


def test_the_tokenizers_own_encoding_is_all_its_own() -> None:
    tokens = TOKENIZER.encode(b" the thing and the 7 others, in ")
    counts = count_own(b"the", tokens, TOKENIZER)
    assert all(own == tokens for own, tokens in counts.values())
    assert describe(counts).startswith("100.0 % of ")


def test_words_spelled_letter_by_letter_are_not() -> None:
    letters = [TOKENIZER.token_bytes.index(bytes([letter])) for letter in b" the 7"]
    counts = count_own(b"in", letters, TOKENIZER)
    assert counts == {"white space": [1, 2], "words": [0, 3], "digits": [1, 1]}
    add_counts(counts, {"digits": [0, 1], "other": [2, 2]})
    assert describe(counts) == "44.4 % of 9 tokens (white space 50.0 %, words 0.0 %, digits 50.0 %, other 100.0 %)"


def test_kinds_are_told_by_a_tokens_text() -> None:
    kinds = [kind_of(content) for content in (b"  \n", b" the", "é".encode(), b" 42", b"a1", b",", b"\xc3")]
    assert kinds == ["white space", "words", "words", "digits", "other", "other", "other"]
    assert describe({}) == "no token written"
