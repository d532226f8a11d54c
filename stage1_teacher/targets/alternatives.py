"""Alternatives of a record's tokens from those of its spans, rounded as a dump stores them.

Imports neither torch nor an engine, as `stage1_teacher.targets.assembly`.

Shape legend: T tokens of the record, A alternatives of all tokens in turn.
"""

from collections.abc import Sequence

import numpy as np

from schemas.columns import BY_NAME
from schemas.token_alternatives import TokenAlternatives
from stage1_teacher.inputs.encoded_windows import CoveredSpan
from stage1_teacher.reduction.sparse_targets import SparseTargets
from stage1_teacher.reduction.token_entries import TokenEntries
from stage1_teacher.targets.rounding import round_alternatives


def record_alternatives(
    spans: Sequence[tuple[int, CoveredSpan, SparseTargets]], token_logprobs_T: np.ndarray, exact: bool
) -> TokenAlternatives | None:
    """Join the alternatives of a record's spans; None if they were not requested, or there is no span.

    Where two spans meet, END is that after the first.

    Args:
        spans: each with the index of its first token in the record; tokens before, between and after them have no
            alternatives.
        token_logprobs_T: log-probabilities of the record's tokens, as stored.
        exact: nothing is rounded.
    """
    if not spans or any(of_span.tokens is None for *_, of_span in spans):
        return None
    counts_T = np.zeros(len(token_logprobs_T), dtype=np.int64)
    token_ids_T = np.full(len(token_logprobs_T), -1, dtype=np.int32)
    ends = np.full(len(token_logprobs_T) + 1, np.nan)
    parts: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int32), np.empty(0, np.float32))]
    for first, span, of_span in spans:
        assert of_span.tokens is not None
        last = first + len(span.tokens)
        counts_T[first:last] = of_span.tokens.counts_T
        token_ids_T[first:last] = span.tokens
        known = of_span.tokens.end_logprobs_R if np.isnan(ends[first]) else of_span.tokens.end_logprobs_R[1:]
        ends[last + 1 - len(known) : last + 1] = known
        parts.append(exact_alternatives(of_span.tokens) if exact else round_alternatives(of_span.tokens))
    ids_A, logprobs_A = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = np.concatenate([[0], counts_T.cumsum()])
    stored_ends = np.where(np.isnan(ends), np.nan, BY_NAME["end_token_logprobs"].as_stored(ends, exact))
    return TokenAlternatives(offsets, ids_A, logprobs_A, token_ids_T, token_logprobs_T, stored_ends.astype(np.float32))


def exact_alternatives(tokens: TokenEntries) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of each token's alternatives and their log-probabilities, in order, as they are."""
    token_A = np.repeat(np.arange(len(tokens.counts_T)), tokens.counts_T)
    order_A = np.lexsort((tokens.ids_A, -tokens.logprobs_A, token_A))
    return tokens.ids_A[order_A], tokens.logprobs_A[order_A]
