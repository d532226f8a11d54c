"""Distances of other targets from a record's stored ones, over the stored classes: each entry, and the tail.

Shape legend: P positions, E entries (over all positions in turn), V symbols (256).
"""

from typing import NamedTuple

import numpy as np

from schemas import END
from schemas.record import Record

# The levels nearest to 1 fall short of it by 0, 0.000025 and 0.0001 (`schemas.levels`): smaller tails cannot be
# distinguished.
TAIL_FLOOR = 1e-4


class Distances(NamedTuple):
    """Distances per position: KL in nats, total variation as a share 0..1."""

    kl_P: np.ndarray
    total_variation_P: np.ndarray


def stored_sums(record: Record) -> np.ndarray:
    """Return the sum of each position's stored probabilities: P, float64."""
    return record.per_position(record.probs())


def realised_logprobs(record: Record) -> np.ndarray:
    """Return the stored log-probability of the symbol that the document actually has: P, float64 nats."""
    is_realised_E = record.symbols == record.realised()[record.entry_positions()]
    return record.logprobs[is_realised_E].astype(np.float64)


def realised_bits(record: Record) -> tuple[float, int]:
    """Return the bits that the stored targets assign to the record's supervised bytes, and the number of bytes.

    END is not a byte.
    """
    is_byte_P = record.realised() != END
    return float(-realised_logprobs(record)[is_byte_P].sum()) / np.log(2), int(is_byte_P.sum())


def distances(record: Record, probs_PV: np.ndarray) -> Distances:
    """Return KL(other || stored) and total variation of other targets at the record's first positions."""
    num_positions = len(probs_PV)
    position_E = record.entry_positions()
    in_range_E = position_E < num_positions
    position_E, symbols_E = position_E[in_range_E], record.symbols[in_range_E]
    stored_E = record.probs()[in_range_E]
    other_E = probs_PV[position_E, symbols_E].astype(np.float64)

    def total(value_E: np.ndarray) -> np.ndarray:
        return np.bincount(position_E, value_E, num_positions)

    stored_tail_P = np.maximum(1.0 - total(stored_E), TAIL_FLOOR)
    other_tail_P = np.maximum(1.0 - total(other_E), TAIL_FLOOR)
    ratio_E = np.divide(other_E, stored_E, out=np.ones_like(other_E), where=other_E > 0)
    return Distances(
        total(other_E * np.log(ratio_E)) + other_tail_P * np.log(other_tail_P / stored_tail_P),
        (total(np.abs(other_E - stored_E)) + np.abs(other_tail_P - stored_tail_P)) / 2,
    )
