"""Alternatives of a record's tokens from those of its spans, rounded as a dump stores them.

Imports neither torch nor an engine, as `stage1_teacher.targets.assembly`.

Shape legend: T tokens of the record, A alternatives of all tokens in turn.
"""

from collections.abc import Sequence

import numpy as np

from schemas.columns import BY_NAME
from schemas.record import Segment
from schemas.token_alternatives import TokenAlternatives
from stage1_teacher.inputs.encoded_windows import CoveredSpan
from stage1_teacher.reduction.sparse_targets import SparseTargets
from stage1_teacher.reduction.token_entries import TokenEntries
from stage1_teacher.targets.rounding import round_alternatives


def record_alternatives(
    spans: Sequence[tuple[int, CoveredSpan, SparseTargets]],
    token_lengths_T: np.ndarray,
    token_logprobs_T: np.ndarray,
    exact: bool,
) -> TokenAlternatives | None:
    """Join the alternatives of a record's spans; None if they were not requested, or there is no span.

    Those of tokens none of whose bytes is supervised are dropped. Where two spans meet, END is that after the first.

    Args:
        spans: each with the index of its first token in the record.
        token_lengths_T: bytes of the record's tokens.
        token_logprobs_T: their log-probabilities, as stored.
        exact: nothing is rounded.
    """
    if not spans or any(of_span.tokens is None for *_, of_span in spans):
        return None
    segments = [segment for _, span, _ in spans for segment in span.segments]
    supervised_T = supervised_tokens(token_lengths_T, segments)
    counts_T = np.zeros(len(token_logprobs_T), dtype=np.int64)
    token_ids_T = np.full(len(token_logprobs_T), -1, dtype=np.int32)
    ends = np.full(len(token_logprobs_T) + 1, np.nan)
    parts: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int32), np.empty(0, np.float32))]
    for first, span, of_span in spans:
        assert of_span.tokens is not None
        last = first + len(span.tokens)
        kept_T = supervised_T[first:last]
        tokens = of_span.tokens.some(kept_T)
        counts_T[first:last] = tokens.counts_T
        token_ids_T[first:last] = np.where(kept_T, span.tokens, -1)
        known = tokens.end_logprobs_R if np.isnan(ends[first]) else tokens.end_logprobs_R[1:]
        ends[last + 1 - len(known) : last + 1] = known
        parts.append(exact_alternatives(tokens) if exact else round_alternatives(tokens))
    ids_A, logprobs_A = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = np.concatenate([[0], counts_T.cumsum()])
    stored_ends = np.where(np.isnan(ends), np.nan, BY_NAME["end_token_logprobs"].as_stored(ends, exact))
    return TokenAlternatives(offsets, ids_A, logprobs_A, token_ids_T, token_logprobs_T, stored_ends.astype(np.float32))


def supervised_tokens(lengths_T: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """Return which tokens have a supervised byte, or lie between supervised ones without a byte: T, bool."""
    ends_T = lengths_T.cumsum(dtype=np.int64)
    starts_T = ends_T - lengths_T
    supervised_T = np.zeros(len(lengths_T), dtype=bool)
    for segment in segments:
        first, last = segment.start, segment.start + segment.length
        supervised_T |= (starts_T < last) & (ends_T > first)
        supervised_T |= (lengths_T == 0) & (starts_T >= first) & (starts_T <= last) & (first < last)
    return supervised_T


def exact_alternatives(tokens: TokenEntries) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of each token's alternatives and their log-probabilities, in order, as they are."""
    token_A = np.repeat(np.arange(len(tokens.counts_T)), tokens.counts_T)
    order_A = np.lexsort((tokens.ids_A, -tokens.logprobs_A, token_A))
    return tokens.ids_A[order_A], tokens.logprobs_A[order_A]
