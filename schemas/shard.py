"""A shard: one Parquet file of records, absent or complete.

Shape legend: T tokens of the teacher, S segments, M messages of a chat, P positions (over all segments in turn), E
entries (over all positions in turn), O of them that are not the document's symbol, A alternatives (over all tokens in
turn).
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas import SCHEMA_VERSION, levels, stored_entries
from schemas.columns import COLUMNS, Unit, shard_schema, units
from schemas.dump_files import Key
from schemas.file_seal import BLANK, seal
from schemas.record import Record, RecordOutline, RecordText
from schemas.storage.atomic import committed
from schemas.storage.locations import Location, open_parquet
from schemas.token_alternatives import TokenAlternatives, stored_columns, without_alternatives
from schemas.versions import Reader, Rows
from schemas.versions import reader as reader_of

_TEXTS = ("document", "conversation")
_LISTS = frozenset(column.name for column in COLUMNS if column.is_list)
_FLOATS = frozenset(column.name for column in COLUMNS if column.is_list and pa.types.is_floating(column.kind))
_IDS = frozenset(column.name for column in COLUMNS if column.is_list and column.unit is Unit.TOKEN_ID)
# Few distinct values whose bytes are spread evenly: a dictionary packs them into bits, which zstd sees less in.
_SPLIT_BYTES = frozenset({"teacher_token_lengths", "other_symbols", "alternative_counts", "teacher_token_ranks"})
_WITH_STATISTICS = ("doc_id", "window_start")
GROUP_BYTES = 1 << 20  # text in a row group
_ROUNDED = {
    True: "of every symbol, a float32; so are shares",
    False: "rounded to at most 256 levels so that a position's sum to at most 1; shares are rounded up to 16 levels",
}


_DECODING = {
    2: "position p of a record owns entries sum(entry_counts[:p]) .. + entry_counts[p]; probability = exp(logprob)",
    3: "position p of a record has the symbol of the document, with realised_logprobs[p], and the others "
    "sum(other_counts[:p]) .. + other_counts[p]; probability = exp(logprob)",
}


def to_table(records: Sequence[Record], identity: Mapping[str, Any], version: int = SCHEMA_VERSION) -> pa.Table:
    """Build a shard's table, with `identity` in its metadata, so that a shard found alone explains itself.

    Args:
        version: of the format; that of the dump's manifest.

    Raises ValueError for a record that the version cannot hold.
    """
    made: dict[str, list[Any]] = {
        "segment_starts": [[s.start for s in r.segments] for r in records],
        "segment_lengths": [[s.length for s in r.segments] for r in records],
        "segment_has_end": [[s.has_end for s in r.segments] for r in records],
        "message_roles": [list(r.message_roles) for r in records],
        "message_lengths": [list(r.message_lengths) for r in records],
        **(stored_columns([_tokens(r) for r in records]) if identity.get("tokens") else {}),
        **(_in_columns([stored_entries.stored_columns(record) for record in records]) if version > 2 else {}),
    }
    schema = shard_schema(identity, version)
    arrays = [
        _column(field, made.get(field.name) or [getattr(r, field.name, None) for r in records]) for field in schema
    ]
    metadata = {
        Key.SCHEMA_VERSION: str(version),
        Key.IDENTITY: json.dumps(identity, sort_keys=True),
        Key.UNITS: units(identity, version),
        Key.DECODING: (
            f"{_DECODING[max(version, 2)]}, "
            f"{_ROUNDED[identity.get('coding') == levels.EXACT]}; "
            "the tail 1 - sum is one class of all symbols not stored; symbol 255 is END; positions run through the "
            "segments in turn, segment_length (+ 1 if segment_has_end) each"
        ),
    }
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))


def _in_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _tokens(record: Record) -> TokenAlternatives:
    """Return the alternatives of a record's tokens; none of one that is context alone, which no teacher has seen."""
    if record.tokens is None and not record.segments:
        return without_alternatives(record.teacher_token_logprobs)
    assert record.tokens is not None, "a record without alternatives in a dump that stores them"
    return record.tokens


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if not pa.types.is_list(field.type) or not values or isinstance(values[0], list):
        return pa.array(values, type=field.type)
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int32)
    flat = np.concatenate(values) if values else np.empty(0)
    child = pa.array(flat, type=field.type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), child, type=field.type)


