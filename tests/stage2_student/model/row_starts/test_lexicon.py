"""The lexicon's regression and states against brute force in float64."""

import itertools
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.dumps.clean import cache_leftovers
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.model.old_model import OldModel
from stage2_student.model.row_sources import two_parts
from stage2_student.model.row_starts import Move, NewRows, choice, chosen_kinds
from stage2_student.model.row_starts.lexicon import LONGER, Regression, lexicon
from stage2_student.model.student import Precision
from tests.support.moved_models import planned
from tests.support.tiny import tiny_tokenizer
from tests.zoo import models


def test_the_regression_is_the_minimum_over_standardized_features() -> None:
    rng = np.random.default_rng()
    features_NF = rng.normal(size=(300, 7)) * [1, 100, 0.01, 5, 1, 1, 0] + [0, 1e4, 3, -7, 0, 1, 2]
    rows_ND = features_NF[:, :3] @ rng.normal(size=(3, 4)) * 0.01 + rng.normal(size=(300, 4)) + 5
    regression = Regression(7, 4)
    for part in np.split(np.arange(300), [40, 41, 180]):
        regression.add(torch.tensor(features_NF[part]).float(), torch.tensor(rows_ND[part]).float())
    regression.solve(0.1)
    varying = features_NF[:, :6]  # the last is constant
    mean, deviation = varying.mean(0), varying.std(0)
    # Ridge regression as ordinary least squares with a row more for each feature; the intercept is free.
    standard = (varying - mean) / deviation
    augmented = np.vstack([np.hstack([standard, np.ones((300, 1))]), np.sqrt(300 * 0.1) * np.eye(6, 7)])
    solved, *_ = np.linalg.lstsq(augmented, np.vstack([rows_ND, np.zeros((6, 4))]), rcond=None)
    asked = features_NF[:20] + rng.normal(size=(20, 7)) * features_NF.std(0)
    expected = np.hstack([(asked[:, :6] - mean) / deviation, np.ones((20, 1))]) @ solved
    found = regression.predict(torch.tensor(asked).float()).numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba", "opt"])
@pytest.mark.parametrize("start", [None, 3])
def test_states_are_those_of_the_whole_model_at_the_last_token(family: str, start: int | None) -> None:
    model, rng = models.tiny_model(family, 40).eval(), Random(0)
    old = OldModel(lambda: model, family, 40, start)
    pieces = [rng.choices(range(40), k=size) for size in (1, 5, 2, 2, 3)]
    depths = [1, old.num_layers - 1] if old.num_layers > 2 else [1]
    found = {
        index: [state[at] for state in states]
        for ids, states in old.states_at_last(pieces, depths, 12, Precision(torch.float32))
        for at, index in enumerate(ids)
    }
    for index, sequence in enumerate(pieces):
        whole = [*([] if start is None else [start]), *sequence]
        with torch.no_grad():
            states = model(torch.tensor([whole]), use_cache=False, output_hidden_states=True).hidden_states
        for state, depth in zip(found[index], depths, strict=True):
            assert torch.allclose(state, states[depth][0, -1], atol=1e-5), (index, depth)


def test_a_token_is_split_where_its_rarer_part_is_the_least_rare() -> None:
    rng = Random()
    words = {"".join(rng.choices("abc", k=size)) for size in (1, 2, 2, 3, 3, 3, 4, 4, 5, 6) for _ in range(12)}
    spelling = {word.encode(): rng.randrange(10**6) for word in words}
    parts = two_parts(spelling)
    for spelled, token in spelling.items():
        pairs = [
            (a, b) for (left, a), (right, b) in itertools.product(spelling.items(), repeat=2) if left + right == spelled
        ]
        assert (token in parts) == bool(pairs)
        if pairs:
            assert parts[token] in pairs and max(parts[token]) == min(max(pair) for pair in pairs)


LETTERS = "abcdefghijklmnop"
PAIRS = [f"{a} {b}" for a in LETTERS for b in LETTERS]
TRIPLES = [f"{a}{b} {c}" for a, b, c in zip(LETTERS, LETTERS[3:], LETTERS[5:], strict=False)]


def pairs_to_triples(tied: bool, **transfer: str) -> tuple[Any, Move]:
    """Plan the move of a model whose tokens are letters and pairs of them to a tokenizer that knows triples too.

    The row of a pair is twice its second letter's row minus its first's.
    """
    old, new = (ByteTokenizer.from_wrapped(tiny_tokenizer(merges), "m") for merges in (PAIRS, PAIRS + TRIPLES))
    model = models.tiny_model("llama", len(old.token_bytes), tie_word_embeddings=tied)
    ids = {spelled: token for token, spelled in enumerate(old.token_bytes)}
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            for pair in PAIRS:
                first, second = pair.split()
                weight[ids[(first + second).encode()]] = 2 * weight[ids[second.encode()]] - weight[ids[first.encode()]]
    return model, planned(model, old, new, transfer=transfer)


