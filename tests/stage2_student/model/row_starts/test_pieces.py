"""Rows made from their pieces' rows, against loops in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import transfer as config
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.model.row_starts import INPUT_ROWS, OUTPUT_ROWS, Move
from tests.support.moved_models import planned
from tests.support.tiny import MERGES, tiny_tokenizer


@pytest.fixture(scope="module")
def moves() -> Move:
    """Plan a move with tokens of every kind."""
    old = ByteTokenizer.from_wrapped(tiny_tokenizer(MERGES), "old")
    merges = ["t h", "th e", "o n", "the r", "a n", "an d", "and on", "Ĥ Ģ"]
    new = ByteTokenizer.from_wrapped(tiny_tokenizer(merges), "new")
    embedding = torch.nn.Embedding(len(old.token_bytes), 4)
    model: Any = type("Model", (torch.nn.Module,), {"get_input_embeddings": lambda self: embedding})()
    return planned(model, old, new, {len(new.token_bytes) - 1: len(old.token_bytes) - 1}, averaged_row_scale=0.7)


def by_loops(kind: str, move: Move, weight_OD: np.ndarray, token: int) -> np.ndarray:
    """Make one row."""
    source = move.sources[token]
    if not source:
        return weight_OD.mean(0)
    rows = weight_OD[list(source)]
    if move.kinds[token] not in ("averaged", "fallback"):
        assert len(source) == 1
        return rows[0]
    sizes = np.array([len(move.old.token_bytes[piece] or b"") for piece in source], dtype=np.float64)
    mean = rows.mean(0)
    return {
        "mean": 0.7 * mean,
        "length_mean": 0.7 * (sizes[:, None] * rows).sum(0) / sizes.sum(),
        "norm": mean / np.linalg.norm(mean) * np.linalg.norm(rows, axis=1).mean(),
        "first": 0.7 * rows[0],
        "last": 0.7 * rows[-1],
    }[kind]


@pytest.mark.parametrize("kind", [kind for kind in INPUT_ROWS if kind != "lexicon"])
def test_rows_are_those_that_loops_make(kind: str, moves: Move) -> None:
    assert {"copied", "averaged", "fallback", "control", "unreachable"} == set(moves.kinds)
    weight_OD = torch.randn(len(moves.old.token_bytes), 4)
    made = INPUT_ROWS[kind](moves, weight_OD)
    expected = [by_loops(kind, moves, weight_OD.double().numpy(), token) for token in range(len(moves.sources))]
    torch.testing.assert_close(made.rows_VD.double(), torch.tensor(np.array(expected)), rtol=1e-5, atol=1e-6)
    assert made.bias_V is None and made.rows_VD.dtype == torch.float32


def test_the_recipe_knows_the_kinds_that_there_are() -> None:
    assert set(config.INPUT_ROWS) == {"auto", *INPUT_ROWS} and set(config.OUTPUT_ROWS) == {"auto", *OUTPUT_ROWS}
