"""Dense targets made sparse: the most probable symbols of each position, and always the one that the document really has.

Shape legend: P positions, V symbols (256), E entries.
"""

import numpy as np

from schemas import NUM_SYMBOLS

# A stored log-probability of a symbol the teacher all but rules out; float16 holds it, and exp of it is 1e-35.
MIN_LOGPROB = -80.0


def sparsify(
    probs_PV: np.ndarray, realised_P: np.ndarray, top_k: int, min_prob: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the `top_k` most probable symbols with probability at least `min_prob`, and the realised one.

    Args:
        probs_PV: float64, rows sum to 1.
        realised_P: uint8, the symbol that follows in the document.
    Returns:
        (entry_counts_P uint16, symbols_E uint8, logprobs_E float16): in descending probability within a position, never
        renormalised. With top_k 256 and min_prob 0 all 256 symbols of a position are stored.
    """
    num_positions = len(probs_PV)
    if not num_positions:
        return np.empty(0, np.uint16), np.empty(0, np.uint8), np.empty(0, np.float16)
    width = min(top_k, NUM_SYMBOLS)
    top_Pk = np.argpartition(-probs_PV, width - 1, axis=1)[:, :width] if width < NUM_SYMBOLS else None
    keep_PV = np.zeros(probs_PV.shape, dtype=bool)
    if top_Pk is None:
        keep_PV[:] = True
    else:
        np.put_along_axis(keep_PV, top_Pk, True, axis=1)
    keep_PV &= probs_PV >= min_prob
    keep_PV[np.arange(num_positions), realised_P] = True
    position_E, symbol_E = np.nonzero(keep_PV)
    prob_E = probs_PV[position_E, symbol_E]
    order = np.lexsort((symbol_E, -prob_E, position_E))
    with np.errstate(divide="ignore"):
        logprobs_E = np.maximum(np.log(prob_E[order]), MIN_LOGPROB)
    counts_P = keep_PV.sum(axis=1).astype(np.uint16)
    return counts_P, symbol_E[order].astype(np.uint8), np.minimum(logprobs_E, 0.0).astype(np.float16)
