"""Sums of rows into sparse targets on the device that reduced them, in float64: what crosses to the host is sparse.

The twin of `pipeline.covering.covering.Covering.targets` and `stage1_teacher.reduction.sparsify`, for the canonical
rows of many spans at once. Only `doubt`, a recurrence along each span, is left to the host.

Shape legend: S spans, R rows of all spans in order, P positions of all spans in order (a span's bytes + 1), V symbols
(256), N nodes of all rows in order, I intervals of all nodes in order, E entries, K entries kept of a position at most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.covering.covering import Covering
from pipeline.covering.targets import doubt
from schemas import END, NUM_SYMBOLS
from schemas.columns import MEASURES
from stage1_teacher.reduction.device_trie import DeviceTrie
from stage1_teacher.reduction.sparse_targets import SpanRequest, SparseTargets, Sparsity
from stage1_teacher.reduction.sparsify import Entries
from stage1_teacher.reduction.token_entries import TopTokens, keep_tokens
from stage1_teacher.reduction.types import DeviceMasses


class _Layout(NamedTuple):
    """Rows and positions of all spans, one behind another; on the device."""

    nodes_N: Tensor
    row_N: Tensor
    position_N: Tensor
    position_R: Tensor  # at which a row's path ends
    is_first_R: Tensor  # the span's first row
    document_P: Tensor  # the byte that follows; 0 at a span's last position
    is_last_P: Tensor
    token_P: Tensor  # number of the token that a position lies in, over all spans


class _Measures(NamedTuple):
    """Measures of a span's positions, named as in `pipeline.covering.targets.Targets`; P, float64."""

    dropped_P: np.ndarray
    token_end_P: np.ndarray
    doubt_P: np.ndarray


class _Summed(NamedTuple):
    """Dense targets of all positions, on the device."""

    probs_PV: Tensor
    realised_P: Tensor  # of the symbol that the text has there
    dropped_P: Tensor
    share_P: Tensor  # of the mass known just before the position that has ended there
    log_token_R: Tensor  # of the token that follows; nan in a span's last row


def device_targets(
    trie: DeviceTrie,
    spans: Sequence[tuple[Covering, SpanRequest]],
    masses: DeviceMasses,
    sparsity: Sparsity,
) -> list[SparseTargets]:
    """Sum the canonical rows of some spans, in order, into their sparse targets.

    Args:
        masses: of all rows, on the device.
        sparsity: `redistribute` is not supported here.
    """
    assert not sparsity.redistribute
    layout = _layout(spans, masses.masses_I.device)
    num_positions = len(layout.document_P)
    interval_I, node_I = trie.intervals(layout.nodes_N, len(masses.masses_I))
    log_token_R = masses.token_R.double().log()  # nan in a span's last row
    log_weight_R = _log_weights(log_token_R, layout.is_first_R)
    log_weight_N = log_weight_R[layout.row_N]
    num_complete_N = trie.num_complete_N[layout.nodes_N]
    reaches_N = trie.start_N[layout.nodes_N + 1] - trie.start_N[layout.nodes_N] > num_complete_N
    log_scale_P = torch.full((num_positions,), -torch.inf, dtype=torch.float64, device=log_weight_R.device)
    log_scale_P.scatter_reduce_(0, layout.position_N[reaches_N], log_weight_N[reaches_N], "amax")

    # A token that ends at position i belongs to the mass known just before i, and feeds no symbol.
    is_exact_I = interval_I - trie.start_N[layout.nodes_N][node_I] < num_complete_N[node_I]
    scale_N = (log_weight_N - log_scale_P[layout.position_N]).exp()
    ended_scale_N = (log_weight_N - log_scale_P[layout.position_N - 1]).exp()
    mass_I = masses.masses_I.double() * torch.where(is_exact_I, ended_scale_N[node_I], scale_N[node_I])
    position_I = layout.position_N[node_I]
    ended_P = torch.zeros(num_positions, dtype=torch.float64, device=mass_I.device)
    ended_P.index_add_(0, position_I, mass_I.where(is_exact_I, 0.0))
    mass_PV = torch.zeros(num_positions * NUM_SYMBOLS, dtype=torch.float64, device=mass_I.device)
    symbol_I = trie.symbol_J[interval_I].clamp(min=0)
    mass_PV.index_add_(0, position_I * NUM_SYMBOLS + symbol_I, mass_I.where(~is_exact_I, 0.0))
    end_R = masses.end_R.double() * (log_weight_R - log_scale_P[layout.position_R]).exp()
    mass_PV.index_add_(0, layout.position_R * NUM_SYMBOLS + END, end_R)
    mass_PV = mass_PV.view(num_positions, NUM_SYMBOLS)
    prefix_mass_P = mass_PV.sum(1)
    mass_PV /= prefix_mass_P[:, None]

    # Shares of the mass known just before each position: the previous position's mass on the document's symbol.
    realised_P = mass_PV.gather(1, layout.document_P[:, None])[:, 0]
    known_P = (realised_P * prefix_mass_P).roll(1)
    log_before_P = log_scale_P.roll(1)
    continued_P = torch.zeros_like(ended_P)
    continued_P[layout.position_R] = (log_weight_R - log_before_P[layout.position_R]).exp()
    is_first_P = layout.is_last_P.roll(1)
    dropped_P = ((ended_P - continued_P) / known_P).clamp(0.0, 1.0).where(~is_first_P, 0.0)
    share_P = (ended_P / known_P).clamp(0.0, 1.0)
    found = _sparse(spans, layout, _Summed(mass_PV, realised_P, dropped_P, share_P, log_token_R), sparsity)
    return _with_tokens(found, spans, masses, sparsity.min_token_prob) if sparsity.num_top else found


