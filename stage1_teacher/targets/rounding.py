"""Rounding of probabilities to the levels of `schemas.levels`, so that each of them and also their sum stay close.

The tail is 1 minus the sum of the entries. If each entry were rounded by itself, all the errors would end up in the
tail, which is often the smallest class. So the most probable symbol takes the level that suits both itself and the
tail, and the others may move to a neighbouring level if that lowers the objective: the sum over all classes of
2 (sqrt p - sqrt q)^2, which approximates their KL while both are close.

Shape legend: P positions, E entries; of tokens T tokens, A alternatives.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from schemas import NUM_SYMBOLS
from schemas.levels import NUM_RARE, OTHER_LOGPROBS, TOP_LOGPROBS
from stage1_teacher.reduction.sparsify import Entries
from stage1_teacher.reduction.token_entries import TokenEntries

_TOPS, _OTHERS = np.exp(TOP_LOGPROBS.astype(np.float64)), np.exp(OTHER_LOGPROBS.astype(np.float64))
_TOP_ROOTS, _OTHER_ROOTS = np.sqrt(_TOPS), np.sqrt(_OTHERS)
# Halfway between two levels: in the square root, or, among the rare levels, in the log.
_HALFWAY = np.where(
    np.arange(len(_OTHERS) - 1) < NUM_RARE,
    np.sqrt(_OTHERS[:-1] * _OTHERS[1:]),
    ((_OTHER_ROOTS[:-1] + _OTHER_ROOTS[1:]) / 2) ** 2,
)
_ABOVE_ONE = 1e3  # penalty for a sum above 1
_MAX_PASSES = 8


class RoundedEntries(NamedTuple):
    """Symbols, sorted again where rounding made two equal or swapped them, and their log-probabilities."""

    symbols_E: np.ndarray  # uint8
    logprobs_E: np.ndarray  # float32 nats, each one of `schemas.levels.LOGPROBS`; a position's sum to at most 1


def round_entries(entries: Entries) -> RoundedEntries:
    """Round every position's probabilities; the result is in descending level, then ascending symbol."""
    symbols_E, logprobs_E = entries.symbols_E.copy(), np.empty(len(entries.symbols_E), np.float32)
    _round(entries.counts_P, entries.probs_E, symbols_E, logprobs_E, NUM_SYMBOLS)
    return RoundedEntries(symbols_E, logprobs_E)


def round_alternatives(tokens: TokenEntries) -> tuple[np.ndarray, np.ndarray]:
    """Round the probabilities of each token's alternatives; ids and log-probabilities, sorted as `round_entries` does.

    However many alternatives a token has, there are others: its tail is a class of its own.
    """
    ids_A, logprobs_A = tokens.ids_A.copy(), np.empty(len(tokens.ids_A), np.float32)
    _round(tokens.counts_T, np.exp(tokens.logprobs_A.astype(np.float64)), ids_A, logprobs_A, 0)
    return ids_A, logprobs_A


@njit(nogil=True, error_model="numpy")
def _round(counts_P: Any, probs_E: Any, symbols_E: Any, logprobs_E: Any, num_classes: int) -> None:
    """Round the entries of each position in place; `num_classes`: how many entries leave no tail."""
    most = 0
    for position in range(counts_P.shape[0]):
        most = max(most, int(counts_P[position]))
    levels, roots = np.empty(most, dtype=np.int64), np.empty(most)
    start = 0
    for position in range(counts_P.shape[0]):
        stop = start + counts_P[position]
        if stop == start:
            continue
        top = _choose(probs_E[start:stop], levels, roots, num_classes)
        logprobs_E[start] = TOP_LOGPROBS[top]
        for entry in range(start + 1, stop):
            symbol, logprob, at = symbols_E[entry], OTHER_LOGPROBS[levels[entry - start]], entry
            while at > start and (
                logprobs_E[at - 1] < logprob or (logprobs_E[at - 1] == logprob and symbols_E[at - 1] > symbol)
            ):
                symbols_E[at], logprobs_E[at] = symbols_E[at - 1], logprobs_E[at - 1]
                at -= 1
            symbols_E[at], logprobs_E[at] = symbol, logprob
        start = stop


@njit(error_model="numpy")
def _choose(probs: Any, levels: Any, roots: Any, num_classes: int) -> Any:
    """Return the level of a position's most probable symbol, and write those of the others into `levels[1:]`.

    Args:
        probs: the position's, the largest first.
        roots: buffer for their square roots.
    """
    num = probs.shape[0]
    tail, remaining = 1.0, 1.0
    for i in range(num):
        tail -= probs[i]
        roots[i] = np.sqrt(probs[i])
        if i:
            levels[i] = np.searchsorted(_HALFWAY, probs[i])
            remaining -= _OTHERS[levels[i]]
    tail_root = np.sqrt(max(tail, 0.0)) if num != num_classes else 0.0
    top, loss = _best_top(roots[0], tail_root, remaining)
    for _ in range(_MAX_PASSES):
        moved = False
        for i in range(1, num):
            nearest = int(np.searchsorted(_HALFWAY, probs[i]))
            if nearest < NUM_RARE:  # a realised symbol's: kept as exact as possible
                break
            for level in range(max(nearest - 1, NUM_RARE), min(nearest + 2, len(_OTHERS))):
                price = _loss(roots[i], _OTHER_ROOTS[level]) - _loss(roots[i], _OTHER_ROOTS[levels[i]])
                if level == levels[i] or price >= loss:  # it cannot lower the loss
                    continue
                new_remaining = remaining + _OTHERS[levels[i]] - _OTHERS[level]
                new_top, new_loss = _best_top(roots[0], tail_root, new_remaining)
                if new_loss + price < loss - 1e-12:
                    levels[i], remaining, top, loss = level, new_remaining, new_top, new_loss
                    moved = True
        if not moved:
            break
    return top


@njit(error_model="numpy")
def _best_top(root: float, tail_root: float, remaining: float) -> Any:
    """Return (level, loss) of the most probable symbol and the tail, to which the others leave `remaining`.

    Without levels the best value would be the proportional share of `remaining`; the loss is convex, so one of the
    neighbouring levels is best.
    """
    if remaining <= _TOPS[0]:
        return 0, _ABOVE_ONE * (1.0 + _TOPS[0] - remaining)
    share = root * root / max(root * root + tail_root * tail_root, 1e-300)
    above = int(np.searchsorted(_TOPS, remaining * share))
    best, best_loss = 0, np.inf
    for level in range(max(above - 1, 0), min(above + 1, len(_TOPS))):
        rest = remaining - _TOPS[level]
        if rest > -1e-9:  # the sum's own rounding
            loss = _loss(root, _TOP_ROOTS[level]) + _loss(tail_root, np.sqrt(max(rest, 0.0)))
            if loss < best_loss:
                best, best_loss = level, loss
    return best, best_loss


@njit(error_model="numpy")
def _loss(root: float, other: float) -> Any:
    return 2.0 * (root - other) * (root - other)
