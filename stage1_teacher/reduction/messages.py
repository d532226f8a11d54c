"""Messages between a dump and the workers of its engine, which may be other processes.

A request travels as plain values, an answer as one array of bytes (safetensors): the sparse targets of a span take some
120 bytes a token, its rows some 3 kB, and its hidden states would take 4 bytes for each of their numbers.

Shape legend: R rows, I intervals of all rows in turn, P positions, E entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from pipeline.covering.covering import Covering
from pipeline.covering.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from stage1_teacher.reduction.device_targets import device_targets
from stage1_teacher.reduction.device_trie import DeviceTrie
from stage1_teacher.reduction.reducer import PromptRows
from stage1_teacher.reduction.sparse_targets import SpanRequest, SparseTargets, Sparsity, reduce_span
from stage1_teacher.reduction.sparsify import Entries
from stage1_teacher.reduction.token_entries import TokenEntries
from stage1_teacher.reduction.types import DeviceMasses, Masses, RowsAlong

_FAULT = "fault"


def rows_message(requests: Sequence[RowsAlong]) -> dict[str, Any]:
    """Return a request for reduced rows as plain values."""
    rows = [(r.first, r.document, r.offsets_R.tobytes(), r.columns_R.tobytes(), r.num_top) for r in requests]
    return {"rows": rows}


def spans_message(requests: Sequence[SpanRequest], sparsity: Sparsity) -> dict[str, Any]:
    """Return a request for sparse targets as plain values."""
    spans = [(r.first, np.asarray(r.tokens, np.int32).tobytes(), r.document, r.kept) for r in requests]
    return {"spans": spans, "sparsity": tuple(sparsity)}


class Answering:
    """The answer to one prompt's message, while its rows are being reduced."""

    def __init__(self, message: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        self.fault: str | None = None
        self._spans: list[tuple[Covering, SpanRequest]] = []
        self._found: list[SparseTargets] | None = None
        if "rows" in message:
            requests = [
                RowsAlong(first, document, np.frombuffer(offsets, np.int64), np.frombuffer(columns, np.int64), num_top)
                for first, document, offsets, columns, num_top in message["rows"]
            ]
            self.rows = PromptRows.along(requests, vocabulary)
            return
        self._sparsity = Sparsity(*message["sparsity"])
        for first, tokens, document, kept in message["spans"]:
            span = SpanRequest(first, np.frombuffer(tokens, np.int32).tolist(), document, tuple(map(tuple, kept)))
            covering = Covering(vocabulary, span.tokens, document, self._sparsity.arithmetic)
            self._spans.append((covering, span))
        coverings, firsts = zip(*((covering, span.first) for covering, span in self._spans), strict=True)
        self.rows = PromptRows.canonical(coverings, firsts, self._sparsity.num_top)

    def sum_up(self) -> None:
        """Sum the rows into the sparse targets of a message for spans, here on the host; `bytes` does it otherwise."""
        if self._found is None:
            of_spans = zip(self._spans, self.rows.rows(), strict=True)
            self._found = [reduce_span(covering, rows, span, self._sparsity) for (covering, span), rows in of_spans]

    def bytes(self) -> bytes:
        """Return the answer: that of the message, or the fault that ended it."""
        if self.fault is not None:
            return save({_FAULT: np.frombuffer(self.fault.encode(), np.uint8)})
        if not self._spans:
            return save(self.rows.masses_on_host()._asdict())
        arrays: dict[str, np.ndarray] = {}
        exact = self._sparsity.top_k == NUM_SYMBOLS and not self._sparsity.min_prob
        self.sum_up()
        for number, found in enumerate(self._found or ()):
            arrays |= {
                f"{number}.counts": found.entries.counts_P,
                f"{number}.symbols": found.entries.symbols_E,
                f"{number}.probs": found.entries.probs_E if exact else found.entries.probs_E.astype(np.float32),
                f"{number}.measures": found.measures_MP.astype(np.float32),
                f"{number}.tokens": found.token_logprobs.astype(np.float32),
            }
            if found.tokens is not None:
                arrays |= {f"{number}.{name}": values for name, values in found.tokens._asdict().items()}
        return save(arrays)


def sum_on_device(answerings: Sequence[Answering], trie: DeviceTrie) -> None:
    """Sum the rows of complete answers into sparse targets on the device that holds them, all at once."""
    together = [a for a in answerings if a.fault is None and a._spans and not a._sparsity.redistribute]
    for sparsity in {answering._sparsity for answering in together}:
        alike = [answering for answering in together if answering._sparsity == sparsity]
        spans = [span for answering in alike for span in answering._spans]
        masses = [masses for a in alike if isinstance(masses := a.rows.masses(), DeviceMasses)]
        assert len(masses) == len(alike)
        found = iter(device_targets(trie, spans, DeviceMasses.join(masses), sparsity))
        for answering in alike:
            answering._found = [next(found) for _ in answering._spans]


def read_masses(answer: bytes) -> Masses:
    """Return the masses of the requested rows. Raises ValueError with the fault that the worker found."""
    return Masses(**_read(answer))


def read_spans(answer: bytes) -> list[SparseTargets]:
    """Return the sparse targets of the requested spans. Raises ValueError with the fault that the worker found."""
    arrays = _read(answer)
    return [
        SparseTargets(
            Entries(
                arrays[f"{number}.counts"], arrays[f"{number}.symbols"], arrays[f"{number}.probs"].astype(np.float64)
            ),
            arrays[f"{number}.measures"],
            arrays[f"{number}.tokens"],
            _read_tokens(arrays, number),
        )
        for number in range(sum(name.endswith(".counts") for name in arrays))
    ]


def _read_tokens(arrays: Mapping[str, np.ndarray], number: int) -> TokenEntries | None:
    names = [f"{number}.{name}" for name in TokenEntries._fields]
    return TokenEntries(*(arrays[name] for name in names)) if names[0] in arrays else None


def _read(answer: bytes) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = load(answer)
    if _FAULT in arrays:
        raise ValueError(arrays[_FAULT].tobytes().decode())
    return arrays
