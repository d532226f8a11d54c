"""Most probable tokens of the teacher at each of its own tokens of a record: an optional part of a dump.

Shape legend: T tokens of the teacher (as in `Record.teacher_token_lengths`), A alternatives of all tokens in turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

COLUMNS = (
    "alternative_counts",
    "teacher_token_ranks",
    "alternative_ids",
    "alternative_logprobs",
    "end_token_logprobs",
)  # as in `schemas.columns`


@dataclass(frozen=True)
class TokenAlternatives:
    """Most probable tokens of the teacher at each of its tokens of one record, from the softmax over its vocabulary.

    Row *i* is the distribution of token *i* given those before it. The token that the text has is always among its
    row's alternatives. Tokens none of whose bytes is supervised have none, nor have the entries of
    `Record.teacher_token_lengths` that are no tokens (what lies outside of a chat's turns), nor has the row after the
    last token: of it, `end_log_probs` holds what a text's end needs.

    Attributes:
        offsets: T + 1, int64; token *i* owns alternatives `offsets[i] .. offsets[i + 1]`.
        ids: A, int32, of the teacher's vocabulary; in descending probability within a token, ties by ascending id.
        log_probs: A, float32 natural logs, rounded as a dump's other numbers; a token's sum to at most 1, and what is
            left to 1 is the tail, of all other tokens as one class.
        token_ids: T, int32, of the token that the text has; -1 for an entry without alternatives.
        token_log_probs: T, float32, of that token, rounded by finer levels than `log_probs`
            (`Record.teacher_token_logprobs`).
        end_log_probs: T + 1, float32: log-probability of the teacher's end tokens, together, after the first *i*
            tokens; nan where it was not computed, outside of a chat's turns and in a record of context alone.
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

    def token_of_alternatives(self) -> np.ndarray:
        """Return the token to which each alternative belongs: A, int64."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def tails(self) -> np.ndarray:
        """Probability of all tokens that are not alternatives, of each token: T, float64; 1 without alternatives."""
        token_A = self.token_of_alternatives()
        sums_T = np.bincount(token_A, np.exp(self.log_probs.astype(np.float64)), len(self.counts))
        return np.maximum(1.0 - sums_T, 0.0)

    @property
    def ranks(self) -> np.ndarray:
        """Place of the token that the text has among its alternatives, from 0: T, int64; 0 without alternatives."""
        token_A = self.token_of_alternatives()
        realised_A = np.flatnonzero(self.ids == self.token_ids[token_A])
        ranks_T = np.zeros(len(self.counts), dtype=np.int64)
        ranks_T[token_A[realised_A]] = realised_A - self.offsets[token_A[realised_A]]
        return ranks_T


def without_alternatives(token_logprobs: np.ndarray) -> TokenAlternatives:
    """Return those of a record none of whose tokens has any."""
    num_tokens = len(token_logprobs)
    return TokenAlternatives(
        np.zeros(num_tokens + 1, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.float32),
        np.full(num_tokens, -1, np.int32),
        token_logprobs,
        np.full(num_tokens + 1, np.nan, np.float32),
    )


def stored_columns(tokens: Sequence[TokenAlternatives]) -> dict[str, list[np.ndarray]]:
    """Return the columns that hold the alternatives of some records, each with a list for every record."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for of_record in tokens:
        values = (of_record.counts, of_record.ranks, of_record.ids, of_record.log_probs, of_record.end_log_probs)
        for name, value in zip(COLUMNS, values, strict=True):
            columns[name].append(value)
    return columns


def from_columns(columns: Mapping[str, np.ndarray], token_logprobs: np.ndarray) -> TokenAlternatives:
    """Return the alternatives of a record from its stored columns.

    Args:
        token_logprobs: its `teacher_token_logprobs`.

    Raises ValueError if the columns contradict each other.
    """
    counts, ranks, ids, log_probs, end_log_probs = (columns[name] for name in COLUMNS)
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    num_tokens = len(token_logprobs)
    fault = None
    if not len(counts) == len(ranks) == num_tokens:
        fault = f"{len(counts)} counts of alternatives and {len(ranks)} ranks for {num_tokens} tokens"
    elif not offsets[-1] == len(ids) == len(log_probs):
        fault = f"{len(ids)} ids and {len(log_probs)} log-probabilities for {offsets[-1]} alternatives"
    elif len(end_log_probs) != num_tokens + 1:
        fault = f"{len(end_log_probs)} log-probabilities of the end token for {num_tokens} tokens"
    elif (ranks >= np.maximum(counts, 1)).any():
        fault = f"token {int(np.argmax(ranks >= np.maximum(counts, 1)))} is not among its alternatives"
    if fault is not None:
        raise ValueError(f"token columns do not fit together: {fault}")
    token_ids = np.full(num_tokens, -1, dtype=np.int32)
    token_ids[counts > 0] = ids[(offsets[:-1] + ranks)[counts > 0]]
    return TokenAlternatives(offsets, ids, log_probs, token_ids, token_logprobs, end_log_probs)


def token_layout_faults(tokens: TokenAlternatives) -> list[str]:
    """Describe numbers that are not ids or log-probabilities."""
    ends = tokens.end_log_probs[~np.isnan(tokens.end_log_probs)]
    logprobs = (tokens.log_probs, ends)
    checks = [
        (
            all(bool(((values <= 0) & (values > -np.inf)).all()) for values in logprobs),
            "a log-probability of an alternative, or of the end token, is positive or not finite",
        ),
        (bool((tokens.ids >= 0).all()), "an alternative's id is negative"),
    ]
    return [text for passed, text in checks if not passed]


def token_faults(tokens: TokenAlternatives) -> list[str]:
    """Describe alternatives that cannot be: repeated, out of order, or too probable together."""
    token_A = tokens.token_of_alternatives()
    follows_A = token_A[1:] == token_A[:-1]  # of the same token as the alternative before
    rises_A, falls_back_A = np.diff(tokens.log_probs) > 0, np.diff(tokens.ids) < 0
    is_tie_A = tokens.log_probs[1:] == tokens.log_probs[:-1]
    sums_T = np.bincount(token_A, np.exp(tokens.log_probs.astype(np.float64)))
    pairs = token_A << 32 | tokens.ids.astype(np.int64)
    checks = [
        (len(np.unique(pairs)) == len(pairs), "a token has the same alternative twice"),
        (
            not (follows_A & (rises_A | (is_tie_A & falls_back_A))).any(),
            "alternatives are not in descending probability, ties by ascending id",
        ),
        (bool((sums_T <= 1 + 1e-5).all()), "the alternatives of a token sum to more than 1"),  # float32's rounding
    ]
    return [text for passed, text in checks if not passed]
