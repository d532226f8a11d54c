"""Most probable tokens of the teacher at each of its own tokens of a record: an optional part of a dump.

Shape legend: T tokens of the teacher (as in `Record.teacher_token_lengths`), A alternatives of all tokens in turn.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenAlternatives:
    """Most probable tokens of the teacher at each of its tokens of one record, from the softmax over its vocabulary.

    Row *i* is the distribution of token *i* given those before it. The token that the text has is always among its
    row's alternatives. Bytes of a chat that the teacher did not spell for a segment are one entry of the T without
    alternatives, as in `Record.teacher_token_lengths`. The row after the last token has none either: of it,
    `end_log_probs` holds what a text's end needs.

    Attributes:
        offsets: T + 1, int64; token *i* owns alternatives `offsets[i] .. offsets[i + 1]`.
        ids: A, int32, of the teacher's vocabulary; in descending probability within a token, ties by ascending id.
        log_probs: A, float32 natural logs, rounded as a dump's other numbers; a token's sum to at most 1, and what is
            left to 1 is the tail, of all other tokens as one class.
        token_ids: T, int32, of the token that the text has; -1 for an entry without alternatives.
        token_log_probs: T, float32, of that token, rounded by finer levels than `log_probs`
            (`Record.teacher_token_logprobs`); 0 for an entry without alternatives.
        end_log_probs: T + 1, float32: log-probability of the teacher's end tokens, together, after the first *i*
            tokens; nan where no segment begins or ends.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    token_ids: np.ndarray
    token_log_probs: np.ndarray
    end_log_probs: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of alternatives of each token: T, int64."""
        return np.diff(self.offsets)

    @property
    def tails(self) -> np.ndarray:
        """Probability of all tokens that are not alternatives, of each token: T, float64; 1 without alternatives."""
        token_A = np.repeat(np.arange(len(self.counts)), self.counts)
        sums_T = np.bincount(token_A, np.exp(self.log_probs.astype(np.float64)), len(self.counts))
        return np.maximum(1.0 - sums_T, 0.0)

    @property
    def ranks(self) -> np.ndarray:
        """Place of the token that the text has among its alternatives, from 0: T, int64; 0 without alternatives."""
        token_A = np.repeat(np.arange(len(self.counts)), self.counts)
        realised_A = np.flatnonzero(self.ids == self.token_ids[token_A])
        ranks_T = np.zeros(len(self.counts), dtype=np.int64)
        ranks_T[token_A[realised_A]] = realised_A - self.offsets[token_A[realised_A]]
        return ranks_T
