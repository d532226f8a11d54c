"""Dense targets made sparse: the most probable symbols of each position, and always the one that the document really has.

The most probable one stays even below `min_prob`: its probability is what the codes of the others leave (`schemas.coding`).

Shape legend: P positions, V symbols (256), E entries, Q some of the positions.
"""

import numpy as np

from schemas import NUM_SYMBOLS
from schemas.coding import Entries


def sparsify(probs_PV: np.ndarray, realised_P: np.ndarray, top_k: int, min_prob: float) -> Entries:
    """Keep the `top_k` most probable symbols with probability at least `min_prob`, and the realised one.

    With top_k 256 and min_prob 0 all 256 symbols of a position are stored. Nothing is renormalised.

    Args:
        probs_PV: float64, rows sum to 1.
        realised_P: uint8, the symbol that follows in the document.
    """
    keep_PV = probs_PV >= min_prob
    counts_P = np.count_nonzero(keep_PV, axis=1)
    flat_Q = np.flatnonzero(counts_P == 0)
    keep_PV[flat_Q, probs_PV[flat_Q].argmax(axis=1)] = True
    counts_P[flat_Q] = 1
    every_P = np.arange(len(probs_PV))
    counts_P += ~keep_PV[every_P, realised_P]
    keep_PV[every_P, realised_P] = True
    over_Q = np.flatnonzero(counts_P > top_k)
    if len(over_Q):
        keep_PV[over_Q] = _most_probable(np.where(keep_PV[over_Q], probs_PV[over_Q], -1.0), top_k)
        keep_PV[over_Q, realised_P[over_Q]] = True
        counts_P[over_Q] = np.count_nonzero(keep_PV[over_Q], axis=1)
    kept_E = np.flatnonzero(keep_PV)
    return Entries(counts_P, (kept_E % NUM_SYMBOLS).astype(np.uint8), probs_PV.ravel()[kept_E].astype(np.float64))


def _most_probable(probs_QV: np.ndarray, top_k: int) -> np.ndarray:
    """Bool: the `top_k` largest of each row."""
    keep_QV = np.zeros(probs_QV.shape, dtype=bool)
    # Without sorting, which takes five times as long.
    keep_QV[np.arange(len(probs_QV))[:, None], np.argpartition(probs_QV, -top_k, axis=1)[:, -top_k:]] = True
    return keep_QV
