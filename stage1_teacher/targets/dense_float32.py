"""Dense targets stored whole, as float32, for a dump that keeps every symbol and would save nothing by rounding.

Shape legend: P positions, V symbols (256), E entries (256 of each position).
"""

import numpy as np

from schemas import NUM_SYMBOLS
from schemas.levels import MIN_LOGPROB
from stage1_teacher.targets.rounding import RoundedEntries


def exact_entries(probs_PV: np.ndarray) -> RoundedEntries:
    """Return all symbols of every position, in descending probability, ties in ascending order.

    Natural logs of at least `MIN_LOGPROB`, which also stands for anything less.

    Args:
        probs_PV: float64, rows sum to 1.
    """
    logprobs_PV = np.log(np.maximum(probs_PV, np.exp(MIN_LOGPROB))).clip(MIN_LOGPROB, 0.0).astype(np.float32)
    order_PV = np.argsort(-logprobs_PV, axis=1, kind="stable")
    return RoundedEntries(order_PV.astype(np.uint8).ravel(), np.take_along_axis(logprobs_PV, order_PV, axis=1).ravel())


def counts(num_positions: int) -> np.ndarray:
    """Return the entry counts, P, uint16: each position has all symbols."""
    return np.full(num_positions, NUM_SYMBOLS, dtype=np.uint16)
