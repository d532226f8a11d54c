"""Sparsification of dense targets: the most probable symbols of each position, and always the document's own.

Compiled by numba: a position is read once, and the kept entries are sorted as they are found.

Shape legend: P positions, V symbols (256), E entries.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from schemas import NUM_SYMBOLS


class Entries(NamedTuple):
    """Kept entries of some positions, in descending probability within each; the rest up to 1 is the tail."""

    counts_P: np.ndarray  # uint16, at least 1
    symbols_E: np.ndarray  # uint8; ties in ascending order
    probs_E: np.ndarray  # float64


def sparsify(probs_PV: np.ndarray, realised_P: np.ndarray, top_k: int, min_prob: float) -> Entries:
    """Keep the `top_k` most probable symbols with probability at least `min_prob`, and the realised one.

    Nothing is renormalised. With top_k 256 and min_prob 0 all 256 symbols of a position are kept.

    Args:
        probs_PV: float64, rows sum to 1.
        realised_P: uint8, the symbol that follows in the document.
    """
    max_entries = len(probs_PV) * min(top_k + 1, NUM_SYMBOLS)
    entries = Entries(
        np.empty(len(probs_PV), np.uint16), np.empty(max_entries, np.uint8), np.empty(max_entries, np.float64)
    )
    num_entries = _keep(np.ascontiguousarray(probs_PV, np.float64), realised_P, top_k, min_prob, *entries)
    return Entries(entries.counts_P, entries.symbols_E[:num_entries].copy(), entries.probs_E[:num_entries].copy())


@njit(nogil=True, error_model="numpy")
def _keep(
    probs_PV: Any, realised_P: Any, top_k: int, min_prob: float, counts_P: Any, symbols_E: Any, probs_E: Any
) -> int:
    """Fill in the entries; returns how many."""
    start = 0
    for position in range(probs_PV.shape[0]):
        stop = start
        for symbol in range(NUM_SYMBOLS):
            prob = probs_PV[position, symbol]
            if prob >= min_prob:
                if stop < start + top_k:
                    stop += 1
                elif prob <= probs_E[stop - 1]:
                    continue
                _insert(symbol, prob, start, stop - 1, symbols_E, probs_E)
        realised = realised_P[position]
        if not np.any(symbols_E[start:stop] == realised):
            # Last: below min_prob, or below the smallest of the top_k (or equal to it with a higher byte).
            symbols_E[stop], probs_E[stop] = realised, probs_PV[position, realised]
            stop += 1
        counts_P[position] = stop - start
        start = stop
    return start


@njit(error_model="numpy")
def _insert(symbol: int, prob: float, first: int, last: int, symbols_E: Any, probs_E: Any) -> None:
    """Insert an entry into the sorted range `first .. last`, of which `last` is free."""
    at = last
    while at > first and probs_E[at - 1] < prob:
        symbols_E[at], probs_E[at] = symbols_E[at - 1], probs_E[at - 1]
        at -= 1
    symbols_E[at], probs_E[at] = symbol, prob
