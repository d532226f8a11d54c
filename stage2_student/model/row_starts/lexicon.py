"""Input rows read from the model's inner lexicon: what its lower layers make of a token's pieces, turned into a row.

A language model puts the pieces of a word together at the last of them, in its lower layers (Kaplan et al. 2024, "From
Tokens to Words: On the Inner Lexicon of LLMs", arXiv 2410.05864). Which row stands for what they then hold is learned
from the old vocabulary: most of its tokens are spelled by two others, so that each gives a pair of the states over its
two parts and its own row. A ridge regression of all these pairs makes the rows of new tokens. It needs no text.

Shape legend: V tokens of the new vocabulary, O rows of the old model, D hidden width, N tokens in pieces, F features.
"""

import math
from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from pipeline.runtime import log
from pipeline.runtime.counted import Counted
from stage2_student.model.old_model import OldModel
from stage2_student.model.row_starts.base import Move, NewRows
from stage2_student.model.row_starts.kept_rows import MadeRows, in_pieces, kept_rows
from stage2_student.model.row_starts.pieces import mean_rows, row_scales
from stage2_student.model.student import Precision

DEPTHS = (1 / 15, 2 / 15, 4 / 15, 6 / 15)  # of the layers whose states are read: the best of the sets tried
RIDGE = 1e-2  # of a standardized feature's variance
# A ridge regression's rows are too short: their mean norm is three quarters of the norm of rows that the model has
# learned. Students start closer with 1.15 times them than with 1 time, by 0.014 bits per byte in domain and
# 0.003 out of it, where the head is the embedding.
LONGER = 1.15
_HELD_OUT = 16  # every so many tokens one is kept from the regression, to say how well it does
_MAX_PIECES = 32  # a longer token (a line of dashes) is read from its last pieces
_TOKENS_AT_ONCE = 16384
_PRECISION = Precision(torch.bfloat16)


def lexicon(move: Move, weight_OD: Tensor) -> NewRows:
    """Make the rows that the old model's states over the pieces ask for.

    Raises:
        ValueError: the model does not give the states between its layers, or too few old tokens have two parts.
    """
    rows_VD = mean_rows(weight_OD, move.sources, row_scales(move))
    if len(move.parts) < 2 * _HELD_OUT:
        raise ValueError(
            f"student.transfer: lexicon learns from old tokens that two others spell, and {move.old_model.name} has "
            f"{len(move.parts)} of them; use mean"
        )
    made_ND, facts = kept_rows(move, weight_OD, __file__, lambda: _made(move, weight_OD))
    rows_VD[in_pieces(move)] = made_ND
    return NewRows(rows_VD, facts=facts)


def _made(move: Move, weight_OD: Tensor) -> MadeRows:
    tokens_N, parts = in_pieces(move), move.parts
    features = Features(move.old_model, weight_OD)
    tokens = Random(0).sample(sorted(parts), len(parts))
    held_out, learned = tokens[::_HELD_OUT], sorted(t for i, t in enumerate(tokens) if i % _HELD_OUT)
    log.info(f"{move.old_model.name}: reads {len(learned):,} of its tokens in two parts, to learn what its rows hold")
    regression = Regression(features.width, weight_OD.shape[1])
    with Counted("old tokens read in two parts", len(learned)) as counted:
        for ids, states_NF in features.chunks([parts[t] for t in learned]):
            regression.add(states_NF, weight_OD[[learned[i] for i in ids]].float().to(states_NF.device))
            counted.add(len(ids))
    regression.solve(RIDGE)
    residual = _residual(regression, features, [parts[t] for t in held_out], weight_OD[held_out])
    made_ND = torch.empty(len(tokens_N), weight_OD.shape[1])
    with Counted("new tokens read in pieces", len(tokens_N)) as counted:
        for ids, states_NF in features.chunks([move.sources[token][-_MAX_PIECES:] for token in tokens_N]):
            made_ND[ids] = LONGER * regression.predict(states_NF).cpu()
            counted.add(len(ids))
    log.info(
        f"rows of {len(tokens_N):,} tokens from them; of held-out tokens' variance {residual:.0%} stays unexplained"
    )
    return made_ND, {"lexicon_tokens": len(learned), "lexicon_residual": round(residual, 4)}