@pytest.mark.parametrize("tied", [True, False])
def test_what_holds_of_the_old_tokens_and_their_parts_holds_of_the_new_ones(tied: bool) -> None:
    model, move = pairs_to_triples(tied)
    weight_OD = model.get_input_embeddings().weight.detach()
    made = lexicon(move, weight_OD)
    of_triples = [token for token, kind in enumerate(move.kinds) if kind == "averaged"]
    assert len(of_triples) == len(TRIPLES) and made.facts["lexicon_residual"] < 0.01
    for token in of_triples:
        first, last = move.sources[token]
        expected_D = 2 * weight_OD[last] - weight_OD[first]
        assert (made.rows_VD[token] / LONGER - expected_D).norm() < 0.1 * expected_D.norm()
    copied = [token for token, kind in enumerate(move.kinds) if kind == "copied"]
    assert torch.equal(made.rows_VD[copied], weight_OD[[move.sources[token][0] for token in copied]])


@pytest.mark.parametrize(
    ("tied", "named", "kinds"),
    [
        (True, {}, ("lexicon", "lexicon")),
        (False, {}, ("lexicon", "first_likelihood")),
        (True, {"output": "mean"}, ("mean", "mean")),
        (True, {"output": "first_likelihood"}, ("lexicon", "first_likelihood")),
        (False, {"input": "first"}, ("first", "first")),
        (False, {"output": "last"}, ("lexicon", "last")),
    ],
)
def test_auto_is_the_lexicon_and_for_a_head_of_its_own_the_likelihood(
    monkeypatch: pytest.MonkeyPatch, tied: bool, named: dict[str, str], kinds: tuple[str, str]
) -> None:
    monkeypatch.setattr(choice, "MIN_PARTS", len(PAIRS))
    assert chosen_kinds(pairs_to_triples(tied, **named)[1], tied) == kinds


def test_auto_is_the_mean_where_few_tokens_have_parts_or_no_states_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    _, move = pairs_to_triples(False)
    assert chosen_kinds(move, False) == ("mean", "mean")
    monkeypatch.setattr(choice, "MIN_PARTS", len(PAIRS))
    monkeypatch.setattr(OldModel, "gives_states", False)
    assert chosen_kinds(move, False) == ("mean", "mean")


def test_few_tokens_with_parts_are_refused_where_the_recipe_names_the_lexicon() -> None:
    model, move = pairs_to_triples(True)
    with pytest.raises(ValueError, match="has 3 of them; use mean"):
        lexicon(move._replace(parts=dict(list(move.parts.items())[:3])), model.get_input_embeddings().weight)


def test_a_token_of_many_pieces_is_read_from_its_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, move = pairs_to_triples(True)
    weight_OD = model.get_input_embeddings().weight.detach()
    of_triples = [token for token, kind in enumerate(move.kinds) if kind == "averaged"]
    longer = [[5, 9, *source] if token in of_triples else source for token, source in enumerate(move.sources)]
    # By its path it would be the function, which the package has under the same name.
    monkeypatch.setattr(import_module("stage2_student.model.row_starts.lexicon"), "_MAX_PIECES", 2)
    plain, found = lexicon(move, weight_OD), lexicon(move._replace(sources=longer), weight_OD)
    assert torch.allclose(found.rows_VD[of_triples], plain.rows_VD[of_triples], atol=1e-5)


def test_rows_are_made_once_of_a_model_whose_files_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLD_CACHE", str(tmp_path))
    model, move = pairs_to_triples(True)
    weight_OD = model.get_input_embeddings().weight.detach()

    def made(asked: Move = move, sha256: str | None = "a" * 64, loads: bool = True) -> NewRows:
        load = move.old_model.load if loads else lambda: pytest.fail("the model was asked again")
        old = OldModel(load, "old", move.old_model.num_rows, move.old_model.start_id, sha256)
        return lexicon(asked._replace(old_model=old), weight_OD)

    def kept() -> list[Path]:
        return sorted((tmp_path / "rows").glob("*")) if (tmp_path / "rows").exists() else []

    plain = made(sha256=None)
    assert not kept()
    first, again = made(), made(loads=False)
    for found in (first, again):
        assert torch.equal(found.rows_VD, plain.rows_VD) and found.facts == plain.facts
    [file] = kept()
    assert file.suffix == ".safetensors" and [left.path for left in cache_leftovers()] == [file]
    file.write_bytes(file.read_bytes()[:-5])  # damaged: made again
    assert torch.equal(made().rows_VD, plain.rows_VD)
    assert torch.equal(made(loads=False).rows_VD, plain.rows_VD)
    # Whatever else decides them gives other rows: the model's files, the tokens that spell a new one, the old rows.
    spelled = {token: list(reversed(source)) for token, source in enumerate(move.sources)}
    assert not torch.equal(made(move._replace(sources=list(spelled.values()))).rows_VD, plain.rows_VD)
    made(sha256="b" * 64)
    weight_OD = weight_OD + 1
    made()
    made(move._replace(parts=dict(list(move.parts.items())[16:])))  # what it learns from
    assert len(kept()) == 5
