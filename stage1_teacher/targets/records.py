"""Construction of records from windows and a teacher's targets: the entries and columns of a shard."""

from collections.abc import Sequence

import numpy as np

from pipeline.config import DumpConfig
from pipeline.covering.targets import Targets
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import levels
from schemas.columns import BY_NAME, MEASURES
from schemas.record import Record
from stage1_teacher.inputs.encoded_windows import EncodedWindow, spelled_lengths
from stage1_teacher.reduction.sparse_targets import SparseTargets, Sparsity, sparse_targets
from stage1_teacher.reduction.sparsify import Entries
from stage1_teacher.targets.dense_float32 import exact_entries
from stage1_teacher.targets.engine_output import EngineOutput, SparseOutput, span_requests, sparsity_of
from stage1_teacher.targets.rounding import round_entries
from stage1_teacher.targets.teacher import Teacher


def make_records(
    windows: Sequence[EncodedWindow], output: EngineOutput | SparseOutput, teacher: Teacher, dump: DumpConfig
) -> list[Record]:
    """Make the windows' records from the engine's output."""
    if isinstance(output, SparseOutput):
        sparse = list(output.spans)
    else:
        requests = [request for of_window in span_requests(windows) for request in of_window]
        targets = teacher.targets(windows, output)
        sparse = [sparse_targets(*of_span, sparsity_of(dump)) for of_span in zip(targets, requests, strict=True)]
    spans = iter(sparse)
    exact = dump.coding == levels.EXACT
    return [assemble(window, [next(spans) for _ in window.spans], teacher.tokenizer, exact) for window in windows]


def make_record(
    window: EncodedWindow, targets: Sequence[Targets], tokenizer: ByteTokenizer, top_k: int, min_prob: float
) -> Record:
    """Make a window's record from the dense targets of its spans, which include the tokenizer's prefix."""
    [requests] = span_requests([window])
    sparse = [
        sparse_targets(of_span, request, Sparsity(top_k, min_prob))
        for of_span, request in zip(targets, requests, strict=True)
    ]
    return assemble(window, sparse, tokenizer)


def assemble(
    window: EncodedWindow, spans: Sequence[SparseTargets], tokenizer: ByteTokenizer, exact: bool = False
) -> Record:
    """Make a window's record from the sparse targets of its spans.

    Args:
        exact: store every number as float32; the targets hold every symbol.
    """
    entries = Entries(*map(np.concatenate, zip(*(of_span.entries for of_span in spans), strict=True)))
    rounded = exact_entries(entries) if exact else round_entries(entries)
    lengths, token_logprobs = _token_columns(window, spans, tokenizer)
    measures_MP = np.concatenate([of_span.measures_MP for of_span in spans], axis=1)
    return Record(
        doc_id=window.doc_id,
        window_start=window.bounds.start,
        document=window.text,
        segments=tuple(span.segment for span in window.spans),
        teacher_token_lengths=lengths,
        teacher_token_logprobs=BY_NAME["teacher_token_logprobs"].as_stored(token_logprobs, exact),
        entry_counts=entries.counts_P,
        **{column.name: column.as_stored(of_P, exact) for column, of_P in zip(MEASURES, measures_MP, strict=True)},
        symbols=rounded.symbols_E,
        logprobs=rounded.logprobs_E,
        message_roles=window.roles,
        message_lengths=window.lengths,
        conversation=window.conversation,
    )


def _token_columns(
    window: EncodedWindow, targets: Sequence[SparseTargets], tokenizer: ByteTokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's bytes and log-probability; text between spans counts as one token of log-probability 0."""
    lengths: list[int] = []
    logprobs = []
    at = 0
    for span, of_span in zip(window.spans, targets, strict=True):
        if span.start > at:
            lengths.append(span.start - at)
            logprobs.append(np.zeros(1))
        lengths += spelled_lengths(tokenizer, span.tokens, span.num_prefix)
        logprobs.append(of_span.token_logprobs)
        at = span.segment.start + span.segment.length
    if len(window.text) > at:
        lengths.append(len(window.text) - at)
        logprobs.append(np.zeros(1))
    return np.array(lengths, dtype=np.int32), np.concatenate(logprobs)