def commit_shard(table: pa.Table, path: Location, zstd_level: int, first: bool = False) -> int:
    """Write a shard so that `path` is absent or complete, whatever interrupts us. Returns its size in bytes.

    Every column except text has a dictionary: each has few distinct values (`schemas.levels`), stored in a byte or half
    a byte. Ids of alternatives and, in a dump that stores everything, floats have a byte-stream split instead: the
    first bytes of all numbers together, then the second ones. With a dictionary, ids took a fifth more. From version 3
    on, some other columns are split, too, and documents lie in row groups of some `GROUP_BYTES` of text.

    Args:
        first: keep a shard that already exists at `path`, and discard this one.
    """
    is_newer = {"document", "other_symbols"} <= set(table.schema.names)
    split = _IDS | (_FLOATS if _is_exact(table) else frozenset()) | (_SPLIT_BYTES if is_newer else frozenset())
    with_dictionary = [_leaf(name) for name in table.schema.names if name not in (*_TEXTS, *split)]
    with committed(path, first) as partial:
        with pq.ParquetWriter(
            partial,
            table.schema,
            compression="zstd",
            compression_level=zstd_level,
            use_dictionary=with_dictionary,
            use_byte_stream_split=[_leaf(name) for name in table.schema.names if name in split],
            write_statistics=list(_WITH_STATISTICS) if is_newer else True,
            write_page_checksum=True,
        ) as writer:
            for start, end in _row_groups(table) if is_newer else [(0, len(table))]:
                writer.write_table(table.slice(start, end - start))
            writer.add_key_value_metadata({Key.SHA256: BLANK})
        seal(partial)
    return path.stat().st_size


