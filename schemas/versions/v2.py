"""Version 2 of the format: bld 0.2 and later, for dumps that hold alternatives of the teacher's tokens.

Otherwise as version 1, of which dumps without these columns were.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from schemas.columns import columns_of
from schemas.columns import shard_schema as schema_of_version
from schemas.record import Record
from schemas.storage.locations import Location
from schemas.token_alternatives import COLUMNS as TOKEN_COLUMNS
from schemas.token_alternatives import from_columns
from schemas.versions import v1
from schemas.versions.v1 import manifest, record_text_columns

VERSION = 2
_COLUMNS = columns_of(VERSION)

__all__ = ["VERSION", "Rows", "check_columns", "manifest", "record_text_columns", "rows", "shard_schema"]


def shard_schema(identity: Mapping[str, Any]) -> pa.Schema:
    """Return the columns that the shards of a dump with that identity must have."""
    return schema_of_version(identity, VERSION)


def check_columns(path: Location, schema: pa.Schema) -> None:
    """Raise ValueError if a required column is missing, or a column's type is not the format's."""
    v1.check_columns(path, schema, _COLUMNS, required=TOKEN_COLUMNS)


def rows(batch: pa.RecordBatch) -> "Rows":
    """Return the rows of a batch."""
    return Rows(batch, _COLUMNS)


class Rows(v1.Rows):
    """A batch of Arrow rows, each converted to a record on request."""

    def record(self, row: int) -> Record:
        values = self._values(row)
        if TOKEN_COLUMNS[0] not in values:
            return Record(**values)
        columns = {name: values.pop(name) for name in TOKEN_COLUMNS}
        try:
            tokens = from_columns(columns, values["teacher_token_logprobs"])
        except ValueError as error:
            raise ValueError(f"document {values['doc_id']!r}: {error}") from None
        return Record(**values, tokens=tokens)