def _with_tokens(
    found: Sequence[SparseTargets], spans: Sequence[tuple[Covering, SpanRequest]], masses: DeviceMasses, min_prob: float
) -> list[SparseTargets]:
    """Add the alternatives of the spans' tokens; of a row, its most probable tokens are brought to the host."""
    ids_RK, logprobs_RK = (tensor.cpu().numpy() for tensor in (masses.top_ids_RK, masses.top_logprobs_RK))
    end_R, token_R = (tensor.double().cpu().numpy() for tensor in (masses.end_R, masses.token_R))
    added, first = [], 0
    for of_span, (covering, request) in zip(found, spans, strict=True):
        last = first + len(covering.offsets) - 1
        top = TopTokens(ids_RK[first:last], logprobs_RK[first:last])
        tokens_T = np.asarray(request.tokens, dtype=np.int32)
        kept = keep_tokens(top, tokens_T, token_R[first:last], end_R[first : last + 1], min_prob)
        added.append(of_span._replace(tokens=kept))
        first = last + 1
    return added


def _layout(spans: Sequence[tuple[Covering, SpanRequest]], device: torch.device) -> _Layout:
    sizes = [len(covering.document) + 1 for covering, _ in spans]
    firsts = np.cumsum([0, *sizes[:-1]])
    parts: list[list[np.ndarray]] = [[] for _ in _Layout._fields]
    num_rows = num_tokens = 0
    for (covering, _), first, size in zip(spans, firsts.tolist(), sizes, strict=True):
        canonical, offsets_R = covering.canonical, covering.offsets
        rows = np.arange(len(offsets_R))
        token_P = np.searchsorted(offsets_R, np.arange(size), side="right") - 1
        of_span = (
            canonical.nodes_N,
            (num_rows + rows).repeat(np.diff(canonical.row_nodes)),
            first + canonical.positions_N,
            first + offsets_R,
            rows == 0,
            np.append(np.frombuffer(covering.document, np.uint8), 0),
            np.arange(size) == size - 1,
            num_tokens + token_P,
        )
        for part, values in zip(parts, of_span, strict=True):
            part.append(values)
        num_rows, num_tokens = num_rows + len(offsets_R), num_tokens + len(offsets_R)
    joined = [torch.from_numpy(np.concatenate(part)).to(device) for part in parts]
    return _Layout(*(values if values.dtype == torch.bool else values.long() for values in joined))


