"""Readers of the format: one module per readable version, each of which yields today's records and manifest fields.

May import `schemas.columns`, `schemas.record`, `schemas.record_checks`, `schemas.stored_entries` and `schemas.storage`.
A version's module stays when a later one comes.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import pyarrow as pa

from schemas import VersionError, version_fault
from schemas.record import Record, RecordOutline, RecordText
from schemas.storage.locations import Location
from schemas.versions import v1, v2, v3


class Rows(Protocol):
    """A batch of a shard's rows."""

    num_rows: int

    def record(self, row: int) -> Record: ...
    def record_text(self, row: int) -> RecordText: ...
    def faults(self, row: int, record: Record) -> list[str]: ...
    def outline(self, row: int) -> RecordOutline: ...


class Reader(Protocol):
    """The interface of a version's module, documented in `schemas.versions.v1`."""

    def manifest(self, values: Mapping[str, Any]) -> dict[str, Any]: ...
    def shard_schema(self, identity: Mapping[str, Any]) -> pa.Schema: ...
    def check_columns(self, path: Location, schema: pa.Schema) -> None: ...
    def record_text_columns(self, schema: pa.Schema, with_tokens: bool) -> list[str]: ...
    def rows(self, batch: pa.RecordBatch) -> Rows: ...


READERS: dict[int, Reader] = {1: v1, 2: v2, 3: v3}


def reader(where: object, version: object) -> Reader:
    """Return the reader of a version, as stated by a manifest (a number) or a shard (text).

    Raises VersionError for a version that is not read here, naming what can read it.
    """
    fault = version_fault(where, version)
    if fault:
        raise VersionError(fault)
    return READERS[int(str(version))]
