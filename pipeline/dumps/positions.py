"""Positions of a record: its decoded targets, beside the teacher's tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.dumps.tokens import TokenDistribution, distribution
from schemas import END
from schemas.record import Record


@dataclass(frozen=True)
class Position:
    """One position of a document. `offset` is in bytes of the whole document; shares and probabilities are 0..1.

    Attributes:
        token: the teacher token that starts here, None inside one and at END.
        token_logprob: log-probability of that token given those before it, nats.
        symbols: the stored (symbol, probability) pairs, most probable first, ties by ascending symbol.
        measures: the position's values in the other columns, by column name.
        surprise_bits: -log2 of the realised symbol's probability under the target.
        entropy_bits: entropy of the target, with its tail counted as one class.
        tokens: the teacher's next-token distribution where a token starts, and at END; None elsewhere, and in a dump
            that stores none.
    """

    offset: int
    realised: int
    token_starts: bool
    token: bytes | None
    token_logprob: float | None
    symbols: list[tuple[int, float]]
    tail: float
    measures: dict[str, float]
    surprise_bits: float
    entropy_bits: float
    tokens: TokenDistribution | None = None


class Decoded(NamedTuple):
    """A record's targets as arrays over its P positions, float64; `starts_P` is where a position's entries start."""

    starts_P: np.ndarray
    probs_E: np.ndarray
    tail_P: np.ndarray
    surprise_bits_P: np.ndarray
    entropy_bits_P: np.ndarray


def decode(record: Record) -> Decoded:
    """Compute a record's probabilities, tails, surprises and entropies."""
    counts_P = record.entry_counts.astype(np.int64)
    starts_P = np.cumsum(counts_P) - counts_P
    logprobs_E, probs_E = record.logprobs.astype(np.float64), record.probs()
    if not len(counts_P):
        return Decoded(starts_P, probs_E, *(np.empty(0) for _ in range(3)))
    tail_P = np.maximum(1.0 - np.add.reduceat(probs_E, starts_P), 0.0)
    position_E = record.entry_positions()
    is_realised_E = record.symbols == record.realised()[position_E]
    surprise_bits_P = np.full(len(counts_P), math.inf)  # always stored: a remaining inf is a corrupt shard
    surprise_bits_P[position_E[is_realised_E]] = np.maximum(-logprobs_E[is_realised_E], 0.0) / math.log(2)
    tail_nats_P = tail_P * np.log(np.where(tail_P > 0, tail_P, 1.0))
    entropy_bits_P = -(np.add.reduceat(probs_E * logprobs_E, starts_P) + tail_nats_P) / math.log(2)
    return Decoded(starts_P, probs_E, tail_P, surprise_bits_P, np.maximum(entropy_bits_P, 0.0))


def offsets(record: Record) -> list[int]:
    """Return the byte offset, in the record, of each of its positions."""
    return [s.start + i for s in record.segments for i in range(s.num_positions)]


def positions(record: Record) -> Iterator[Position]:
    """Yield the positions of one record, in order."""
    edges = [0, *np.cumsum(record.teacher_token_lengths).tolist()]
    tokens = {
        start: (record.document[start:end], float(logprob))
        for (start, end), logprob in zip(pairwise(edges), record.teacher_token_logprobs, strict=True)
    }
    # Of several tokens without bytes at one offset the last one has them.
    starts, ends = {edge: token for token, edge in enumerate(edges[:-1])}, {e: t for t, e in enumerate(edges)}
    decoded, realised, measures = decode(record), record.realised(), record.measures
    for index, offset in enumerate(offsets(record)):
        start = int(decoded.starts_P[index])
        entries = slice(start, start + int(record.entry_counts[index]))
        is_end = realised[index] == END
        token, logprob = (None, None) if is_end else tokens.get(offset, (None, None))
        index_T = ends.get(offset) if is_end else starts.get(offset)
        yield Position(
            offset=record.window_start + offset,
            realised=int(realised[index]),
            token_starts=bool(is_end) or offset in tokens,
            token=token,
            token_logprob=logprob,
            symbols=_ranked(record.symbols[entries].tolist(), decoded.probs_E[entries].tolist()),
            tail=float(decoded.tail_P[index]),
            measures={name: float(value_P[index]) for name, value_P in measures.items()},
            surprise_bits=float(decoded.surprise_bits_P[index]),
            entropy_bits=float(decoded.entropy_bits_P[index]),
            tokens=None if index_T is None else distribution(record, index_T, bool(is_end)),
        )


def _ranked(symbols: list[int], probabilities: list[float]) -> list[tuple[int, float]]:
    return sorted(zip(symbols, probabilities, strict=True), key=lambda pair: (-pair[1], pair[0]))
