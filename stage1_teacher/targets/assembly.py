"""Assembly of a record from a window and the sparse targets of its spans: rounded entries, and columns as stored.

Imports neither torch nor an engine: the processes that write shards do only this
(`stage1_teacher.coordination.shard_draft`).
"""

from collections.abc import Sequence

import numpy as np

from schemas.columns import BY_NAME, MEASURES
from schemas.record import Record
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.sparse_targets import SparseTargets
from stage1_teacher.reduction.sparsify import Entries
from stage1_teacher.targets.alternatives import record_alternatives
from stage1_teacher.targets.dense_float32 import exact_entries
from stage1_teacher.targets.rounding import round_entries

_NO_MEASURES = np.empty((len(MEASURES), 0), np.float32)


def assemble(window: EncodedWindow, spans: Sequence[SparseTargets], lengths: np.ndarray, exact: bool = False) -> Record:
    """Make a window's record from the sparse targets of its spans.

    Args:
        lengths: bytes of each token id (`token_lengths`).
        exact: store every number as float32; the targets hold every symbol.
    """
    entries = _joined([of_span.entries for of_span in spans])
    rounded = exact_entries(entries) if exact else round_entries(entries)
    teacher_token_lengths, token_logprobs, firsts = _token_columns(window, spans, lengths)
    stored_logprobs = BY_NAME["teacher_token_logprobs"].as_stored(token_logprobs, exact)
    measures_MP = np.concatenate([_NO_MEASURES, *(of_span.measures_MP for of_span in spans)], axis=1)
    return Record(
        doc_id=window.doc_id,
        window_start=window.bounds.start,
        document=window.text,
        segments=window.segments,
        teacher_token_lengths=teacher_token_lengths,
        teacher_token_logprobs=stored_logprobs,
        entry_counts=entries.counts_P,
        **{column.name: column.as_stored(of_P, exact) for column, of_P in zip(MEASURES, measures_MP, strict=True)},
        symbols=rounded.symbols_E,
        logprobs=rounded.logprobs_E,
        message_roles=window.roles,
        message_lengths=window.lengths,
        conversation=window.conversation,
        tokens=record_alternatives(
            list(zip(firsts, window.spans, spans, strict=True)), teacher_token_lengths, stored_logprobs, exact
        ),
    )


def _joined(of_spans: Sequence[Entries]) -> Entries:
    """Return the entries of all spans, in turn; none for a window of context alone."""
    if not of_spans:
        return Entries(np.empty(0, np.uint16), np.empty(0, np.uint8), np.empty(0))
    return Entries(*map(np.concatenate, zip(*of_spans, strict=True)))


def _token_columns(
    window: EncodedWindow, targets: Sequence[SparseTargets], lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return each token's bytes and log-probability, and the index of each span's first token.

    Text between spans counts as one token of log-probability 0.
    """
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    firsts: list[int] = []
    at = num_tokens = 0
    for span, of_span in zip(window.spans, targets, strict=True):
        if span.start > at:
            columns.append((np.array([span.start - at]), np.zeros(1)))
            num_tokens += 1
        spelled = lengths[np.asarray(span.tokens, dtype=np.int64)]
        spelled[:1] -= span.num_prefix  # the bytes that the tokenizer put before the text
        columns.append((spelled, of_span.token_logprobs))
        firsts.append(num_tokens)
        num_tokens += len(span.tokens)
        at = span.end
    if len(window.text) > at:
        columns.append((np.array([len(window.text) - at]), np.zeros(1)))
    of_tokens, logprobs = (np.concatenate(column) for column in zip(*columns, strict=True))
    return of_tokens.astype(np.int32), logprobs, firsts
