"""How a position's probabilities become bytes, and bytes log-probabilities again: the only place that knows the codes.

A symbol's code is 100 times the square root of its probability. Rounding that costs the same in KL whatever the probability, as a
step in the log does not (fine where nobody looks: 0.001 as exactly as 0.5). The most probable symbol has no code: it has what the
others and the tail leave to 1, so that near 1 it is as exact as they are, and the probabilities always sum to 1.

Shape legend: P positions, E entries, O entries besides the first of each position.
"""

from typing import NamedTuple

import numpy as np

NAME = "square roots in hundredths"  # part of a dump's identity
PROB_SCALE = 100
SHARE_SCALE = 36
TOKEN_LOGPROB_SCALE = 64

FORMULAS = {
    "tail_codes": "tail = (code / 100)^2",
    "other_codes": "probability = (code / 100)^2; above 100: 0.0001 * 2^(100 - code)",
    "top_symbols": "probability = 1 - tail - the sum of the position's other probabilities",
    "dropped_codes, token_end_codes, doubt_codes": "share = (code / 36)^2, rounded up",
    "teacher_token_codes": "log-probability in nats = -code / 64",
}

_CODES = np.arange(256, dtype=np.float64)
_LEAST = PROB_SCALE**-2  # below it a code is an octave: only a realised symbol is ever stored there
_PROBS = np.where(_CODES <= PROB_SCALE, (_CODES / PROB_SCALE) ** 2, _LEAST * 2.0 ** (PROB_SCALE - _CODES))
with np.errstate(divide="ignore"):
    _LOGPROBS = np.log(_PROBS).astype(np.float32)
_SHARES = ((_CODES / SHARE_SCALE) ** 2).astype(np.float32)


class Entries(NamedTuple):
    """What is stored of some positions; the tail is what is left to 1."""

    counts_P: np.ndarray  # int, at least 1
    symbols_E: np.ndarray  # uint8, rising within a position
    probs_E: np.ndarray  # float64


class CodedEntries(NamedTuple):
    """The same as columns of a shard."""

    top_symbols: np.ndarray  # P, uint8
    tail_codes: np.ndarray  # P, uint8
    other_counts: np.ndarray  # P, uint8
    other_symbols: np.ndarray  # O, uint8
    other_codes: np.ndarray  # O, uint8


def encode_entries(entries: Entries) -> CodedEntries:
    """Entries to columns. The first of the most probable symbols of a position becomes its top."""
    counts_P, symbols_E, probs_E = entries
    if not len(counts_P):
        return CodedEntries(*(np.empty(0, dtype=np.uint8),) * 5)
    starts_P = np.cumsum(counts_P) - counts_P
    top_P = _first_largest(probs_E, counts_P, starts_P)
    tail_P = np.clip(1.0 - np.add.reduceat(probs_E, starts_P), 0.0, 1.0)
    tail_P[counts_P == 256] = 0.0  # nothing is left out: the difference is rounding
    is_other_E = np.ones(len(probs_E), dtype=bool)
    is_other_E[top_P] = False
    codes_O, tail_codes_P = _prob_codes(probs_E[is_other_E]), np.rint(np.sqrt(tail_P) * PROB_SCALE).astype(np.uint8)
    others_P = counts_P - 1
    # Many codes rounded the same way leave the top far from its probability, or nothing: mostly where it is small. One code's
    # rounding is at most 0.01 * sqrt(p).
    prob_P, left_P = probs_E[top_P], _left(tail_codes_P, others_P, codes_O)
    is_off_P = (left_P <= 0) | (np.abs(left_P - prob_P) > 0.01 * np.sqrt(prob_P) + 0.05 * prob_P)
    ends_P = np.cumsum(others_P)
    for position in np.flatnonzero(is_off_P):
        others = slice(ends_P[position] - others_P[position], ends_P[position])
        balanced = _balanced(np.append(tail_P[position], probs_E[is_other_E][others]))
        tail_codes_P[position], codes_O[others] = balanced[0], balanced[1:]
    return CodedEntries(symbols_E[top_P], tail_codes_P, others_P.astype(np.uint8), symbols_E[is_other_E], codes_O)


