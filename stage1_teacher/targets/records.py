"""Construction of records from windows and a teacher's targets: the entries and columns of a shard."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config import DumpConfig
from pipeline.covering.targets import Targets
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import levels
from schemas.columns import BY_NAME, MEASURES
from schemas.record import Record
from stage1_teacher.inputs.encoded_windows import EncodedWindow, spelled_lengths
from stage1_teacher.targets.dense_float32 import counts, exact_entries
from stage1_teacher.targets.engine_output import EngineOutput
from stage1_teacher.targets.rounding import round_entries
from stage1_teacher.targets.sparsify import sparsify
from stage1_teacher.targets.teacher import Teacher


def make_records(
    windows: Sequence[EncodedWindow], output: EngineOutput, teacher: Teacher, dump: DumpConfig
) -> list[Record]:
    """Make the windows' records from the engine's output."""
    targets = iter(teacher.targets(windows, output))
    return [
        make_record(
            window,
            [next(targets) for _ in window.spans],
            teacher.tokenizer,
            dump.top_k,
            dump.min_prob,
            exact=dump.coding == levels.EXACT,
        )
        for window in windows
    ]


def make_record(
    window: EncodedWindow,
    targets: Sequence[Targets],
    tokenizer: ByteTokenizer,
    top_k: int,
    min_prob: float,
    exact: bool = False,
) -> Record:
    """Make a window's record from the targets of its spans, which include the tokenizer's prefix.

    Args:
        exact: store every number as float32, and every symbol, whatever `top_k` and `min_prob` are.
    """
    supervised = [slice(s.skipped, s.skipped + s.segment.num_positions) for s in window.spans]
    kept = list(zip(targets, supervised, strict=True))
    segments = tuple(span.segment for span in window.spans)
    realised = b"".join(window.text[s.start : s.start + s.length] + (b"\xff" if s.has_end else b"") for s in segments)
    probs_PV = np.concatenate([of_span.probs_PV[positions] for of_span, positions in kept])
    if exact:
        counts_P, rounded = counts(len(probs_PV)), exact_entries(probs_PV)
    else:
        entries = sparsify(probs_PV, np.frombuffer(realised, dtype=np.uint8), top_k, min_prob)
        counts_P, rounded = entries.counts_P, round_entries(entries)
    lengths, token_logprobs = _token_columns(window, targets, tokenizer)

    measured: dict[str, Any] = {}
    for column in MEASURES:
        values_P = np.concatenate([getattr(of_span, f"{column.name}_P")[positions] for of_span, positions in kept])
        measured[column.name] = column.as_stored(values_P, exact)
    return Record(
        doc_id=window.doc_id,
        window_start=window.bounds.start,
        document=window.text,
        segments=segments,
        teacher_token_lengths=lengths,
        teacher_token_logprobs=BY_NAME["teacher_token_logprobs"].as_stored(token_logprobs, exact),
        entry_counts=counts_P,
        **measured,
        symbols=rounded.symbols_E,
        logprobs=rounded.logprobs_E,
        message_roles=window.roles,
        message_lengths=window.lengths,
        conversation=window.conversation,
    )


def _token_columns(
    window: EncodedWindow, targets: Sequence[Targets], tokenizer: ByteTokenizer
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
