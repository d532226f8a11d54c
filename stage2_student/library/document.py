"""A document of a dump as arrays.

Shape legend: P positions of the document's supervised segments in turn, E maximum number of entries at one position.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dumps.positions import decode, offsets
from pipeline.dumps.view import find_document
from schemas.storage.locations import location
from stage2_student.data.examples import NO_SYMBOL, padded_entries


@dataclass(frozen=True)
class DocumentArrays:
    """A document and its targets; position `p` asks for the symbol after `offset_P[p]` bytes.

    Attributes:
        document: its bytes.
        offset_P: int64, byte offset in the document.
        realised_P: uint8, the symbol that the document has there; 255 is END.
        symbols_PE: int64, the stored symbols, most probable first, ties by ascending symbol; -1 at padding.
        logprobs_PE: float32, their natural logs; -inf at padding.
        tail_P: float64, the probability of all symbols that are not stored, together.
        measures_P: float32, the dump's further values by column (`dropped`, `token_end`, `doubt`), as far as stored.
        token_starts, token_logprobs: byte offset and natural log of the probability of each of the teacher's tokens;
            those of a window's context occur in the window before too.
    """

    doc_id: str
    document: bytes
    offset_P: np.ndarray
    realised_P: np.ndarray
    symbols_PE: np.ndarray
    logprobs_PE: np.ndarray
    tail_P: np.ndarray
    measures_P: dict[str, np.ndarray]
    token_starts: np.ndarray
    token_logprobs: np.ndarray


def read_document(dump: str | Path, doc_id: str, nth: int = 1) -> DocumentArrays:
    """Read a document with all its windows from a dump, complete or not.

    Args:
        dump: a folder, or an address: s3://bucket/folder, gs://bucket/folder, hf://datasets/owner/name.
        nth: which one, if several documents have this id.
    Raises:
        ValueError: the dump holds no such document; the message has the most similar ids.
    """
    found = find_document(location(str(dump)), doc_id, nth)
    entries = [padded_entries(record, np.arange(record.num_positions)) for record in found.records]
    width = max(symbols_PE.shape[1] for symbols_PE, _ in entries)
    symbols_PE = np.concatenate([_widened(symbols_PE, width, NO_SYMBOL) for symbols_PE, _ in entries])
    logprobs_PE = np.concatenate([_widened(logprobs_PE, width, 0.0) for _, logprobs_PE in entries])
    logprobs_PE = np.where(symbols_PE == NO_SYMBOL, -np.inf, logprobs_PE).astype(np.float32)
    order_PE = np.lexsort((symbols_PE, -logprobs_PE), axis=1)
    names = [name for name in found.records[0].measures if all(name in record.measures for record in found.records)]
    starts = [
        record.window_start + np.cumsum(record.teacher_token_lengths) - record.teacher_token_lengths
        for record in found.records
    ]
    return DocumentArrays(
        doc_id=found.doc_id,
        document=found.text,
        offset_P=np.concatenate(
            [record.window_start + np.array(offsets(record), dtype=np.int64) for record in found.records]
        ),
        realised_P=np.concatenate([record.realised() for record in found.records]),
        symbols_PE=np.take_along_axis(symbols_PE, order_PE, axis=1),
        logprobs_PE=np.take_along_axis(logprobs_PE, order_PE, axis=1),
        tail_P=np.concatenate([decode(record).tail_P for record in found.records]),
        measures_P={name: np.concatenate([record.measures[name] for record in found.records]) for name in names},
        token_starts=np.concatenate(starts).astype(np.int64),
        token_logprobs=np.concatenate([record.teacher_token_logprobs for record in found.records]),
    )


def _widened(values_PE: np.ndarray, width: int, fill: float) -> np.ndarray:
    return np.pad(values_PE, ((0, 0), (0, width - values_PE.shape[1])), constant_values=fill)
