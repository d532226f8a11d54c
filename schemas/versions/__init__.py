"""Readers of the format: a module for each version that is read, which gives today's records and manifest fields.

May import `schemas.columns`, `schemas.record` and `schemas.storage`; a version's module stays when a later one comes.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import pyarrow as pa

from schemas import version_fault
from schemas.record import Question, Record
from schemas.storage.locations import Location
from schemas.versions import v1


class Rows(Protocol):
    """Some rows of a shard."""

    num_rows: int

    def record(self, row: int) -> Record: ...
    def question(self, row: int) -> Question: ...


class Reader(Protocol):
    """What a version's module has; `schemas.versions.v1` says what each is for."""

    def manifest(self, values: Mapping[str, Any]) -> dict[str, Any]: ...
    def shard_schema(self, identity: Mapping[str, Any]) -> pa.Schema: ...
    def check_columns(self, path: Location, schema: pa.Schema) -> None: ...
    def question_columns(self, schema: pa.Schema, with_tokens: bool) -> list[str]: ...
    def rows(self, batch: pa.RecordBatch) -> Rows: ...


READERS: dict[int, Reader] = {1: v1}


def reader(where: object, version: object) -> Reader:
    """Return the reader of a version, as a manifest (a number) or a shard (text) gives it.

    Raises ValueError for a version that is not read, naming what reads it.
    """
    fault = version_fault(where, version)
    if fault:
        raise ValueError(fault)
    return READERS[int(str(version))]
