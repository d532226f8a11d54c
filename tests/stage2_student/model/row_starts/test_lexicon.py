"""The lexicon's regression and states against brute force in float64."""

import itertools
from random import Random

import numpy as np
import pytest
import torch

from stage2_student.model.old_model import OldModel
from stage2_student.model.row_starts.lexicon import Regression, two_parts
from stage2_student.model.student import Precision
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
