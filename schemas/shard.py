"""A shard: one Parquet file of records, absent or complete.

Shape legend: T tokens of the teacher, S segments, M messages of a chat, P positions (over all segments in turn), E entries (over all positions in turn).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas import SCHEMA_VERSION, levels, version_fault
from schemas.file_seal import BLANK, SEAL_KEY, seal
from schemas.record import Question, Record, Segment
from schemas.record_checks import layout_faults
from schemas.storage.atomic import committed
from schemas.storage.locations import Location, open_parquet


def _list(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


_COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("doc_id", pa.string(), "name of the document in its corpus; windows of one document share it"),
    (
        "window_start",
        pa.int64(),
        "byte offset of this record in its document; 0 unless the document was cut into windows",
    ),
    ("document", pa.binary(), "the record's bytes, UTF-8; of a chat the contents of its messages, joined"),
    ("message_roles", _list(pa.string()), "M: who says each message of a chat; empty for plain text"),
    ("message_lengths", _list(pa.int32()), "M: bytes of each message of a chat; empty for plain text"),
    ("segment_starts", _list(pa.int32()), "S: byte offset where each supervised segment starts"),
    ("segment_lengths", _list(pa.int32()), "S: bytes in each segment"),
    ("segment_has_end", _list(pa.bool_()), "S: whether the segment has a last position that asks for END"),
    (
        "teacher_token_lengths",
        _list(pa.int32()),
        "T: bytes of each token of the teacher's encoding of the document; of a chat, what lies between segments is one entry",
    ),
    (
        "teacher_token_logprobs",
        _list(pa.float32()),
        "T: nats, of each such token given those before; 0 for what lies between the segments of a chat",
    ),
    ("entry_counts", _list(pa.uint16()), "P: stored entries"),
    (
        "dropped",
        _list(pa.float32()),
        "P: share of the prefix's known mass on branches that end here and were not expanded",
    ),
    (
        "token_end",
        _list(pa.float32()),
        "P: largest share on tokens that end off the canonical path, since the canonical token began",
    ),
    ("doubt", _list(pa.float32()), "P: estimated total variation between the stored target and the exact one"),
    ("symbols", _list(pa.uint8()), "E: 0-254 a byte, 255 END; in descending probability within a position"),
    ("logprobs", _list(pa.float32()), "E: natural log of the probability; what is left to 1 is the tail"),
)
SHARD_SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False, metadata={"description": text}) for name, kind, text in _COLUMNS]
)
# What a shard of chats has besides, where its identity names `corpus.turns`.
_CONVERSATION = pa.field(
    "conversation",
    pa.string(),
    nullable=False,
    metadata={
        "description": "JSON: messages and tools as a chat template was given them, this record's messages the last; empty where roles and "
        "contents say all"
    },
)
_OF_CHATS = ("message_roles", "message_lengths")  # columns that a shard of plain text may lack
_SCALARS = ("doc_id", "window_start", "document")
_MAY_LACK = (*_OF_CHATS, _CONVERSATION.name)
_LISTS = frozenset(name for name, kind, _ in _COLUMNS if pa.types.is_list(kind))
_FLOATS = frozenset(
    name for name, kind, _ in _COLUMNS if pa.types.is_list(kind) and pa.types.is_floating(kind.value_type)
)


_ROUNDED = {
    True: "of every symbol, a float32; so are shares",
    False: "rounded to at most 256 levels so that a position's sum to at most 1; shares are rounded up to 16 levels",
}


def shard_schema(identity: Mapping[str, Any]) -> pa.Schema:
    """The columns of a dump's shards, those of one dump alike: a chat's conversation where the identity says how its turns are read."""
    return SHARD_SCHEMA.append(_CONVERSATION) if "turns" in identity.get("corpus", {}) else SHARD_SCHEMA


def to_table(records: Sequence[Record], identity: Mapping[str, Any]) -> pa.Table:
    """The shard's table. `identity` goes into the file's metadata, so that a shard found alone explains itself."""
    made: dict[str, list[Any]] = {
        "segment_starts": [[s.start for s in r.segments] for r in records],
        "segment_lengths": [[s.length for s in r.segments] for r in records],
        "segment_has_end": [[s.has_end for s in r.segments] for r in records],
        "message_roles": [list(r.message_roles) for r in records],
        "message_lengths": [list(r.message_lengths) for r in records],
    }
    schema = shard_schema(identity)
    arrays = [
        _column(field, made.get(field.name) or [getattr(r, field.name, None) for r in records]) for field in schema
    ]
    metadata = {
        "bld.schema_version": str(SCHEMA_VERSION),
        "bld.identity": json.dumps(identity, sort_keys=True),
        "bld.units": (
            "logprobs, teacher_token_logprobs: natural log; dropped, token_end, doubt: shares 0..1; lengths and starts: bytes"
        ),
        "bld.decoding": (
            "position p of a record owns entries sum(entry_counts[:p]) .. + entry_counts[p]; probability = exp(logprob), "
            f"{_ROUNDED[identity.get('coding') == levels.EXACT]}; "
            "the tail 1 - sum is one class of all symbols not stored; symbol 255 is END; positions run through the "
            "segments in turn, segment_length (+ 1 if segment_has_end) each"
        ),
    }
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if not pa.types.is_list(field.type) or not values or isinstance(values[0], list):
        return pa.array(values, type=field.type)
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int32)
    flat = np.concatenate(values) if values else np.empty(0)
    child = pa.array(flat, type=field.type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), child, type=field.type)


def commit_shard(table: pa.Table, path: Location, zstd_level: int, first: bool = False) -> int:
    """Write a shard so that `path` is absent or complete, whatever interrupts us. Returns its size in bytes.

    `first`: one that is there by then stays, and this one is dropped.

    Every column but the text has a dictionary: the values of each are few (`schemas.levels`), a byte or half of one each. Of a dump
    that stores everything the floats have none, but their bytes apart, the first of all numbers together.
    """
    split = _FLOATS if _is_exact(table) else frozenset[str]()
    whole = ("document", _CONVERSATION.name, *split)
    with_dictionary = [_leaf(name) for name in table.schema.names if name not in whole]
    with committed(path, first) as partial:
        with pq.ParquetWriter(
            partial,
            table.schema,
            compression="zstd",
            compression_level=zstd_level,
            use_dictionary=with_dictionary,
            use_byte_stream_split=[_leaf(name) for name in table.schema.names if name in split],
            write_page_checksum=True,
        ) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({SEAL_KEY: BLANK})
        seal(partial)
    return path.stat().st_size


def _leaf(name: str) -> str:
    return f"{name}.list.element" if name in _LISTS else name


def _is_exact(table: pa.Table) -> bool:
    identity = json.loads((table.schema.metadata or {}).get(b"bld.identity", b"{}"))
    return bool(identity.get("coding") == levels.EXACT)


def check_version(path: Location, metadata: Mapping[bytes, bytes] | None) -> None:
    """Raise ValueError unless the file is a shard of a version we read."""
    version = (metadata or {}).get(b"bld.schema_version")
    if version is None:
        raise ValueError(f"{path} is not a shard of a dump: its Parquet metadata holds no bld.schema_version")
    fault = version_fault(path, version.decode())
    if fault:
        raise ValueError(fault)


_KEYS = ("identity", "left_out", "teacher_tokens", "computed_tokens", "shard_sha256", "engine")


def shard_metadata(path: Location, schema: pa.Schema) -> dict[str, str]:
    """What the Parquet metadata of a shard, whose schema it is, says. Raises ValueError where something is not said."""
    check_version(path, schema.metadata)
    found = {key.decode(): value.decode(errors="replace") for key, value in schema.metadata.items()}
    missing = [f"bld.{key}" for key in _KEYS if f"bld.{key}" not in found]
    if missing:
        raise ValueError(
            f"{path} is no shard that stage 1 has made: its Parquet metadata holds no {', '.join(missing)}"
        )
    return found


def num_records(path: Location) -> int:
    """How many records a shard holds, read off its footer."""
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def read_shard(
    path: Location, batch_records: int = 64, checked: bool = True, beside_others: bool = False
) -> Iterator[Record]:
    """Yield a shard's records in order, holding `batch_records` of them in memory at once. `beside_others`: as of `open_parquet`.

    Raises ValueError for columns that are not the format's, and, where `checked`, for a record with `layout_faults`.
    """
    first = 0
    for batch in _batches(path, batch_records, beside_others):
        for row in range(batch.num_rows):
            yield _checked(batch.record(row), path, first + row) if checked else batch.record(row)
        first += batch.num_rows


def read_rows(
    path: Location, rows: Iterable[int], batch_records: int = 64, beside_others: bool = False
) -> Iterator[Record]:
    """Yield these rows of a shard, ascending. What lies between is decoded by Arrow, which lets other threads run, and goes no further.

    `rows` is asked for the next one when it is due, so that it may be found out meanwhile. `beside_others`: as of `open_parquet`.
    Raises ValueError for a row that the shard does not have, and as `read_shard` does.
    """
    batches, batch, first = _batches(path, batch_records, beside_others), None, 0
    for row in rows:
        while batch is None or row >= first + batch.num_rows:
            first += 0 if batch is None else batch.num_rows
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"{path} has {first} records, and none at row {row}: it is not the file that was counted"
                )
        yield _checked(batch.record(row - first), path, row)


def _checked(record: Record, path: Location, row: int) -> Record:
    faults = layout_faults(record)
    if faults:
        raise ValueError(
            f"{path}, record {row} (doc_id {record.doc_id!r}): {'; '.join(faults)}. `bld verify` says what else is wrong"
        )
    return record


def _batches(path: Location, batch_records: int, beside_others: bool = False) -> "Iterator[_Rows]":
    with open_parquet(path, beside_others) as file:
        check_version(path, file.schema_arrow.metadata)
        _check_columns(path, file.schema_arrow)
        yield from map(_Rows, file.iter_batches(batch_size=batch_records))


def _check_columns(path: Location, schema: pa.Schema) -> None:
    """Raise ValueError where a reader would find another type than the format's, or nothing. More columns than those do no harm."""
    theirs = {field.name: (field.type, field.nullable) for field in schema}
    for field in (*SHARD_SCHEMA, _CONVERSATION):
        if field.name in theirs or field.name not in _MAY_LACK:
            found, wanted = theirs.get(field.name), (field.type, field.nullable)
            if found != wanted:
                raise ValueError(f"{path}: column {field.name} is {found}, the format says {wanted}")


