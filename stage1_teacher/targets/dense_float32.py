"""Targets stored whole, as float32, for a dump that keeps every symbol and would save nothing by rounding.

Shape legend: P positions, V symbols (256), E entries (256 of each position).
"""

import numpy as np

from schemas import NUM_SYMBOLS
from schemas.levels import MIN_LOGPROB
from stage1_teacher.reduction.sparsify import Entries
from stage1_teacher.targets.rounding import RoundedEntries


def exact_entries(entries: Entries) -> RoundedEntries:
    """Return all symbols of every position, in descending log-probability, ties in ascending order.

    Natural logs of at least `MIN_LOGPROB`, which also stands for anything less.

    Args:
        entries: all 256 symbols of each position, in any order.
    """
    shape = (len(entries.counts_P), NUM_SYMBOLS)
    symbols_PV, probs_PV = entries.symbols_E.reshape(shape), entries.probs_E.reshape(shape)
    logprobs_PV = np.log(np.maximum(probs_PV, np.exp(MIN_LOGPROB))).clip(MIN_LOGPROB, 0.0).astype(np.float32)
    order_PV = np.lexsort((symbols_PV, -logprobs_PV), axis=1)
    return RoundedEntries(
        np.take_along_axis(symbols_PV, order_PV, axis=1).ravel(),
        np.take_along_axis(logprobs_PV, order_PV, axis=1).ravel(),
    )
