"""Sparse targets of a span: what is stored of it, made where its rows are reduced.

Shape legend: P supervised positions, E entries, R rows, M measures (`schemas.columns.MEASURES`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.dropped_mass import redistribute
from pipeline.covering.targets import Targets
from schemas import END
from schemas.columns import MEASURES
from stage1_teacher.reduction.sparsify import Entries, sparsify
from stage1_teacher.reduction.token_entries import TokenEntries, TopTokens, keep_tokens


class Sparsity(NamedTuple):
    """Limits of what is kept of dense targets; see `pipeline.config.DumpConfig`."""

    top_k: int
    min_prob: float
    redistribute: bool = False  # of dropped mass, by a guess (`pipeline.covering.dropped_mass`)
    arithmetic: int = 0  # `schemas.ARITHMETIC`
    num_top: int = 0  # alternatives of each token; 0: none are kept
    min_token_prob: float = 0.0  # of an alternative


class SpanRequest(NamedTuple):
    """A span of a prompt whose targets are wanted.

    Attributes:
        first: index of the prompt's token after which the first row stands; one more row follows each token.
        tokens: their ids.
        document: the bytes that they spell, including the tokenizer's prefix.
        kept: ranges of the supervised positions, ascending; there is one position per byte, and a last one whose symbol
            is END.
    """

    first: int
    tokens: Sequence[int]
    document: bytes
    kept: tuple[tuple[int, int], ...]

    def realised(self) -> np.ndarray:
        """Return the symbol that the text has at each supervised position: P, uint8."""
        symbols = np.frombuffer(self.document + bytes([END]), dtype=np.uint8)
        return self.of_kept(symbols)

    def of_kept(self, values: np.ndarray) -> np.ndarray:
        """Return the values at the supervised positions, along the first axis."""
        parts = [values[first:last] for first, last in self.kept]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class SparseTargets(NamedTuple):
    """Targets of a span's supervised positions, before rounding."""

    entries: Entries
    measures_MP: np.ndarray  # in the order of MEASURES
    token_logprobs: np.ndarray  # R - 1, of the span's tokens
    tokens: TokenEntries | None = None


def sparse_targets(
    targets: Targets, request: SpanRequest, sparsity: Sparsity, rows: Sequence[ReducedRow] = ()
) -> SparseTargets:
    """Return what is stored of a span's dense targets, which start at its first position.

    Args:
        rows: its canonical rows, if alternatives of its tokens are kept.
    """
    return SparseTargets(
        sparsify(request.of_kept(targets.probs_PV), request.realised(), sparsity.top_k, sparsity.min_prob),
        np.stack([request.of_kept(getattr(targets, f"{column.name}_P")) for column in MEASURES]),
        targets.token_logprobs,
        _token_entries(rows, request, sparsity) if sparsity.num_top else None,
    )


def _token_entries(rows: Sequence[ReducedRow], request: SpanRequest, sparsity: Sparsity) -> TokenEntries:
    ids_RK, logprobs_RK = (np.stack([getattr(row, name) for row in rows]) for name in ("top_ids_K", "top_logprobs_K"))
    if not ids_RK.shape[1]:
        raise ValueError(
            "the engine gives no most probable tokens of its rows, which dump.tokens needs: reduce them with "
            "stage1_teacher.reduction.reducer.Reducer, or fill in ReducedRow.top_ids_K and top_logprobs_K"
        )
    return keep_tokens(
        TopTokens(ids_RK[:-1], logprobs_RK[:-1]),
        np.asarray(request.tokens, dtype=np.int32),
        np.array([row.token for row in rows[:-1]]),
        np.array([row.end for row in rows]),
        sparsity.min_token_prob,
    )


def reduce_span(
    covering: Covering, rows: Sequence[ReducedRow], request: SpanRequest, sparsity: Sparsity
) -> SparseTargets:
    """Sum the canonical rows of a span into its sparse targets."""
    targets = covering.targets(rows)
    summed = redistribute(targets, covering) if sparsity.redistribute else targets
    return sparse_targets(summed, request, sparsity, rows)