def read_questions(path: Location, with_tokens: bool = False) -> Iterator[Question]:
    """Of each record of a shard in order; reads little more than the text. `with_tokens`: the lengths of the teacher's tokens too."""
    columns = ["doc_id", "window_start", "document", "segment_starts", "segment_lengths", "segment_has_end"]
    columns += ["teacher_token_lengths"] if with_tokens else []
    with open_parquet(path) as file:
        check_version(path, file.schema_arrow.metadata)
        _check_columns(path, file.schema_arrow)
        columns += [name for name in _MAY_LACK if name in file.schema_arrow.names]
        for rows in map(_Rows, file.iter_batches(batch_size=256, columns=columns)):
            yield from (rows.question(row) for row in range(rows.num_rows))


class _Rows:
    """Arrow's rows, each of which becomes a record when it is asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.num_rows = batch.num_rows
        self._lists = {}
        for field in SHARD_SCHEMA:
            index = batch.schema.get_field_index(field.name)  # -1: a shard of plain text may lack the message columns
            if pa.types.is_list(field.type) and index >= 0:
                column = batch.column(index)
                self._lists[field.name] = (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False))
        scalars = [name for name in batch.schema.names if name in (*_SCALARS, _CONVERSATION.name)]
        self._scalars = {name: batch.column(batch.schema.get_field_index(name)) for name in scalars}

    def record(self, row: int) -> Record:
        return Record(**self._asked(row))

    def question(self, row: int) -> Question:
        return Question(**self._asked(row))

    def _asked(self, row: int) -> dict[str, Any]:
        # Copies: a view would keep the whole batch in memory for as long as a reader keeps one record of it.
        cells = {n: values[offsets[row] : offsets[row + 1]].copy() for n, (offsets, values) in self._lists.items()}
        segments = zip(
            cells.pop("segment_starts"), cells.pop("segment_lengths"), cells.pop("segment_has_end"), strict=True
        )
        roles, lengths = cells.pop("message_roles", ()), cells.pop("message_lengths", ())
        return {
            "message_roles": tuple(roles),
            "message_lengths": tuple(int(length) for length in lengths),
            "segments": tuple(Segment(int(start), int(length), bool(end)) for start, length, end in segments),
            **{name: column[row].as_py() for name, column in self._scalars.items()},
            **cells,
        }