def _first_largest(probs_E: np.ndarray, counts_P: np.ndarray, starts_P: np.ndarray) -> np.ndarray:
    """P: where each position's largest probability first stands among the entries."""
    found = np.flatnonzero(probs_E == np.maximum.reduceat(probs_E, starts_P).repeat(counts_P))
    position = np.searchsorted(starts_P, found, side="right") - 1 if len(found) > len(starts_P) else None
    if position is None:
        return found
    first: np.ndarray = found[np.append(True, np.diff(position) > 0)]
    return first


def _prob_codes(probs: np.ndarray) -> np.ndarray:
    codes = np.rint(np.sqrt(probs) * PROB_SCALE)
    rare = probs < _LEAST * 0.5**0.5
    octaves = np.rint(np.log2(_LEAST / np.maximum(probs[rare], 1e-300)))
    codes[rare] = PROB_SCALE + np.clip(octaves, 1, 255 - PROB_SCALE)
    return codes.astype(np.uint8)


def _balanced(probs: np.ndarray) -> np.ndarray:
    """Codes of the tail and the others that carry each rounding error on to the next, so that their sum stays true."""
    codes = _prob_codes(probs)
    codes[0] = np.rint(np.sqrt(probs[0]) * PROB_SCALE)
    carry = 0.0
    for index in np.argsort(-probs, kind="stable"):
        if probs[index] < _LEAST:
            break
        codes[index] = min(np.rint(np.sqrt(max(probs[index] + carry, 0.0)) * PROB_SCALE), PROB_SCALE)
        if index:
            codes[index] = max(codes[index], 1)
        carry += probs[index] - _PROBS[codes[index]]
    while _PROBS[codes].sum() >= 1.0:  # something must be left for the top
        codes[np.argmax(_PROBS[codes])] -= 1
    return codes


def _left(tail_codes_P: np.ndarray, others_P: np.ndarray, codes_O: np.ndarray) -> np.ndarray:
    """P, float64: what tail and other entries leave to 1: the top's probability."""
    position_O = np.arange(len(others_P)).repeat(others_P)
    left_P: np.ndarray = 1.0 - _PROBS[tail_codes_P] - np.bincount(position_O, _PROBS[codes_O], len(others_P))
    return left_P


def decode_entries(coded: CodedEntries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns to (entry_counts_P int64, symbols_E uint8, logprobs_E float32 nats); a position's top comes first.

    A position whose codes leave nothing for its top gets a log-probability of NaN there: no such shard is written.
    """
    others_P = coded.other_counts.astype(np.int64)
    counts_P = others_P + 1
    tops_P = np.cumsum(counts_P) - counts_P
    is_other_E = np.ones(len(others_P) + len(coded.other_codes), dtype=bool)
    is_other_E[tops_P] = False
    symbols_E = np.empty(len(is_other_E), dtype=np.uint8)
    symbols_E[tops_P], symbols_E[is_other_E] = coded.top_symbols, coded.other_symbols
    logprobs_E = np.empty(len(is_other_E), dtype=np.float32)
    left_P = _left(coded.tail_codes, others_P, coded.other_codes)
    logprobs_E[tops_P] = np.log(left_P, out=np.full(len(left_P), np.nan), where=left_P > 0)
    logprobs_E[is_other_E] = _LOGPROBS[coded.other_codes]
    return counts_P, symbols_E, logprobs_E


def encode_shares(shares: np.ndarray) -> np.ndarray:
    """Shares 0..1 to uint8 codes, rounded up: a mask by a decoded share leaves out no less than one by the share itself."""
    codes: np.ndarray = np.ceil(np.sqrt(np.clip(shares, 0.0, 1.0)) * SHARE_SCALE * (1 - 1e-7)).astype(np.uint8)
    return codes


def decode_shares(codes: np.ndarray) -> np.ndarray:
    """float32."""
    return _SHARES[codes]


def encode_token_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Nats to uint16 codes; -1023 and less are one."""
    return np.rint(np.minimum(-logprobs, 1023.0) * TOKEN_LOGPROB_SCALE).astype(np.uint16)


def decode_token_logprobs(codes: np.ndarray) -> np.ndarray:
    """float32 nats."""
    return codes.astype(np.float32) / -TOKEN_LOGPROB_SCALE
