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
    assert num_positions < 1 << 24  # see `_ranked`
    keep_PV = probs_PV >= min_prob
    keep_PV[np.arange(num_positions), realised_P] = True
    position_E, symbol_E, prob_E = _ranked(np.flatnonzero(keep_PV), probs_PV)
    # Ranks beyond top_k go, unless the symbol is the realised one.
    kept_P = np.bincount(position_E, minlength=num_positions)
    rank_E = np.arange(len(position_E)) - (np.cumsum(kept_P) - kept_P)[position_E]
    stays_E = (rank_E < top_k) | (symbol_E == realised_P[position_E])
    position_E, symbol_E, prob_E = position_E[stays_E], symbol_E[stays_E], prob_E[stays_E]
    with np.errstate(divide="ignore"):
        logprobs_E = np.maximum(np.log(prob_E), MIN_LOGPROB)
    counts_P = np.bincount(position_E, minlength=num_positions).astype(np.uint16)
    return counts_P, symbol_E.astype(np.uint8), np.minimum(logprobs_E, 0.0).astype(np.float16)


def _ranked(kept: np.ndarray, probs_PV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position, symbol, probability) of what is kept, by position, then falling probability, then symbol.

    Args:
        kept: indices into the flat `probs_PV`, rising.
    Returns:
        Probabilities rounded to float32: position, probability and symbol are then one integer to sort by, four times
        faster than three keys, and what is stored has three digits anyway.
    """
    prob_E = probs_PV.ravel()[kept].astype(np.float32)
    # The bits of floats that are not negative rise as they do; 24 bits of position, 32 of probability, 8 of symbol.
    falling_E = np.uint64(0xFFFFFFFF) - prob_E.view(np.uint32)
    key_E = (
        (kept.astype(np.uint64) >> np.uint64(8) << np.uint64(40))
        | (falling_E << np.uint64(8))
        | (kept & 0xFF).astype(np.uint64)
    )
    key_E.sort()
    prob_E = (
        (np.uint64(0xFFFFFFFF) - (key_E >> np.uint64(8) & np.uint64(0xFFFFFFFF))).astype(np.uint32).view(np.float32)
    )
    return (
        (key_E >> np.uint64(40)).astype(np.int64),
        (key_E & np.uint64(0xFF)).astype(np.int64),
        prob_E.astype(np.float64),
    )
