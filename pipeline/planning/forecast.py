"""Forecast of a dump's cost from a dumped sample: documents, tokens, bytes, device-hours, wall time.

Each figure has a 95 % interval, from the spread over sampled documents (tokens) and over parts of the sample (seconds,
stored bytes). It holds for the machine during the measurement, and does not cover a machine that is slower later.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.planning.estimates import Estimate, counted, ratio
from schemas.record import RecordText


class SamplePart(NamedTuple):
    """A part of the sample: some of its documents, dumped into their own file."""

    text_bytes: int
    teacher_tokens: int
    computed_tokens: int  # branch rows included
    stored_bytes: int
    seconds: float


class TrialFile(NamedTuple):
    """Sizes of some parts written as one file, and of the same records written as two."""

    text_bytes: int
    stored_bytes: int
    halves_bytes: int  # of both


class EncodedDocument(NamedTuple):
    """A document of the sample in the teacher's tokens, including start tokens and those that windows repeat."""

    text_bytes: int
    teacher_tokens: int


class CorpusShape(NamedTuple):
    """The size of the corpus and of its shards."""

    num_documents: Estimate
    num_bytes: int
    shards: Sequence[int]  # bytes of text in each


@dataclass(frozen=True)
class Calibration:
    """The measurements of a calibration.

    Attributes:
        files: the parts joined, each as large as a shard of the dump, or as all that was dumped.
        load_seconds: time until the engine was ready.
        warm_seconds: extra time for the first text compared with the same text again, due to compilation at first use.
        read_seconds: time for one pass over the corpus.
        audit_seconds: total time for all documents that will be audited.
        devices, num_devices: devices of one worker.
        records: the texts of the records that the sampled documents will become, as a student sees them.
    """

    shape: CorpusShape
    documents: Sequence[EncodedDocument]
    parts: Sequence[SamplePart]
    files: Sequence[TrialFile]
    load_seconds: float
    warm_seconds: float
    read_seconds: float
    audit_seconds: float
    devices: str
    num_devices: int
    records: Sequence[RecordText] = ()


class Forecast(NamedTuple):
    """The expected cost of the whole dump."""

    documents: Estimate
    text_bytes: Estimate
    teacher_tokens: Estimate
    computed_per_token: Estimate  # 1 if the covering has no branch rows
    stored_bytes: Estimate
    work_seconds: Estimate  # of one worker doing all of it, without engine start-up: what the shards will record
    device_hours: Estimate
    wall_seconds: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return each figure with its 95 % interval, as JSON values."""
        return {
            name: {"value": figure.value, "low": figure.value - figure.half, "high": figure.value + figure.half}
            for name, figure in self._asdict().items()
        }


def forecast(measured: Calibration, num_workers: int) -> Forecast:
    """Forecast the cost of a dump from its calibration.

    Args:
        num_workers: machines, or groups of GPUs, like the measured one; they share the shards.
    Raises:
        ValueError: too little was measured to estimate its variation.
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
    # Planning a dump takes its own pass over the corpus.
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
    """Estimate the stored bytes of all shards.

    A file has a cost per byte of text and a fixed cost (its footer, a dictionary for each column). The fixed cost is
    measured by writing the same records as two files; the variation of the cost per byte comes from the parts.
    """
    parts, shape, files = measured.parts, measured.shape, measured.files
    fixed = sum(file.halves_bytes - file.stored_bytes for file in files) / len(files)
    per_byte = (sum(file.stored_bytes for file in files) - fixed * len(files)) / sum(file.text_bytes for file in files)
    sampled = sum(part.text_bytes for part in parts)
    per_part = ratio(
        [p.stored_bytes - fixed for p in parts],
        [p.text_bytes for p in parts],
        population=max(len(parts), round(len(parts) * shape.num_bytes / sampled)),
    )
    return Estimate(per_byte, per_byte * per_part.share).times(shape.num_bytes).plus(fixed * len(shape.shards))


def makespan(shards: Sequence[int], num_workers: int) -> int:
    """Return the bytes of text of the busiest worker, if each takes the next shard when it is free."""
    busy = [0] * min(num_workers, max(1, len(shards)))
    for num_bytes in shards:
        heapq.heapreplace(busy, busy[0] + num_bytes)
    return max(busy)
