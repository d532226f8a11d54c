"""Mixing of several teachers' targets: at each position, the weighted mean of the dumps' distributions.

A dump gives the probability of its stored symbols, and of all others together (the tail). Here each symbol that a dump
does not store gets an equal share of its tail, so that every dump is a distribution over all 256 symbols. Their mean is
stored for the symbols that any dump stores; the rest of the mass is its tail again. If every symbol is stored nothing
is assumed, and the mean is exact.

Shape legend: D dumps, P positions, E stored entries of one dump, U (position, symbol) pairs stored in any dump.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from schemas import NUM_SYMBOLS
from schemas.columns import BY_NAME, Mixing
from schemas.record import Record, common_measures

MIN_LOGPROB = -80.0  # as in the format: stands for this or less


@dataclass(frozen=True)
class Mix:
    """The rule by which the records of one document become one.

    `arithmetic`: the mean of the probabilities; a symbol is likely if any teacher finds it likely. `geometric`: the
    renormalised mean of the logarithms; a symbol is likely if all teachers do.
    """

    weights: tuple[float, ...]  # D, sum to 1
    how: Literal["arithmetic", "geometric"]

    @classmethod
    def of(cls, weights: Sequence[float], how: Literal["arithmetic", "geometric"]) -> "Mix":
        """Make a mix from weights that need not sum to 1."""
        return cls(tuple(weight / sum(weights) for weight in weights), how)

    def __call__(self, records: Sequence[Record]) -> Record:
        """Mix records of the same document and segments, one per dump, into one record.

        `stage2_student.data.align` makes such records. Measures (`dropped`, `token_end`, `doubt`) are weighted means,
        because a teacher's error enters the target with its weight: for an arithmetic mean the mean doubt bounds the
        total variation distance to the exact target, because a norm is convex; for a geometric mean it is an estimate.
        The record has no teacher tokens, because there is no single teacher.
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
            tokens=None,
        )

    def _mixed(self, name: str, columns: Sequence[np.ndarray] | None) -> np.ndarray | None:
        """Return P, the mix of a measure; None if a dump lacks it, or it has no meaning for several teachers."""
        if columns is None or BY_NAME[name].mixed is Mixing.NONE:
            return None
        columns_DP = np.stack([column.astype(np.float64) for column in columns])
        return (np.array(self.weights) @ columns_DP).astype(np.float32)

    def _entries(self, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (entries per position, their symbols, their log-probabilities), most likely first."""
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
        # One sort key instead of two takes a third of the time: log-probabilities are within 80 of 0, so keys of
        # positions, 128 apart, never overlap.
        order = np.argsort(position_U * 128.0 - mixed_U)
        logprobs_U = np.clip(mixed_U[order], MIN_LOGPROB, 0.0).astype(np.float32)
        return counts_P, (union_U % NUM_SYMBOLS)[order].astype(np.uint8), logprobs_U


def _union(parts: Sequence[np.ndarray], limit: int) -> np.ndarray:
    """Return the numbers below `limit` that are in any part, ascending.

    It marks them in an array; sorting takes eight times as long.
    """
    marked = np.zeros(limit, dtype=bool)
    for part in parts:
        marked[part] = True
    return np.flatnonzero(marked)


def unstored_logprobs(record: Record) -> np.ndarray:
    """Return P, nats: the log-probability of each symbol not stored at a position, an equal share of its tail."""
    stored_P = record.per_position(record.probs())
    num_unstored_P = np.maximum(NUM_SYMBOLS - record.entry_counts.astype(np.int64), 1)
    return np.log(np.maximum((1.0 - stored_P) / num_unstored_P, np.exp(MIN_LOGPROB)))
