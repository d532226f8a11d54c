"""Rows made from the rows of a token's pieces alone.

Shape legend: V tokens of the new vocabulary, O rows of the old model, D hidden width.
Source: Gee et al. 2022, EMNLP industry track, "Fast Vocabulary Transfer for Language Model Compression", for `mean`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage2_student.model.row_starts.base import IN_PIECES, Move, NewRows

Shares = Callable[[Sequence[int]], Sequence[float]]


def mean_rows(weight_OD: Tensor, sources: Sequence[Sequence[int]], scales_V: Tensor) -> Tensor:
    """Return float32 rows: row `i` is `scales[i]` times the mean of the rows `sources[i]`.

    An empty source means all rows.
    """
    return _combined(weight_OD, sources, scales_V, None)


def weighted_rows(
    weight_OD: Tensor, sources: Sequence[Sequence[int]], scales_V: Tensor, shares: Sequence[Sequence[float]]
) -> Tensor:
    """Return float32 rows: row `i` is `scales[i]` times the sum of the rows `sources[i]`, each times its share.

    An empty source means the mean of all rows.
    """
    return _combined(weight_OD, sources, scales_V, torch.tensor([share for row in shares for share in row]))


def _combined(weight_OD: Tensor, sources: Sequence[Sequence[int]], scales_V: Tensor, shares_F: Tensor | None) -> Tensor:
    flat_F = torch.tensor([i for source in sources for i in source], dtype=torch.long)
    counts_V = torch.tensor([len(source) for source in sources])
    into_F = torch.repeat_interleave(torch.arange(len(sources)), counts_V)
    rows_FD = weight_OD.float()[flat_F]
    rows_VD = torch.zeros(len(sources), weight_OD.shape[1])
    if shares_F is None:
        rows_VD.index_add_(0, into_F, rows_FD)
        rows_VD /= counts_V.clamp(min=1)[:, None]
    else:
        rows_VD.index_add_(0, into_F, shares_F[:, None] * rows_FD)
    rows_VD[counts_V == 0] = weight_OD.float().mean(0)
    return scales_V[:, None] * rows_VD


def are_made(move: Move) -> Tensor:
    """Return which rows are made, not copied: bool by new token."""
    return torch.tensor([kind in IN_PIECES for kind in move.kinds])


def row_scales(move: Move) -> Tensor:
    """Return `student.averaged_row_scale` for rows that are made, 1 for the others."""
    assert move.recipe.student is not None
    return torch.where(are_made(move), move.recipe.student.averaged_row_scale, 1.0)


def mean(move: Move, weight_OD: Tensor) -> NewRows:
    """Make the mean of the pieces' rows, scaled."""
    return NewRows(mean_rows(weight_OD, move.sources, row_scales(move)))


def norm(move: Move, weight_OD: Tensor) -> NewRows:
    """Make the mean of the pieces' rows, at the mean of their lengths (Euclidean norms): a mean is shorter."""
    rows_VD = mean_rows(weight_OD, move.sources, torch.ones(len(move.sources)))
    norms_V = mean_rows(weight_OD.float().norm(dim=1, keepdim=True), move.sources, torch.ones(len(move.sources)))[:, 0]
    scaled_VD = rows_VD * (norms_V / rows_VD.norm(dim=1).clamp(min=1e-30))[:, None]
    return NewRows(torch.where(are_made(move)[:, None], scaled_VD, rows_VD))


def length_mean(move: Move, weight_OD: Tensor) -> NewRows:
    """Make the mean of the pieces' rows, weighted by their numbers of bytes, scaled."""
    sizes = [max(1, len(spelled or b"")) for spelled in move.old.token_bytes]
    return _with_shares(move, weight_OD, lambda source: [sizes[token] for token in source])


def first(move: Move, weight_OD: Tensor) -> NewRows:
    """Make the first piece's row, scaled."""
    return _with_shares(move, weight_OD, lambda source: [float(i == 0) for i in range(len(source))])


def last(move: Move, weight_OD: Tensor) -> NewRows:
    """Make the last piece's row, scaled."""
    return _with_shares(move, weight_OD, lambda source: [float(i == len(source) - 1) for i in range(len(source))])


def _with_shares(move: Move, weight_OD: Tensor, weights: Shares) -> NewRows:
    shares = []
    for source, kind in zip(move.sources, move.kinds, strict=True):
        of_row = weights(source) if kind in IN_PIECES else [1.0] * len(source)
        shares.append([share / sum(of_row) for share in of_row])
    return NewRows(weighted_rows(weight_OD, move.sources, row_scales(move), shares))
