"""The values that a shard's columns may hold: at most 256 each.

So Parquet's own dictionary stores each in one byte, and a reader has nothing to decode.

A step costs about the same in KL everywhere, so that nothing is stored more precisely than it matters: levels are
evenly spaced in the square root of a probability, or of its difference from 1. The fixed relative precision of a float
is fine where it does not matter (0.001 as precisely as 0.5) and coarse where most positions are (near 1).
"""

import math

import numpy as np

NAME = "levels of square roots"  # part of a dump's identity
EXACT = "float32"  # for a dump that stores everything, which has no levels

_STEPS = 90  # of the square root of a probability, from 0 to 1; used up to `_MIDDLE`
_TOP_STEPS = 200  # of the square root of 1 minus the most probable symbol's probability
_MIDDLE = 0.5
_MIN_TOP = 0.35
MIN_LOGPROB = -80.0  # its exp, 2e-35, is still a float32
NUM_RARE = 30  # log-probabilities below the smallest square: only realised symbols, unless everything is stored


def _rare_and_squares() -> np.ndarray:
    squares = (np.arange(1, math.floor(_STEPS * math.sqrt(_MIDDLE)) + 1) / _STEPS) ** 2
    rare = np.linspace(MIN_LOGPROB, math.log(squares[0]), NUM_RARE, endpoint=False)
    return np.concatenate([rare, np.log(squares)]).astype(np.float32)


def _near_one() -> np.ndarray:
    steps = np.arange(math.floor(_TOP_STEPS * math.sqrt(1 - _MIN_TOP)), -1, -1)
    return np.log1p(-((steps / _TOP_STEPS) ** 2)).astype(np.float32)


# Nats, ascending. A position's most probable symbol has a level of `TOP_LOGPROBS`, any other one of `OTHER_LOGPROBS`.
OTHER_LOGPROBS = _rare_and_squares()
TOP_LOGPROBS = np.concatenate([OTHER_LOGPROBS[np.exp(OTHER_LOGPROBS) < _MIN_TOP], _near_one()])
LOGPROBS = np.unique(np.concatenate([OTHER_LOGPROBS, TOP_LOGPROBS]))

# Sixteen: four bits. A mask at one of these levels selects exactly the positions that it would by the unrounded shares.
SHARES = np.array([0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1])
MIN_SHARE = 0.001
# Never above the decimal number, so that `share <= 0.05` holds for a stored 0.05 whether compared in 32 bits or in 64.
_STORED_SHARES = np.where(SHARES.astype(np.float32) > SHARES, np.nextafter(SHARES.astype(np.float32), 0), SHARES)
STORED_SHARES = _STORED_SHARES.astype(np.float32)

# Nats: squares of fiftieths down to -16, then even steps down to -80.
TOKEN_LOGPROBS = np.concatenate([np.linspace(-80, -16, 40, endpoint=False), -((np.arange(200, -1, -1) / 50.0) ** 2)])
TOKEN_LOGPROBS = TOKEN_LOGPROBS.astype(np.float32)


def round_shares(shares: np.ndarray) -> np.ndarray:
    """Round shares 0..1 up to the next level, float32; below `MIN_SHARE` to 0."""
    above = np.searchsorted(SHARES, shares * (1 - 1e-7))  # a level that went through float32 is unchanged
    return STORED_SHARES[np.where(shares < MIN_SHARE, 0, above)]


def round_token_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Round nats to the nearest level, float32.

    The error is at most 0.02 sqrt(nats) down to -16; -80 stands for -80 or less.
    """
    above = np.searchsorted(TOKEN_LOGPROBS, logprobs).clip(1, len(TOKEN_LOGPROBS) - 1)
    middle = (TOKEN_LOGPROBS[above - 1] + TOKEN_LOGPROBS[above]) / 2
    return TOKEN_LOGPROBS[np.where(logprobs < middle, above - 1, above)]
