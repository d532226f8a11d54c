"""Alternatives of a span's tokens that are stored, before rounding.

Shape legend: T tokens, R rows (T + 1), K most probable tokens of a row, A alternatives of all tokens in turn.
"""

import math
from typing import NamedTuple

import numpy as np

from schemas.levels import MIN_LOGPROB


class TopTokens(NamedTuple):
    """The most probable tokens at each of some tokens, in descending probability, ties by ascending id."""

    ids_TK: np.ndarray  # int32
    logprobs_TK: np.ndarray  # float32


class TokenEntries(NamedTuple):
    """Alternatives of a span's tokens, each token's own among them; natural logs of at least `MIN_LOGPROB`."""

    counts_T: np.ndarray  # uint16
    ids_A: np.ndarray  # int32
    logprobs_A: np.ndarray  # float32, descending within a token
    end_logprobs_R: np.ndarray  # float32, of END before each token and after the last

    def some(self, kept_T: np.ndarray) -> "TokenEntries":
        """Return them with the alternatives of the selected tokens alone."""
        kept_A = np.repeat(kept_T, self.counts_T)
        counts_T = np.where(kept_T, self.counts_T, 0).astype(np.uint16)
        return TokenEntries(counts_T, self.ids_A[kept_A], self.logprobs_A[kept_A], self.end_logprobs_R)


def keep_tokens(
    top: TopTokens, tokens_T: np.ndarray, probs_T: np.ndarray, end_R: np.ndarray, min_prob: float
) -> TokenEntries:
    """Keep the most probable tokens with probability at least `min_prob`, and the one that the text has.

    Args:
        tokens_T: int32, the text's.
        probs_T: probabilities of these, float64.
        end_R: probabilities of END, float64.
    """
    is_kept_TK = top.logprobs_TK >= (math.log(min_prob) if min_prob else -math.inf)
    is_missing_T = ~((top.ids_TK == tokens_T[:, None]) & is_kept_TK).any(axis=1)
    # Last: below min_prob, or below the smallest of the top (or equal to it with a higher id).
    kept_TK = np.concatenate([is_kept_TK, is_missing_T[:, None]], axis=1)
    ids_TK = np.concatenate([top.ids_TK, tokens_T[:, None]], axis=1)
    own_T = np.log(probs_T).astype(np.float32)
    logprobs_TK = np.concatenate([top.logprobs_TK, own_T[:, None]], axis=1).clip(MIN_LOGPROB, 0.0)
    return TokenEntries(
        kept_TK.sum(axis=1).astype(np.uint16),
        ids_TK[kept_TK],
        logprobs_TK[kept_TK],
        np.log(end_R).clip(MIN_LOGPROB, 0.0).astype(np.float32),
    )