class Features:
    """Features of a token in pieces: rows of the first, of the last, and of all in the mean; states at the last.

    Attributes:
        width: number of features.
    """

    def __init__(self, old_model: OldModel, weight_OD: Tensor) -> None:
        self._model, self._weight_OD = old_model, weight_OD
        self._depths = sorted({max(1, round(depth * old_model.num_layers)) for depth in DEPTHS})
        self.width = (3 + len(self._depths)) * int(weight_OD.shape[1])

    def chunks(self, pieces: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield indices of tokens, and their features (N, F) in float32, for all tokens."""
        for ids, states in self._model.states_at_last(pieces, self._depths, _TOKENS_AT_ONCE, _PRECISION):
            sources = [pieces[i] for i in ids]
            ones = torch.ones(len(ids))
            rows = [
                mean_rows(self._weight_OD, part, ones)
                for part in ([s[:1] for s in sources], [s[-1:] for s in sources], sources)
            ]
            yield ids, torch.cat([*(row.to(states[0].device) for row in rows), *states], dim=1)


class Regression:
    """Ridge regression from moments in float64, so that no feature is kept.

    Features are standardized; one that does not vary is left out.
    """

    def __init__(self, num_features: int, width: int) -> None:
        self._count = 0
        self._origin_F: Tensor | None = None  # near the mean: moments about it lose no digits
        self._sums_F = torch.zeros(num_features, dtype=torch.float64)
        self._sums_D = torch.zeros(width, dtype=torch.float64)
        self._moments_FF = torch.zeros(num_features, num_features, dtype=torch.float64)
        self._products_FD = torch.zeros(num_features, width, dtype=torch.float64)
        self._weights_FD = torch.empty(0)
        self._bias_D = torch.empty(0)

    def add(self, features_NF: Tensor, rows_ND: Tensor) -> None:
        """Take in tokens: float32 features, and rows."""
        if self._origin_F is None:
            self._origin_F = features_NF.mean(0)
        features_NF = features_NF - self._origin_F
        self._count += len(features_NF)
        self._sums_F += features_NF.sum(0, dtype=torch.float64).cpu()
        self._sums_D += rows_ND.sum(0, dtype=torch.float64).cpu()
        self._moments_FF += (features_NF.T @ features_NF).double().cpu()
        self._products_FD += (features_NF.T @ rows_ND).double().cpu()

    def solve(self, ridge: float) -> None:
        """Find the weights that minimize the mean squared error plus `ridge` times their squares."""
        mean_F, mean_D = self._sums_F / self._count, self._sums_D / self._count
        self._moments_FF /= self._count
        self._moments_FF -= torch.outer(mean_F, mean_F)
        deviation_F = self._moments_FF.diagonal().clamp(min=0).sqrt()
        per_deviation_F = torch.where(deviation_F > 1e-6 * deviation_F.max(), 1 / deviation_F, 0.0)
        self._moments_FF *= per_deviation_F[:, None] * per_deviation_F
        self._moments_FF.diagonal().add_(ridge)
        covariance_FD = (self._products_FD / self._count - torch.outer(mean_F, mean_D)) * per_deviation_F[:, None]
        solved_FD = torch.cholesky_solve(covariance_FD, torch.linalg.cholesky(self._moments_FF))
        weights_FD = solved_FD * per_deviation_F[:, None]
        assert self._origin_F is not None, "no tokens to learn from"
        origin_F = self._origin_F.double().cpu()
        self._weights_FD = weights_FD.float()
        self._bias_D = (mean_D - (mean_F + origin_F) @ weights_FD).float()

    def predict(self, features_NF: Tensor) -> Tensor:
        """Return rows (N, D), float32."""
        return features_NF @ self._weights_FD.to(features_NF.device) + self._bias_D.to(features_NF.device)


def _residual(regression: Regression, features: Features, pieces: Sequence[Sequence[int]], rows_ND: Tensor) -> float:
    """Return the share of these rows' variance that the regression does not explain."""
    rows_ND = rows_ND.float()
    squares = sum(
        float((regression.predict(states_NF).cpu() - rows_ND[ids]).square().sum())
        for ids, states_NF in features.chunks(pieces)
    )
    variance = float((rows_ND - rows_ND.mean(0)).square().sum())
    return squares / variance if variance else math.nan
