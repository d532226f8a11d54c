"""Other ways to store a shard's entries, in bytes per text byte.

Tried are Parquet's encodings, orders, unrounded values and sampled symbols.

Shape legend: P positions, E entries (over all positions in turn), N draws at a position.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.levels import LOGPROBS
from schemas.record import Record

DRAWS = (8, 16, 32, 50)
_PLAIN: dict[str, Any] = {"use_dictionary": False}
_WAYS: dict[str, dict[str, Any]] = {
    "dictionary": {"use_dictionary": True},
    "plain": _PLAIN,
    "byte-stream-split": {**_PLAIN, "use_byte_stream_split": True},
}
_DELTA = {**_PLAIN, "column_encoding": {"x.list.element": "DELTA_BINARY_PACKED"}}


def column_bytes(rows: Sequence[np.ndarray], level: int, **options: Any) -> int:
    """Return a list column's size in bytes in Parquet and zstd."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    values = pa.array(np.concatenate(rows))
    kind = pa.list_(pa.field("element", values.type, nullable=False))
    column = pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)
    table = pa.Table.from_arrays([column], schema=pa.schema([pa.field("x", kind, nullable=False)]))
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", compression_level=level, **options)
    return int(pq.read_metadata(file).row_group(0).column(0).total_compressed_size)


def rising(record: Record) -> Record:
    """Sort the record's entries by symbol."""
    position_E = np.arange(record.num_positions).repeat(record.entry_counts)
    order_E = np.lexsort((record.symbols, position_E))
    return replace(record, symbols=record.symbols[order_E], logprobs=record.logprobs[order_E])


def sampled(record: Record, probs_PV: np.ndarray, draws: int, random: np.random.Generator) -> Record:
    """Replace targets by the shares of `draws` symbols drawn from the dense targets.

    Whole counts, no tail (arXiv 2503.16870).
    """
    counts_PV = random.multinomial(draws, probs_PV)
    position_E, symbol_E = np.nonzero(counts_PV)
    counts_E = counts_PV[position_E, symbol_E]
    order_E = np.lexsort((symbol_E, -counts_E, position_E))
    return replace(
        record,
        entry_counts=np.count_nonzero(counts_PV, axis=1).astype(np.uint16),
        symbols=symbol_E[order_E].astype(np.uint8),
        logprobs=np.log(counts_E[order_E] / draws).astype(np.float32),
    )


def codings_table(
    stored: Sequence[Record], exact: Sequence[Record], dense: Sequence[np.ndarray], num_bytes: int, level: int
) -> Iterator[str]:
    """
    Args:
        exact: the same records, not rounded.
        dense: (P, 256) each, float64.
    """
    symbols, logprobs = [r.symbols for r in stored], [r.logprobs for r in stored]
    numbers = [np.searchsorted(LOGPROBS, values).astype(np.int32) for values in logprobs]
    halves = [r.logprobs.astype(np.float16) for r in exact]
    yield "| entries | symbols | log-probabilities | entry_counts |\n| --- | --- | --- | --- |"

    def line(name: str, *sizes: int) -> str:
        return f"| {name} | " + " | ".join(f"{size / num_bytes:.3f}" for size in sizes) + " |"

    for name, way in _WAYS.items():
        yield line(name, column_bytes(symbols, level, **way), column_bytes(logprobs, level, **way))
    for name in ("dictionary", "byte-stream-split"):
        way = _WAYS[name]
        yield line(
            f"not rounded, float16, {name}", column_bytes(symbols, level, **way), column_bytes(halves, level, **way)
        )
    wide = [values.astype(np.int32) for values in symbols]
    yield line(
        "delta, of the levels' numbers", column_bytes(wide, level, **_DELTA), column_bytes(numbers, level, **_DELTA)
    )
    yield line("rising symbols", *_sizes([rising(r) for r in stored], level)[:2])
    random = np.random.default_rng(0)
    for draws in DRAWS:
        records = [sampled(r, probs_PV, draws, random) for r, probs_PV in zip(stored, dense, strict=True)]
        yield line(f"{draws} symbols drawn", *_sizes(records, level))
    yield line("as stored", *_sizes(stored, level))


def _sizes(records: Sequence[Record], level: int) -> list[int]:
    columns = [[r.symbols for r in records], [r.logprobs for r in records], [r.entry_counts for r in records]]
    return [column_bytes(column, level, use_dictionary=True) for column in columns]
