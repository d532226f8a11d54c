"""The values that a shard's columns may hold: at most 256 each, so that Parquet's own dictionary stores one byte, and
no reader decodes.

A step costs about the same in KL wherever it is, so that nothing is stored more exactly than it matters: levels are
even in the square root of a probability, or of what it lacks to 1. A fixed number of digits, as a float has, is fine
where nobody looks (0.001 as exactly as 0.5) and coarse where most positions are (near 1).
"""

import math

import numpy as np

NAME = "levels of square roots"  # part of a dump's identity
EXACT = "float32"  # of a dump that stores everything, which has no levels

_STEPS = 90  # of the square root of a probability, from 0 to 1; used up to `_MIDDLE`
_TOP_STEPS = 200  # of the square root of what the most probable symbol lacks to 1
_MIDDLE = 0.5
_TOP_LEAST = 0.35
MIN_LOGPROB = -80.0  # float32 holds exp of it, 2e-35
NUM_RARE = 30  # log-probabilities below the least square, which only a realised symbol has unless everything is stored


def _rare_and_squares() -> np.ndarray:
    squares = (np.arange(1, math.floor(_STEPS * math.sqrt(_MIDDLE)) + 1) / _STEPS) ** 2
    rare = np.linspace(MIN_LOGPROB, math.log(squares[0]), NUM_RARE, endpoint=False)
    return np.concatenate([rare, np.log(squares)]).astype(np.float32)


def _near_one() -> np.ndarray:
    steps = np.arange(math.floor(_TOP_STEPS * math.sqrt(1 - _TOP_LEAST)), -1, -1)
    return np.log1p(-((steps / _TOP_STEPS) ** 2)).astype(np.float32)


# Nats, rising. A position's most probable symbol has a level of the first kind, each other one of the second.
OTHER_LOGPROBS = _rare_and_squares()
TOP_LOGPROBS = np.concatenate([OTHER_LOGPROBS[np.exp(OTHER_LOGPROBS) < _TOP_LEAST], _near_one()])
LOGPROBS = np.unique(np.concatenate([OTHER_LOGPROBS, TOP_LOGPROBS]))

# Sixteen: four bits. A mask at one of them takes exactly the positions that it would take of the true shares.
SHARES = np.array([0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1])
LEAST_SHARE = 0.001
# Not above the decimal number, so that `share <= 0.05` is true of a stored 0.05 whether a tool compares in 32 bits or
# in 64.
_STORED_SHARES = np.where(SHARES.astype(np.float32) > SHARES, np.nextafter(SHARES.astype(np.float32), 0), SHARES)
STORED_SHARES = _STORED_SHARES.astype(np.float32)

# Nats: squares of fiftieths down to -16, then even steps down to -80.
TOKEN_LOGPROBS = np.concatenate([np.linspace(-80, -16, 40, endpoint=False), -((np.arange(200, -1, -1) / 50.0) ** 2)])
TOKEN_LOGPROBS = TOKEN_LOGPROBS.astype(np.float32)


def round_shares(shares: np.ndarray) -> np.ndarray:
    """Shares 0..1 to the level above, float32; below `LEAST_SHARE` to 0."""
    above = np.searchsorted(SHARES, shares * (1 - 1e-7))  # a level that went through float32 stays where it is
    return STORED_SHARES[np.where(shares < LEAST_SHARE, 0, above)]


def round_token_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Nats to the nearest level, float32: off by at most 0.02 sqrt(nats) down to -16, and -80 stands for less."""
    above = np.searchsorted(TOKEN_LOGPROBS, logprobs).clip(1, len(TOKEN_LOGPROBS) - 1)
    middle = (TOKEN_LOGPROBS[above - 1] + TOKEN_LOGPROBS[above]) / 2
    return TOKEN_LOGPROBS[np.where(logprobs < middle, above - 1, above)]
