"""Records out of a teacher's targets: pieces of documents in, entries and columns of a shard out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config import DumpConfig
from pipeline.covering.targets import Targets
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import levels
from schemas.columns import BY_NAME, MEASURES
from schemas.record import Record
from stage1_teacher.inputs.encoded_windows import Piece, spelled_lengths
from stage1_teacher.targets.answers import Answers
from stage1_teacher.targets.dense_float32 import counts, exact_entries
from stage1_teacher.targets.rounding import round_entries
from stage1_teacher.targets.sparsify import sparsify
from stage1_teacher.targets.teacher import Teacher


def make_records(pieces: Sequence[Piece], answers: Answers, teacher: Teacher, dump: DumpConfig) -> list[Record]:
    """The pieces' records out of what the engine gave for them."""
    found = iter(teacher.targets(pieces, answers))
    return [
        make_record(
            piece,
            [next(found) for _ in piece.stretches],
            teacher.tokenizer,
            dump.top_k,
            dump.min_prob,
            exact=dump.coding == levels.EXACT,
        )
        for piece in pieces
    ]


def make_record(
    piece: Piece,
    targets: Sequence[Targets],
    tokenizer: ByteTokenizer,
    top_k: int,
    min_prob: float,
    exact: bool = False,
) -> Record:
    """A piece's record from the targets of its stretches, the tokenizer's prefix included.

    `exact`: every number as float32, and every symbol, whatever `top_k` and `min_prob` say.
    """
    taken = [slice(s.skipped, s.skipped + s.segment.num_positions) for s in piece.stretches]
    kept = list(zip(targets, taken, strict=True))
    segments = tuple(stretch.segment for stretch in piece.stretches)
    realised = b"".join(piece.text[s.start : s.start + s.length] + (b"\xff" if s.has_end else b"") for s in segments)
    probs_PV = np.concatenate([found.probs_PV[where] for found, where in kept])
    if exact:
        counts_P, rounded = counts(len(probs_PV)), exact_entries(probs_PV)
    else:
        entries = sparsify(probs_PV, np.frombuffer(realised, dtype=np.uint8), top_k, min_prob)
        counts_P, rounded = entries.counts_P, round_entries(entries)
    lengths, token_logprobs = _token_columns(piece, targets, tokenizer)

    measured: dict[str, Any] = {}
    for column in MEASURES:
        found_P = np.concatenate([getattr(found, f"{column.name}_P")[where] for found, where in kept])
        measured[column.name] = column.as_stored(found_P, exact)
    return Record(
        doc_id=piece.doc_id,
        window_start=piece.window.start,
        document=piece.text,
        segments=segments,
        teacher_token_lengths=lengths,
        teacher_token_logprobs=BY_NAME["teacher_token_logprobs"].as_stored(token_logprobs, exact),
        entry_counts=counts_P,
        **measured,
        symbols=rounded.symbols_E,
        logprobs=rounded.logprobs_E,
        message_roles=piece.roles,
        message_lengths=piece.lengths,
        conversation=piece.conversation,
    )


def _token_columns(piece: Piece, targets: Sequence[Targets], tokenizer: ByteTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """T: bytes and log-probability of each token; what lies between stretches counts as one of log-probability 0."""
    lengths: list[int] = []
    logprobs = []
    at = 0
    for stretch, found in zip(piece.stretches, targets, strict=True):
        if stretch.start > at:
            lengths.append(stretch.start - at)
            logprobs.append(np.zeros(1))
        lengths += spelled_lengths(tokenizer, stretch.tokens, stretch.num_prefix)
        logprobs.append(found.token_logprobs)
        at = stretch.segment.start + stretch.segment.length
    if len(piece.text) > at:
        lengths.append(len(piece.text) - at)
        logprobs.append(np.zeros(1))
    return np.array(lengths, dtype=np.int32), np.concatenate(logprobs)