def _log_weights(log_token_R: Tensor, is_first_R: Tensor) -> Tensor:
    """Return the log-weight of each row: the sum over the tokens before it, 0 in a span's first row."""
    before_R = log_token_R.roll(1).masked_fill(is_first_R, 0.0)  # so that the nan of each last row is dropped
    sums_R = before_R.cumsum(0)
    span_R = is_first_R.cumsum(0) - 1
    return sums_R - sums_R[is_first_R][span_R]


def _sparse(
    spans: Sequence[tuple[Covering, SpanRequest]], layout: _Layout, summed: _Summed, sparsity: Sparsity
) -> list[SparseTargets]:
    """Keep what is stored of each span's supervised positions, and bring it to the host."""
    starts_P = torch.ones_like(layout.is_last_P)
    starts_P[1:] = layout.token_P[1:] != layout.token_P[:-1]
    # The running maximum since the token began, 0 at its start: tokens are numbered, so that it starts anew in each.
    inside_P = summed.share_P.where(~starts_P, 0.0).nan_to_num()
    token_end_P = (inside_P + 2 * layout.token_P).cummax(0).values - 2 * layout.token_P
    symbol_P = layout.document_P.where(~layout.is_last_P, END)
    counts_P, symbols_E, probs_E = _keep(summed.probs_PV, symbol_P, sparsity.top_k, sparsity.min_prob)
    dropped, realised, token_end, counts, symbols, probs, token_logprobs = (
        tensor.cpu().numpy()
        for tensor in (
            summed.dropped_P,
            summed.realised_P,
            token_end_P,
            counts_P,
            symbols_E,
            probs_E,
            summed.log_token_R,
        )
    )
    entry_bounds = np.append(0, counts.astype(np.int64).cumsum())
    found, position, row = [], 0, 0
    for covering, request in spans:
        size, num_rows = len(covering.document) + 1, len(covering.offsets)
        of_span = slice(position, position + size)
        doubt_P = doubt(dropped[of_span], realised[of_span][:-1], sparsity.arithmetic)
        measures = _Measures(dropped[of_span], token_end[of_span], doubt_P)
        ranges = [(entry_bounds[position + first], entry_bounds[position + last]) for first, last in request.kept]
        kept = [np.concatenate([values[first:last] for first, last in ranges]) for values in (symbols, probs)]
        found.append(
            SparseTargets(
                Entries(request.of_kept(counts[of_span]).astype(np.uint16), *kept),
                np.stack([request.of_kept(getattr(measures, f"{c.name}_P")) for c in MEASURES]),
                token_logprobs[row : row + num_rows - 1],
            )
        )
        position, row = position + size, row + num_rows
    return found


def _keep(probs_PV: Tensor, realised_P: Tensor, top_k: int, min_prob: float) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `sparsify` does: return counts (P, int32), symbols (E, uint8) and probabilities (E, float64)."""
    sorted_PV, symbol_PV = probs_PV.sort(dim=1, descending=True, stable=True)  # ties in ascending order
    probs_PK, symbol_PK = sorted_PV[:, :top_k], symbol_PV[:, :top_k]
    is_kept_PK = probs_PK >= min_prob
    is_missing_P = ~((symbol_PK == realised_P[:, None]) & is_kept_PK).any(1)
    probs_PK = torch.cat([probs_PK, probs_PV.gather(1, realised_P[:, None])], dim=1)
    symbol_PK = torch.cat([symbol_PK, realised_P[:, None]], dim=1)
    is_kept_PK = torch.cat([is_kept_PK, is_missing_P[:, None]], dim=1)
    return is_kept_PK.sum(1).to(torch.int32), symbol_PK[is_kept_PK].to(torch.uint8), probs_PK[is_kept_PK]
