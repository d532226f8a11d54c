"""Search in a dump: its most surprising documents and positions, and the occurrences of a byte string."""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.dumps.positions import Position, decode, offsets, positions
from pipeline.dumps.view import documents, records
from schemas import END
from schemas.record import Record
from schemas.storage.locations import Location


class Surprise(NamedTuple):
    """A document, or one byte of it, with the teacher's surprise."""

    bits: float  # of a document: per byte
    doc_id: str
    offset: int  # of a document: 0
    context: bytes  # of a position: the bytes before it; of a document: its first bytes
    position: Position | None


CONTEXT_BYTES = 32


def worst_documents(dump: Location, number: int) -> list[Surprise]:
    """Return the documents with the most bits per byte under their targets, worst first; END is not a byte."""

    def scores() -> Iterator[tuple[float, int, Surprise]]:
        for index, document in enumerate(documents(dump)):
            num_bytes = sum(s.length for record in document.records for s in record.segments)
            bits = sum(float(decode(r).surprise_bits_P[r.realised() != END].sum()) for r in document.records)
            mean = bits / max(num_bytes, 1)
            yield mean, -index, Surprise(mean, document.doc_id, 0, document.text[: 2 * CONTEXT_BYTES], None)

    return [document for *_, document in heapq.nlargest(number, scores())]


def worst_positions(dump: Location, number: int) -> list[Surprise]:
    """Return the positions whose realised symbols had the lowest probabilities, worst first."""

    def scores() -> Iterator[tuple[float, int, Record, int]]:
        count = 0
        for record in records(dump):
            surprise_bits_P = decode(record).surprise_bits_P
            # The dump's worst are among the `number` worst of each record, so the heap sees only those.
            for index in np.argsort(-surprise_bits_P, kind="stable")[:number].tolist():
                count += 1
                yield float(surprise_bits_P[index]), -count, record, index

    return [_surprise(bits, record, index) for bits, _, record, index in heapq.nlargest(number, scores())]


def _surprise(bits: float, record: Record, index: int) -> Surprise:
    offset = offsets(record)[index]
    context = record.document[max(0, offset - CONTEXT_BYTES) : offset]
    position = list(positions(record))[index]
    return Surprise(bits, record.doc_id, record.window_start + offset, context, position)


class Occurrence(NamedTuple):
    """An occurrence of a byte string in a document, with the positions of its supervised bytes."""

    doc_id: str
    offset: int
    before: bytes
    after: bytes
    positions: list[Position]


def find(dump: Location, sought: bytes) -> Iterator[Occurrence]:
    """Yield every occurrence of `sought` in the documents, including overlapping ones."""
    for document in documents(dump):
        text = document.text
        start = text.find(sought)
        if start < 0:
            continue
        by_offset = {p.offset: p for p in document.positions() if p.realised != END}
        while start >= 0:
            end = start + len(sought)
            yield Occurrence(
                document.doc_id,
                start,
                text[max(0, start - CONTEXT_BYTES) : start],
                text[end : end + CONTEXT_BYTES],
                [by_offset[offset] for offset in range(start, end) if offset in by_offset],
            )
            start = text.find(sought, start + 1)
