"""What is wrong with the records of a shard: each by itself, the windows of a document together, and their counts."""

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise

import numpy as np

from pipeline.tokenization.chat_template import ASSISTANT
from schemas import NUM_SYMBOLS, levels
from schemas.columns import BY_NAME
from schemas.dump_files import Key
from schemas.manifest import ShardPlan
from schemas.record import Record
from schemas.record_checks import record_faults
from schemas.shard import read_shard
from schemas.storage.locations import Location


def faults_of_records(path: Location, metadata: dict[str, str], shard: ShardPlan) -> Iterator[str]:
    """Of each record, of the windows of a document together, and of the shard's counts."""
    exact = json.loads(metadata[Key.IDENTITY]).get("coding") == levels.EXACT
    num_documents, num_bytes = 0, 0
    open_id: str | None = None  # of a document whose last window has not come yet
    done = 0  # bytes of it that are supervised so far
    heard = 0  # of a chat, bytes that its windows held so far
    rendered = False  # what is supervised is the template's, not as many bytes as the corpus has
    for row, record in enumerate(read_shard(path, checked=False)):
        where = f", record {row} (doc_id {record.doc_id!r}): "
        faults = [*record_faults(record), *_measure_faults(record), *_chat_faults(record)]
        faults += _lacking(record) if exact and not faults else []
        yield from (where + fault for fault in faults)
        if faults:
            continue
        if open_id not in (None, record.doc_id):
            yield f", record {row - 1} (doc_id {open_id!r}): the document's last window is missing"
        if record.message_roles:
            heard = heard if record.window_start else 0
            rendered = rendered or bool(record.conversation)
            num_documents += not record.window_start
            num_bytes += sum(len(part) for part in _said(record) if part.stop > heard)
            heard, open_id = record.window_start + len(record.document), None
            continue
        done = done if open_id == record.doc_id else 0
        for segment in record.segments:
            start = record.window_start + segment.start
            if start != done:
                yield f"{where}supervises from byte {start} on, what is before it ends at {done}"
            done = start + segment.length
            num_bytes += segment.length
        ends = bool(record.segments) and record.segments[-1].has_end
        num_documents += ends
        open_id = None if ends else record.doc_id
    if open_id is not None:
        yield f" (doc_id {open_id!r}): the document's last window is missing"
    left_out = json.loads(metadata[Key.LEFT_OUT])
    if num_documents + len(left_out) != shard.num_documents:
        yield f": {num_documents} documents and {len(left_out)} left out, {shard.num_documents} are planned"
    if num_bytes != shard.num_bytes and not (left_out or rendered):
        yield f": {num_bytes} bytes to supervise, {shard.num_bytes} are planned"


def _said(record: Record) -> list[range]:
    """Bytes of the whole chat that are the assistant's words, message by message."""
    ends = list(accumulate(record.message_lengths, initial=record.window_start))
    spans = zip(record.message_roles, pairwise(ends), strict=True)
    return [range(start, end) for role, (start, end) in spans if role == ASSISTANT]


def _chat_faults(record: Record) -> list[str]:
    """Whether a chat's segments lie in what the assistant says, one after another."""
    if not record.message_roles:
        return []
    spans = [(record.window_start + s.start, record.window_start + s.start + s.length) for s in record.segments]
    faults = [
        f"supervises bytes {start} to {end}, which are not what the assistant says"
        for start, end in spans
        if not any(part.start <= start and end <= part.stop for part in _said(record))
    ]
    if any(one[1] > other[0] for one, other in pairwise(spans)):
        faults.append("segments overlap, or are out of order")
    return faults


def _lacking(record: Record) -> list[str]:
    """Of a record that says it holds everything: where a position does not, or its symbols do not sum to 1."""
    if (record.entry_counts != NUM_SYMBOLS).any():
        return [f"position {int(np.argmax(record.entry_counts != NUM_SYMBOLS))} lacks symbols, and the dump stores all"]
    sums_P = np.exp(record.logprobs.astype(np.float64)).reshape(-1, NUM_SYMBOLS).sum(axis=1)
    off_P = np.abs(sums_P - 1) > 1e-5  # float32's rounding of logs
    return (
        [f"all symbols of position {int(np.argmax(off_P))} sum to {sums_P[np.argmax(off_P)]:.6f}"]
        if off_P.any()
        else []
    )


def _measure_faults(record: Record) -> list[str]:
    return [
        f"{name} holds values outside {least:g}..{most:g}"
        for name, value_P in record.measures.items()
        for least, most in [BY_NAME[name].unit.bounds]
        if not bool(((value_P >= least) & (value_P <= most)).all())  # false for nan
    ]