def _row_groups(table: pa.Table) -> list[tuple[int, int]]:
    """Return the first row of each row group, and the one after its last: documents of at least `GROUP_BYTES`."""
    ends = np.cumsum(pc.binary_length(table["document"]).to_numpy(), dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(table) or len(bounds) == 1:
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(min(int(np.searchsorted(ends, before + GROUP_BYTES)) + 1, len(table)))
    return list(pairwise(bounds))


def _leaf(name: str) -> str:
    return f"{name}.list.element" if name in _LISTS else name


def _is_exact(table: pa.Table) -> bool:
    identity = json.loads((table.schema.metadata or {}).get(Key.IDENTITY.encode(), b"{}"))
    return bool(identity.get("coding") == levels.EXACT)


def shard_reader(path: Location, metadata: Mapping[bytes, bytes] | None) -> Reader:
    """Return the reader of the format version that a file states. Raises ValueError for a version not read here."""
    version = (metadata or {}).get(Key.SCHEMA_VERSION.encode())
    if version is None:
        raise ValueError(f"{path} is not a shard of a dump: its Parquet metadata lacks {Key.SCHEMA_VERSION}")
    return reader_of(path, version.decode())


def checked_reader(path: Location, schema: pa.Schema) -> Reader:
    """Return the reader of a shard with this schema. Raises ValueError if its columns are not those of its version."""
    reader = shard_reader(path, schema.metadata)
    reader.check_columns(path, schema)
    return reader


_NEEDED = (Key.IDENTITY, Key.LEFT_OUT, Key.TEACHER_TOKENS, Key.COMPUTED_TOKENS, Key.SHARD_SHA256, Key.ENGINE)


def shard_metadata(path: Location, schema: pa.Schema) -> dict[str, str]:
    """Decode the Parquet metadata of a shard with this schema. Raises ValueError if a required key is missing."""
    shard_reader(path, schema.metadata)
    metadata = {key.decode(): value.decode(errors="replace") for key, value in schema.metadata.items()}
    missing = [key for key in _NEEDED if key not in metadata]
    if missing:
        raise ValueError(f"{path} is not a shard made by stage 1: its Parquet metadata lacks {', '.join(missing)}")
    return metadata


def num_records(path: Location) -> int:
    """Return the number of records in a shard, from its footer."""
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def window_names(path: Location) -> Iterator[tuple[str, int]]:
    """Yield each record's document name and its byte offset there; reads nothing else."""
    with open_parquet(path) as file:
        table = file.read(columns=["doc_id", "window_start"])
    yield from zip(table["doc_id"].to_pylist(), table["window_start"].to_pylist(), strict=True)


def num_supervised(file: pq.ParquetFile) -> tuple[int, int]:
    """Return how many bytes and how many ENDs a shard supervises."""
    table = file.read(columns=["segment_lengths", "segment_has_end"])
    return _sum(table["segment_lengths"]), _sum(table["segment_has_end"])


def _sum(lists: pa.ChunkedArray) -> int:
    """Sum all elements of a column of lists."""
    return int(lists.combine_chunks().flatten().to_numpy(zero_copy_only=False).sum())


def read_shard(path: Location, batch_records: int = 64, small_buffers: bool = False) -> Iterator[Record]:
    """Yield a shard's records in order, holding `batch_records` of them in memory at once.

    `small_buffers`: as in `open_parquet`. Raises ValueError for columns that are not the format's, and for a record
    with structural errors.
    """
    for row, (record, faults) in enumerate(read_with_faults(path, batch_records, small_buffers)):
        yield _checked(record, faults, path, row)


def read_with_faults(
    path: Location, batch_records: int = 64, small_buffers: bool = False
) -> Iterator[tuple[Record, list[str]]]:
    """Yield a shard's records in order, each with its structural errors."""
    for batch in _batches(path, batch_records, small_buffers):
        for row in range(batch.num_rows):
            record = batch.record(row)
            yield record, batch.faults(row, record)


def read_rows(
    path: Location, rows: Iterable[int], batch_records: int = 64, small_buffers: bool = False
) -> Iterator[Record]:
    """Yield these rows of a shard, ascending.

    Row groups without any of them are skipped. Rows in between are decoded by Arrow, which releases the interpreter's
    lock, but not turned into records. `rows` is advanced only when the next row is due, so that it may be determined
    meanwhile. `small_buffers`: as in `open_parquet`. Raises ValueError for a row that the shard does not have, and as
    `read_shard` does.
    """
    with open_parquet(path, small_buffers) as file:
        reader = checked_reader(path, file.schema_arrow)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = list(accumulate(sizes))
        batches: Iterator[Rows] = iter(())
        batch, first, end = None, 0, 0  # end: of the row group
        for row in rows:
            if row >= end:
                group = bisect_right(ends, row)
                if group == len(ends):
                    raise ValueError(
                        f"{path} has no row {row}, only {sum(sizes)}: it is not the file whose records were counted"
                    )
                end, first, batch = ends[group], ends[group] - sizes[group], None
                batches = map(reader.rows, file.iter_batches(batch_size=batch_records, row_groups=[group]))
            while batch is None or row >= first + batch.num_rows:
                first += 0 if batch is None else batch.num_rows
                batch = next(batches)
            record = batch.record(row - first)
            yield _checked(record, batch.faults(row - first, record), path, row)


def _checked(record: Record, faults: Sequence[str], path: Location, row: int) -> Record:
    if faults:
        raise ValueError(
            f"{path}, record {row} (doc_id {record.doc_id!r}): {'; '.join(faults)}. "
            "`bld verify` lists everything that is wrong"
        )
    return record


def _batches(path: Location, batch_records: int, small_buffers: bool = False) -> Iterator[Rows]:
    with open_parquet(path, small_buffers) as file:
        reader = checked_reader(path, file.schema_arrow)
        for group in range(file.num_row_groups):  # one at a time, so that no more than one is held in memory
            yield from map(reader.rows, file.iter_batches(batch_size=batch_records, row_groups=[group]))


def read_record_texts(path: Location, with_tokens: bool = False) -> Iterator[RecordText]:
    """Yield the text of each record of a shard, in order, reading few other columns.

    `with_tokens`: the lengths of the teacher's tokens too.
    """
    with open_parquet(path) as file:
        reader = checked_reader(path, file.schema_arrow)
        columns = reader.record_text_columns(file.schema_arrow, with_tokens)
        for rows in map(reader.rows, file.iter_batches(batch_size=256, columns=columns)):
            yield from (rows.record_text(row) for row in range(rows.num_rows))


def read_outlines(path: Location) -> Iterator[RecordOutline]:
    """Yield the outline of each record of a shard, in order, reading neither text nor targets."""
    with open_parquet(path) as file:
        reader = checked_reader(path, file.schema_arrow)
        columns = [name for name in reader.record_text_columns(file.schema_arrow, True) if name not in _TEXTS]
        for rows in map(reader.rows, file.iter_batches(batch_size=256, columns=columns)):
            yield from (rows.outline(row) for row in range(rows.num_rows))
