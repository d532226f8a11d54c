"""Faults of a shard's records: of each by itself, of the windows of a document together, and of their counts."""

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise

import numpy as np

from pipeline.runtime.format import are, count_of
from pipeline.tokenization.chat_template import ASSISTANT
from schemas import NUM_SYMBOLS, levels
from schemas.columns import BY_NAME
from schemas.dump_files import Key
from schemas.manifest import ShardPlan
from schemas.record import Record
from schemas.record_checks import value_faults
from schemas.shard import read_with_faults
from schemas.storage.locations import Location
from stage1_teacher.verification.verify_tokens import Vocabulary, token_faults


def faults_of_records(
    path: Location, metadata: dict[str, str], shard: ShardPlan, vocabulary: Vocabulary | None = None
) -> Iterator[str]:
    """Yield the faults of each record, of the windows of a document together, and of the shard's counts.

    Args:
        vocabulary: bytes of the teacher's tokens, with which alternatives are checked.
    """
    num_ids = int(metadata.get(Key.VOCABULARY_SIZE, "0")) or None
    identity = json.loads(metadata[Key.IDENTITY])
    exact = identity.get("coding") == levels.EXACT
    in_parts = bool(identity.get("corpus", {}).get("supervise"))  # documents are supervised in parts
    num_documents, num_bytes = 0, 0
    open_id: str | None = None  # a document whose last window has not been read yet
    done = 0  # bytes of it that are supervised so far
    seen_bytes = 0  # bytes of a chat, or of a document supervised in parts, in its windows so far
    rendered = False  # the template's text is supervised, which has another size than the corpus's
    for row, (record, structural) in enumerate(read_with_faults(path)):
        where = f", record {row} (doc_id {record.doc_id!r}): "
        faults = [*(structural or value_faults(record)), *_measure_faults(record), *_chat_faults(record)]
        faults += _incomplete(record) if exact and not faults else []
        faults += [] if faults else token_faults(record, vocabulary, num_ids)
        yield from (where + fault for fault in faults)
        if faults:
            continue
        if open_id not in (None, record.doc_id):
            yield f", record {row - 1} (doc_id {open_id!r}): the document's last window is missing"
        if record.message_roles:
            seen_bytes = seen_bytes if record.window_start else 0
            rendered = rendered or bool(record.conversation)
            num_documents += not record.window_start
            num_bytes += sum(len(span) for span in _assistant_spans(record) if span.stop > seen_bytes)
            seen_bytes, open_id = record.window_start + len(record.document), None
            continue
        done = done if open_id == record.doc_id else 0
        if in_parts:
            seen_bytes = seen_bytes if record.window_start else 0
            if record.window_start > seen_bytes:
                yield f"{where}starts at byte {record.window_start}, but the window before ends at {seen_bytes}"
            end = record.window_start + len(record.document)
            num_documents, num_bytes = num_documents + (not record.window_start), num_bytes + end - seen_bytes
            seen_bytes, open_id = end, None
            yield from (f"{where}{fault}" for fault in _order_faults(record))
            continue
        for segment in record.segments:
            start = record.window_start + segment.start
            if start != done:
                yield f"{where}supervises from byte {start} on, but the part supervised before ends at {done}"
            done = start + segment.length
            num_bytes += segment.length
        ends = bool(record.segments) and record.segments[-1].has_end
        num_documents += ends
        open_id = None if ends else record.doc_id
    if open_id is not None:
        yield f" (doc_id {open_id!r}): the document's last window is missing"
    left_out = json.loads(metadata[Key.LEFT_OUT])
    if num_documents + len(left_out) != shard.num_documents:
        documents = count_of(num_documents, "document")
        planned = f"{shard.num_documents} {are(shard.num_documents)} planned"
        yield f": {documents} and {len(left_out)} left out, but {planned}"
    if num_bytes != shard.num_bytes and not (left_out or rendered):
        yield f": {num_bytes} bytes to supervise, but {shard.num_bytes} are planned"


def _assistant_spans(record: Record) -> list[range]:
    """Return the bytes of the whole chat that are the assistant's, message by message."""
    ends = list(accumulate(record.message_lengths, initial=record.window_start))
    spans = zip(record.message_roles, pairwise(ends), strict=True)
    return [range(start, end) for role, (start, end) in spans if role == ASSISTANT]


def _chat_faults(record: Record) -> list[str]:
    """Return faults of a chat's segments: outside the assistant's messages, overlapping, or out of order."""
    if not record.message_roles:
        return []
    spans = [(record.window_start + s.start, record.window_start + s.start + s.length) for s in record.segments]
    faults = [
        f"supervises bytes {start} to {end}, which are not what the assistant says"
        for start, end in spans
        if not any(span.start <= start and end <= span.stop for span in _assistant_spans(record))
    ]
    return faults + _order_faults(record)


def _order_faults(record: Record) -> list[str]:
    """Return whether segments overlap, or are out of order."""
    spans = [(segment.start, segment.start + segment.length) for segment in record.segments]
    disordered = any(one[1] > other[0] for one, other in pairwise(spans))
    return ["segments overlap, or are out of order"] if disordered else []


def _incomplete(record: Record) -> list[str]:
    """Return faults of a record that should hold all symbols: the first position that does not, or not with sum 1."""
    if (record.entry_counts != NUM_SYMBOLS).any():
        return [f"position {int(np.argmax(record.entry_counts != NUM_SYMBOLS))} lacks symbols, but the dump stores all"]
    sums_P = np.exp(record.logprobs.astype(np.float64)).reshape(-1, NUM_SYMBOLS).sum(axis=1)
    wrong_P = np.abs(sums_P - 1) > 1e-5  # float32's rounding of logs
    if not wrong_P.any():
        return []
    return [f"all symbols of position {int(np.argmax(wrong_P))} sum to {sums_P[np.argmax(wrong_P)]:.6f}"]


def _measure_faults(record: Record) -> list[str]:
    return [
        f"{name} holds values outside {low:g}..{high:g}"
        for name, value_P in record.measures.items()
        for low, high in [BY_NAME[name].unit.bounds]
        if not bool(((value_P >= low) & (value_P <= high)).all())  # False for nan
    ]
