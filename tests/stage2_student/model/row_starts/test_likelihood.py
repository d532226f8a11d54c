"""Likelihoods of a token's pieces, against brute force over single prompts in float64."""

import itertools
import math
from random import Random

import pytest
import torch

from stage2_student.model.row_starts import likelihood
from tests.zoo import models


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("start", [None, 3])
def test_later_pieces_have_the_nats_that_the_model_itself_gives_them(
    family: str, start: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_BATCH_TOKENS", 24)
    model, rng = models.tiny_model(family, 40).eval(), Random(0)
    tokens = {tuple(rng.choices(range(6), k=rng.choice([1, 2, 2, 3, 5]))) for _ in range(60)}
    found = likelihood.later_pieces_nats(model, tokens, start)
    model = model.double()
    assert found.keys() == tokens
    for pieces in tokens:
        nats = 0.0
        for size in range(1, len(pieces)):
            prompt = [*([] if start is None else [start]), *pieces[:size]]
            with torch.no_grad():
                logits_V = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
            nats += float(logits_V.double().log_softmax(-1)[pieces[size]])
        assert found[pieces] == pytest.approx(nats, abs=1e-4)


def test_a_bias_is_what_longer_tokens_leave_of_a_tokens_likelihood() -> None:
    """Tokens of two letters' pieces; texts of four pieces, each of which one token begins: the longest that fits."""
    rng = Random(1)
    letters, tokens = "ab", ["a", "b", "ab", "aba", "abab", "bb", "bba"]
    begun = [text for size in range(1, 4) for text in map("".join, itertools.product(letters, repeat=size))]
    a_follows = {text: rng.uniform(0.2, 0.8) for text in begun}

    def mass(text: str) -> float:
        """Return the probability of a text given its first letter."""
        given = [(a_follows[text[:size]], text[size]) for size in range(1, len(text))]
        return math.prod(share if letter == "a" else 1 - share for share, letter in given)

    pieces = {token: tuple(map(ord, token)) for token in tokens}
    biases = likelihood.token_biases({pieces[token]: math.log(mass(token)) for token in tokens})
    texts = ["".join(text) for text in itertools.product(letters, repeat=4)]
    for token in tokens:
        longest = [max((t for t in tokens if text.startswith(t)), key=len) for text in texts]
        share = sum(mass(text) for text, chosen in zip(texts, longest, strict=True) if chosen == token)
        assert math.exp(biases[pieces[token]]) == pytest.approx(share)


def test_a_token_that_longer_ones_leave_nothing_keeps_a_twentieth() -> None:
    biases = likelihood.token_biases({(1,): 0.0, (1, 2): math.log(0.6), (1, 3): math.log(0.4)})
    assert biases[(1,)] == pytest.approx(math.log(0.05)) and biases[(1, 2)] == pytest.approx(math.log(0.6))
