"""Dense targets made sparse: the most probable symbols of each position, and always the one that the document really has.

Shape legend: P positions, V symbols (256), E entries.
"""

import numpy as np

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
    keep_PV = probs_PV >= min_prob
    rows = np.arange(num_positions)
    keep_PV[rows, realised_P] = True
    position_E, symbol_E, prob_E = _ranked(keep_PV, probs_PV)
    # Ranks beyond top_k go, unless the symbol is the realised one.
    first_P = np.concatenate([[0], np.cumsum(keep_PV.sum(axis=1))[:-1]])
    stays_E = (np.arange(len(position_E)) - first_P[position_E] < top_k) | (symbol_E == realised_P[position_E])
    position_E, symbol_E, prob_E = position_E[stays_E], symbol_E[stays_E], prob_E[stays_E]
    with np.errstate(divide="ignore"):
        logprobs_E = np.maximum(np.log(prob_E), MIN_LOGPROB)
    counts_P = np.bincount(position_E, minlength=num_positions).astype(np.uint16)
    return counts_P, symbol_E.astype(np.uint8), np.minimum(logprobs_E, 0.0).astype(np.float16)


def _ranked(keep_PV: np.ndarray, probs_PV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position, symbol, probability) of what is kept, by position, then falling probability, then symbol."""
    position_E, symbol_E = np.nonzero(keep_PV)
    prob_E = probs_PV[position_E, symbol_E]
    order = np.lexsort((symbol_E, -prob_E, position_E))
    return position_E[order], symbol_E[order], prob_E[order]
