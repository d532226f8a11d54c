"""Dense targets stored whole, as float32: of a dump that keeps every symbol, which has nothing to save by rounding to
levels.

Shape legend: P positions, V symbols (256), E entries (256 of each position).
"""

import numpy as np

from schemas import NUM_SYMBOLS
from schemas.levels import MIN_LOGPROB
from stage1_teacher.targets.rounding import RoundedEntries


def exact_entries(probs_PV: np.ndarray) -> RoundedEntries:
    """All symbols of every position, in descending probability, the lower first of two that are equal; natural logs, at
    least `MIN_LOGPROB`, which stands for less.

    Args:
        probs_PV: float64, rows sum to 1.
    """
    logprobs_PV = np.log(np.maximum(probs_PV, np.exp(MIN_LOGPROB))).clip(MIN_LOGPROB, 0.0).astype(np.float32)
    order_PV = np.argsort(-logprobs_PV, axis=1, kind="stable")
    return RoundedEntries(order_PV.astype(np.uint8).ravel(), np.take_along_axis(logprobs_PV, order_PV, axis=1).ravel())


def counts(num_positions: int) -> np.ndarray:
    """P, uint16: each position has all symbols."""
    return np.full(num_positions, NUM_SYMBOLS, dtype=np.uint16)
