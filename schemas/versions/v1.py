"""Version 1 of the format: bld 0.1 and later."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.columns import Column, columns_of, describe_field, differ
from schemas.columns import shard_schema as schema_of_version
from schemas.record import Record, RecordOutline, RecordText, Segment
from schemas.record_checks import layout_faults
from schemas.storage.locations import Location

VERSION = 1
_COLUMNS = columns_of(VERSION)
_TEXT_COLUMNS = ("doc_id", "window_start", "document", "segment_starts", "segment_lengths", "segment_has_end")
_CHAT_COLUMNS = ("message_roles", "message_lengths", "conversation")


def manifest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest's fields under today's names."""
    return dict(values)


def shard_schema(identity: Mapping[str, Any]) -> pa.Schema:
    """Return the columns that the shards of a dump with that identity must have."""
    return schema_of_version(identity, VERSION)


def check_columns(
    path: Location, schema: pa.Schema, columns: Sequence[Column] = _COLUMNS, required: Collection[str] = ()
) -> None:
    """Raise ValueError if a required column is missing, or a column's type is not the format's.

    Additional columns are allowed.

    Args:
        columns: those of the version.
        required: names of columns that every shard of the version has, besides those that every dump has.
    """
    theirs = {field.name: field for field in schema}
    for column in columns:
        if column.name in (*theirs, *required) or (column.always and column.stored_where is None):
            actual, expected = theirs.get(column.name), column.field
            if actual is None:
                raise ValueError(f"{path}: column {column.name} is missing")
            if differ(actual, expected):
                raise ValueError(
                    f"{path}: column {column.name} is {describe_field(actual)}, the format says "
                    f"{describe_field(expected)}"
                )


def record_text_columns(schema: pa.Schema, with_tokens: bool) -> list[str]:
    """Return the columns that a record's text consists of; `with_tokens`: the lengths of the teacher's tokens too."""
    tokens = ["teacher_token_lengths"] if with_tokens else []
    return [*_TEXT_COLUMNS, *tokens, *(name for name in _CHAT_COLUMNS if name in schema.names)]


def rows(batch: pa.RecordBatch) -> "Rows":
    """Return the rows of a batch."""
    return Rows(batch)


class Rows:
    """A batch of Arrow rows, each converted to a record on request."""

    def __init__(self, batch: pa.RecordBatch, columns: Sequence[Column] = _COLUMNS) -> None:
        self.num_rows = batch.num_rows
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._scalars: dict[str, pa.Array] = {}
        present = set(batch.schema.names)  # a shard of plain text may lack the message columns
        for column in columns:
            if column.name not in present:
                continue
            values = batch.column(batch.schema.get_field_index(column.name))
            if column.is_list:
                self._lists[column.name] = (values.offsets.to_numpy(), values.values.to_numpy(zero_copy_only=False))
            else:
                self._scalars[column.name] = values

    def record(self, row: int) -> Record:
        return Record(**self._values(row))

    def faults(self, row: int, record: Record) -> list[str]:
        """Describe structural errors of a row, of which `record` was made."""
        return layout_faults(record)

    def record_text(self, row: int) -> RecordText:
        return RecordText(**self._values(row))

    def outline(self, row: int) -> RecordOutline:
        return RecordOutline(**self._values(row))

    def _cells(self, row: int) -> dict[str, np.ndarray]:
        # Copies: a view would keep the whole batch in memory while any record of it is in use.
        return {n: values[offsets[row] : offsets[row + 1]].copy() for n, (offsets, values) in self._lists.items()}

    def _values(self, row: int) -> dict[str, Any]:
        cells = self._cells(row)
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
