"""Rows made by a user's own file: used as they are, or refused by name."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipeline.config import TransferConfig
from stage2_student.model.row_starts import Move, make_rows
from tests.bench.row_starts.focus import sparsemax, token_vectors
from tests.bench.row_starts.omp import pursued

OLD_OD = torch.arange(6.0).reshape(3, 2)
HEAD = "import torch\nfrom stage2_student.model.row_starts import NewRows\n\n\ndef make_rows(move, weight_OD):\n    "


def written(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(HEAD + body + "\n", encoding="utf-8")
    return str(file)


def move_to(num_tokens: int) -> Move:
    blank: Any = dict.fromkeys(Move._fields)
    return cast(Move, Move(**{**blank, "sources": [[]] * num_tokens}))


def test_own_rows_are_those_that_the_file_makes(tmp_path: Path) -> None:
    file = written(tmp_path, "return NewRows(weight_OD[[2, 0]] + 1, torch.zeros(2))")
    assert torch.equal(make_rows(file, move_to(2), OLD_OD).rows_VD, OLD_OD[[2, 0]] + 1)
    assert TransferConfig(input=file, output=file).files == (file,)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return weight_OD", r"row_starts\.NewRows, not a Tensor"),
        ("return NewRows(weight_OD)", r"finite rows of shape \(2, 2\)"),
        ("return NewRows(weight_OD[:2] / 0)", r"finite rows of shape \(2, 2\)"),
        ("return NewRows(weight_OD[:2], torch.zeros(3))", r"finite bias of shape \(2,\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_the_files_name(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(
        ValueError, match=rf"mine\.py: make_rows must return an? {said}|mine\.py: make_rows must return {said}"
    ):
        make_rows(written(tmp_path, body), move_to(2), OLD_OD)


def test_a_file_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.py, line 6: KeyError: 'none'"):
        make_rows(written(tmp_path, "return {}['none']"), move_to(2), OLD_OD)


def test_a_name_that_is_no_kind_of_rows_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'lexicon'"):
        TransferConfig(input="lexikon")


def test_pursuit_finds_the_atoms_that_a_row_is_made_of() -> None:
    atoms_SD = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    wanted_ND = torch.stack([2 * atoms_SD[3] - atoms_SD[17], atoms_SD[9] + 3 * atoms_SD[30]])
    chosen_NA, shares_NA = pursued(wanted_ND, atoms_SD, 6)
    torch.testing.assert_close(torch.einsum("na,nad->nd", shares_NA, atoms_SD[chosen_NA]), wanted_ND)
    large = [
        set(atoms_A[shares_A.abs() > 1e-3].tolist()) for atoms_A, shares_A in zip(chosen_NA, shares_NA, strict=True)
    ]
    assert large == [{3, 17}, {9, 30}]


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    generator = torch.Generator().manual_seed(1)
    scores_NS = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    shares_NS = sparsemax(scores_NS)
    torch.testing.assert_close(shares_NS.sum(1), torch.ones(20, dtype=torch.float64))
    others_NS = torch.rand(20, 7, generator=generator, dtype=torch.float64).softmax(1)
    # The nearest point of a convex set: no other lies on its outer side.
    assert (((scores_NS - shares_NS) * (others_NS - shares_NS)).sum(1) <= 1e-12).all()


def test_tokens_with_the_same_neighbours_have_the_same_vector() -> None:
    round_about = np.tile(np.arange(2, 12), 40)
    documents = [round_about, np.where(round_about == 5, 1, round_about)]  # 1 stands wherever 5 does
    vectors_VK, is_met_V = token_vectors(documents, 13)
    assert not is_met_V[0] and not is_met_V[12] and is_met_V[1:12].all()
    near_V = vectors_VK @ vectors_VK[1]
    assert near_V[[2, 3, 4, *range(6, 12)]].max() < near_V[5]
