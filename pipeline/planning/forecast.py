"""What a dump will take, from a sample of it that was dumped: documents, tokens, bytes, device-hours, wall time.

How sure: each figure's 95 % interval, from the spread over sampled documents (tokens) and over parts of the sample
(seconds, stored bytes). It holds for the machine as it was while it was measured; that the machine is slower tomorrow
it does not know.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.planning.estimates import Estimate, counted, ratio
from schemas.record import Question


class Part(NamedTuple):
    """Some documents of the sample, dumped into a file of their own."""

    text_bytes: int
    teacher_tokens: int
    computed_tokens: int  # branch rows included
    stored_bytes: int
    seconds: float


class File(NamedTuple):
    """Parts written as one file, and the same records as two."""

    text_bytes: int
    stored_bytes: int
    halves_bytes: int  # of both


class Encoded(NamedTuple):
    """A document of the sample in the teacher's tokens, those that windows repeat and start tokens included."""

    text_bytes: int
    teacher_tokens: int


class Shape(NamedTuple):
    """The corpus, and how it is cut."""

    num_documents: Estimate
    num_bytes: int
    shards: Sequence[int]  # bytes of text in each


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        files: the parts joined, each as large as a shard of the dump, or as all that was dumped.
        load_seconds: until the engine was there.
        warm_seconds: that the first text took beyond what the same text took again: what compiles when it is first
            used.
        read_seconds: one pass over the corpus.
        audit_seconds: of all documents that will be audited together.
        devices, num_devices: what one worker computes on.
        questions: the records that the sampled documents will be, as a student meets them.
    """

    shape: Shape
    documents: Sequence[Encoded]
    parts: Sequence[Part]
    files: Sequence[File]
    load_seconds: float
    warm_seconds: float
    read_seconds: float
    audit_seconds: float
    devices: str
    num_devices: int
    questions: Sequence[Question] = ()


class Forecast(NamedTuple):
    """What the whole will take."""

    documents: Estimate
    text_bytes: Estimate
    teacher_tokens: Estimate
    computed_per_token: Estimate  # 1 where the covering has no branch rows
    stored_bytes: Estimate
    work_seconds: Estimate  # of one worker that did all of it, its engine's start left out: what the shards will tell
    device_hours: Estimate
    wall_seconds: Estimate

    def as_dict(self) -> dict[str, Any]:
        """JSON: each figure with its 95 % interval."""
        return {
            name: {"value": found.value, "low": found.value - found.half, "high": found.value + found.half}
            for name, found in self._asdict().items()
        }


def forecast(measured: Calibration, num_workers: int) -> Forecast:
    """Args: num_workers: machines, or groups of GPUs, like the one that was measured; shards are what they share.

    Raises ValueError where too little was measured to tell how it varies.
    """
    shape, parts = measured.shape, measured.parts
    tokens = ratio(
        [d.teacher_tokens for d in measured.documents],
        [d.text_bytes for d in measured.documents],
        population=max(round(shape.num_documents.value), len(measured.documents)),
    ).times(shape.num_bytes)
    per_token = ratio([p.seconds for p in parts], [p.teacher_tokens for p in parts])
    computed = ratio([p.computed_tokens for p in parts], [p.teacher_tokens for p in parts])
    shared = tokens.times(per_token).plus(measured.audit_seconds + measured.read_seconds)
    busiest = makespan(shape.shards, num_workers) / shape.num_bytes
    # A dump is planned by a pass over the corpus of its own.
    start = measured.load_seconds + measured.warm_seconds + measured.read_seconds
    return Forecast(
        documents=shape.num_documents,
        text_bytes=counted(shape.num_bytes),
        teacher_tokens=tokens,
        computed_per_token=computed,
        stored_bytes=stored_bytes(measured),
        work_seconds=shared.plus(measured.warm_seconds),
        device_hours=shared.plus(start * num_workers).times(measured.num_devices / 3600),
        wall_seconds=shared.times(busiest).plus(start),
    )


def stored_bytes(measured: Calibration) -> Estimate:
    """Of all shards. A file costs so many bytes for each of text, and some whatever it holds (its footer, a dictionary
    for each column): what the same records take in two files tells. How the first varies, the parts tell.
    """
    parts, shape, files = measured.parts, measured.shape, measured.files
    fixed = sum(file.halves_bytes - file.stored_bytes for file in files) / len(files)
    per_byte = (sum(file.stored_bytes for file in files) - fixed * len(files)) / sum(file.text_bytes for file in files)
    sampled = sum(part.text_bytes for part in parts)
    varied = ratio(
        [p.stored_bytes - fixed for p in parts],
        [p.text_bytes for p in parts],
        population=max(len(parts), round(len(parts) * shape.num_bytes / sampled)),
    )
    return Estimate(per_byte, per_byte * varied.share).times(shape.num_bytes).plus(fixed * len(shape.shards))


def makespan(shards: Sequence[int], num_workers: int) -> int:
    """Bytes of text of the worker that has most to do, where each takes the next shard when it is free."""
    busy = [0] * min(num_workers, max(1, len(shards)))
    for num_bytes in shards:
        heapq.heapreplace(busy, busy[0] + num_bytes)
    return max(busy)
