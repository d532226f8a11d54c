"""Several teachers' targets as one: of each position the weighted mean of the dumps' distributions.

A dump tells the probability of its stored symbols, and of all others together (the tail). Here each symbol that a dump
does not store has an even share of its tail, so that every dump is a distribution over all 256 symbols. Their mean is
stored for the symbols that any dump stores; what is left to 1 is its tail again. With everything stored nothing is
assumed, and the mean is exact.

Shape legend: D dumps, P positions, E stored entries of one dump, U (position, symbol) pairs stored in any dump.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from schemas import NUM_SYMBOLS
from schemas.columns import BY_NAME, Mixing
from schemas.record import Record, common_measures

MIN_LOGPROB = -80.0  # as in the format: this much or less


@dataclass(frozen=True)
class Mix:
    """How the records of one document become one.

    `arithmetic`: the mean of the probabilities: likely is what any teacher finds likely. `geometric`: the mean of the
    logarithms, renormalised: likely is what all of them do.
    """

    weights: tuple[float, ...]  # D, sum to 1
    how: Literal["arithmetic", "geometric"]

    @classmethod
    def of(cls, weights: Sequence[float], how: Literal["arithmetic", "geometric"]) -> "Mix":
        """With weights that are normalised."""
        return cls(tuple(weight / sum(weights) for weight in weights), how)

    def __call__(self, records: Sequence[Record]) -> Record:
        """One record with mixed targets, from one per dump, of the same document and segments
        (`stage2_student.data.align`).

        Measures (`dropped`, `token_end`, `doubt`) are weighted means, for a teacher's error enters the target with its
        weight: of an arithmetic mean the mean doubt bounds the total variation to the exact one, as a norm is convex;
        of a geometric one it is an estimate. Tokens are none: there is no one teacher.
        """
        counts_P, symbols, logprobs = self._entries(records)
        measures: dict[str, Any] = {n: self._mixed(n, columns) for n, columns in common_measures(records).items()}
        return replace(
            records[0],
            teacher_token_lengths=np.empty(0, dtype=np.int32),
            teacher_token_logprobs=np.empty(0, dtype=np.float32),
            entry_counts=counts_P.astype(np.uint16),
            **measures,
            symbols=symbols,
            logprobs=logprobs,
        )

    def _mixed(self, name: str, columns: Sequence[np.ndarray] | None) -> np.ndarray | None:
        """P, of a measure; None where a dump lacks it, or it says nothing of several teachers."""
        if columns is None or BY_NAME[name].mixed is Mixing.NONE:
            return None
        columns_DP = np.stack([column.astype(np.float64) for column in columns])
        return (np.array(self.weights) @ columns_DP).astype(np.float32)

    def _entries(self, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(entries of each position, their symbols, their log-probabilities), likely ones first."""
        weights_D, num_positions = np.array(self.weights), records[0].num_positions
        pairs = [record.entry_positions() * NUM_SYMBOLS + record.symbols for record in records]
        union_U = _union(pairs, num_positions * NUM_SYMBOLS)
        position_U = union_U // NUM_SYMBOLS
        counts_P = np.bincount(position_U, minlength=num_positions)
        unstored_DP = np.stack([unstored_logprobs(record) for record in records])
        logprobs_DU = unstored_DP[:, position_U]
        for row_U, pairs_E, record in zip(logprobs_DU, pairs, records, strict=True):
            row_U[np.searchsorted(union_U, pairs_E)] = np.maximum(record.logprobs.astype(np.float64), MIN_LOGPROB)
        if self.how == "arithmetic":
            mixed_U = np.log(weights_D @ np.exp(logprobs_DU))
        else:
            mean_U = weights_D @ logprobs_DU
            tail_P = (NUM_SYMBOLS - counts_P) * np.exp(weights_D @ unstored_DP)
            mixed_U = mean_U - np.log(np.bincount(position_U, np.exp(mean_U), num_positions) + tail_P)[position_U]
        # One key instead of two: log-probabilities lie within 80 of 0, so positions 128 apart never meet. A third of
        # the time.
        order = np.argsort(position_U * 128.0 - mixed_U)
        logprobs_U = np.clip(mixed_U[order], MIN_LOGPROB, 0.0).astype(np.float32)
        return counts_P, (union_U % NUM_SYMBOLS)[order].astype(np.uint8), logprobs_U


def _union(parts: Sequence[np.ndarray], limit: int) -> np.ndarray:
    """The numbers below `limit` that are in any part, ascending; by marking them, for sorting takes eight times as
    long.
    """
    marked = np.zeros(limit, dtype=bool)
    for part in parts:
        marked[part] = True
    return np.flatnonzero(marked)


def unstored_logprobs(record: Record) -> np.ndarray:
    """P, nats: what each symbol that is not stored at a position gets, an even share of its tail."""
    stored_P = record.per_position(record.probs())
    num_unstored_P = np.maximum(NUM_SYMBOLS - record.entry_counts.astype(np.int64), 1)
    return np.log(np.maximum((1.0 - stored_P) / num_unstored_P, np.exp(MIN_LOGPROB)))
