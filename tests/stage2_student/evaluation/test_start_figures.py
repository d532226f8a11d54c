"""Nats of a moved student by kind of token, against loops over single documents in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.evaluation.scored_text import Reader
from stage2_student.evaluation.start_figures import Asked, DocumentNats, buckets, spread_nats, start_figures
from tests.support.families import load_sentencepiece, train_sentencepiece
from tests.support.scoring import named_corpus
from tests.support.tiny import tiny_tokenizer
from tests.zoo.models import tiny_model

TEXTS = ["the thing and the end", "in é, andé on the", "a", "the ing on " * 12]


def nats_by_byte(asked: Asked, text: bytes) -> tuple[list[float], list[tuple[int, int, float]]]:
    """Return the nats of each byte, a token's spread evenly, and each token with its bytes and nats."""
    tokens = asked.reader.tokenizer.encode(text)
    with torch.no_grad():
        logits_LV = asked.model.double()(torch.tensor([[asked.reader.start_id, *tokens]])).logits[0]
    asked.model.float()
    sizes = [len(asked.reader.tokenizer.token_bytes[token] or b"") for token in tokens]
    sizes[0] -= len(asked.reader.tokenizer.prefix)
    nats = [-float(logits_LV[at].log_softmax(-1)[token]) for at, token in enumerate(tokens)]
    by_byte: list[float] = []
    waiting = 0.0  # of tokens without bytes
    for size, of_token in zip(sizes, nats, strict=True):
        waiting += of_token
        if size:
            by_byte += [waiting / size] * size
            waiting = 0.0
    return by_byte, list(zip(tokens, sizes, nats, strict=True))


def reading(name: str, tokenizer: ByteTokenizer) -> Asked:
    model = tiny_model("llama", len(tokenizer.token_bytes), seed=len(name))
    return Asked(model, Reader(name, tokenizer, None, len(tokenizer.token_bytes) - 1), 1000)


@pytest.mark.parametrize("original", ["byte-level", "sentencepiece"])
def test_nats_by_kind_of_token_are_those_of_loops(original: str, tmp_path: Path) -> None:
    student = reading("after", ByteTokenizer.from_wrapped(tiny_tokenizer(["t h", "o n", "a n", "Ġ a"]), "new"))
    old = (
        load_sentencepiece(train_sentencepiece(tmp_path / "t.model"))
        if original == "sentencepiece"
        else ByteTokenizer.from_wrapped(tiny_tokenizer(), "old")
    )
    before = reading("before", old)
    is_made_V = np.zeros(len(student.reader.tokenizer.token_bytes), dtype=bool)
    is_made_V[[student.reader.tokenizer.token_bytes.index(spelled) for spelled in (b"on", b" a", b"an")]] = True
    corpus = named_corpus(tmp_path / "texts.jsonl", *TEXTS)
    found = start_figures(student, before, is_made_V, corpus)

    totals: dict[str, list[float]] = {name: [0, 0, 0, 0] for name in ("made", "after", "other")}
    for text in TEXTS:
        theirs, _ = nats_by_byte(before, text.encode())
        at, last_made = 0, -3
        for number, (token, size, nats) in enumerate(nats_by_byte(student, text.encode())[1]):
            name = "made" if is_made_V[token] else "after" if number - last_made <= 2 else "other"
            last_made = number if is_made_V[token] else last_made
            for index, value in enumerate((1, size, nats, sum(theirs[at : at + size]))):
                totals[name][index] += value
            at += size
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    num_tokens = sum(total[0] for total in totals.values())
    assert min(total[0] for total in totals.values()) > 5 and found["num_bytes"] == num_bytes
    for name, (tokens, size, nats, of_old) in totals.items():
        bucket = found["buckets"][name]
        assert bucket["share_of_tokens"] == pytest.approx(tokens / num_tokens)
        assert bucket["share_of_bytes"] == pytest.approx(size / num_bytes)
        assert bucket["bits"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-4)
        assert bucket["original_bits"] == pytest.approx(of_old / num_bytes / math.log(2), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(b["bits"] for b in found["buckets"].values()))


def test_windows_count_each_token_once_and_know_the_tokens_before_it(tmp_path: Path) -> None:
    student = reading("after", ByteTokenizer.from_wrapped(tiny_tokenizer(["t h", "a n"]), "new"))
    is_made_V = np.zeros(len(student.reader.tokenizer.token_bytes), dtype=bool)
    is_made_V[student.reader.tokenizer.token_bytes.index(b"th")] = True
    corpus = named_corpus(tmp_path / "texts.jsonl", *TEXTS)
    whole, cut = (start_figures(student._replace(max_tokens=size), student, is_made_V, corpus) for size in (1000, 16))
    shares: list[Any] = [[b["share_of_tokens"] for b in f["buckets"].values()] for f in (whole, cut)]
    assert shares[0] == shares[1] and whole["bits_per_byte"] != cut["bits_per_byte"]
    assert whole["bits_per_byte"] == pytest.approx(whole["original_bits_per_byte"])


def test_nats_that_are_spread_keep_their_sum() -> None:
    rng = np.random.default_rng(0)
    none = np.zeros((6, 2), dtype=np.int64)
    document = DocumentNats(np.zeros(6, dtype=np.int64), none, np.array([0, 2, 0, 3, 1, 0]), rng.random(6))
    found = spread_nats(document, np.array([1, 1, 4]))
    first, _, third, fourth, fifth, last = document.nats_L[[0, 1, 2, 3, 4, 5]]
    two = first + document.nats_L[1]
    assert found.tolist() == pytest.approx([two / 2, two / 2, third + fourth + fifth + last])


def test_a_made_token_after_a_made_one_is_made() -> None:
    before_L2 = np.array([[-1, -1], [0, -1], [1, 0], [2, 1], [2, 2]])
    document = DocumentNats(np.array([0, 1, 2, 2, 2]), before_L2, np.ones(5), np.ones(5))
    assert buckets(document, np.array([True, True, False])).tolist() == ["made", "made", "after", "after", "other"]
    assert buckets(document, np.array([False, False, True])).tolist() == ["other", "other", "made", "made", "made"]
