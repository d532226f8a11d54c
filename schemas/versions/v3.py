"""Version 3 of the format: bld 0.2 and later, for every new dump.

Holds the records of version 1, and the alternatives of version 2 where a dump has them, in fewer bytes
(`schemas.stored_entries`); `document` is text to every tool.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from schemas import stored_entries
from schemas.columns import columns_of
from schemas.columns import shard_schema as schema_of_version
from schemas.record import Record
from schemas.storage.locations import Location
from schemas.token_alternatives import COLUMNS as TOKEN_COLUMNS
from schemas.versions import v1, v2
from schemas.versions.v1 import manifest, record_text_columns

VERSION = 3
_COLUMNS = columns_of(VERSION)
_PLAIN = frozenset(column.name for column in _COLUMNS if column.stored_where is None)

__all__ = ["VERSION", "Rows", "check_columns", "manifest", "record_text_columns", "rows", "shard_schema"]


def shard_schema(identity: Mapping[str, Any]) -> pa.Schema:
    """Return the columns that the shards of a dump with that identity must have."""
    return schema_of_version(identity, VERSION)


def check_columns(path: Location, schema: pa.Schema) -> None:
    """Raise ValueError if a required column is missing, or a column's type is not the format's."""
    has_tokens = any(name in schema.names for name in TOKEN_COLUMNS)
    v1.check_columns(path, schema, _COLUMNS, required=TOKEN_COLUMNS if has_tokens else ())


def rows(batch: pa.RecordBatch) -> "Rows":
    """Return the rows of a batch."""
    return Rows(batch, _COLUMNS)


class Rows(v2.Rows):
    """A batch of Arrow rows, each converted to a record on request.

    What is made of several columns is made for the whole batch when the first record is requested.
    """

    def __init__(self, batch: pa.RecordBatch, columns: tuple[Any, ...] = _COLUMNS) -> None:
        super().__init__(batch, columns)
        if "document" in self._scalars:  # outlines lack it
            self._text = self._scalars["document"]
            self._scalars["document"] = self._text.cast(pa.binary())
        self._disordered: frozenset[int] = frozenset()  # rows
        self._is_sound = False  # no row has a fault, which is found for all of them at once

    def faults(self, row: int, record: Record) -> list[str]:
        if self._is_sound:
            return []
        found = ["other_symbols of a position do not ascend, or have the document's"] if row in self._disordered else []
        return super().faults(row, record) + found

    def _cells(self, row: int) -> dict[str, np.ndarray]:
        if "other_counts" in self._lists:
            made = self._made()
            for name in stored_entries.STORED:
                del self._lists[name]
            self._lists.update(made.fields)
            self._disordered = made.disordered
        return super()._cells(row)

    def _made(self) -> stored_entries.Made:
        texts, lists = self._between(0, self.num_rows)
        if stored_entries.fit_together(texts, lists):
            made = stored_entries.made_fields(texts, lists)
            self._is_sound = not made.disordered and stored_entries.are_log_probs(lists) and self._is_plain_text()
            return made
        # One by one; of damaged records so that their faults are found.
        parts: dict[str, list[np.ndarray]] = {name: [] for name in stored_entries.MADE}
        wrong: set[int] = set()
        for row in range(self.num_rows):
            texts, lists = self._between(row, row + 1)
            if stored_entries.fit_together(texts, lists):
                made = stored_entries.made_fields(texts, lists)
                fields = {name: values for name, (_, values) in made.fields.items()}
                wrong |= {row} if made.disordered else set()
            else:
                fields = stored_entries.unfit_fields({name: values for name, (_, values) in lists.items()})
            for name, values in fields.items():
                parts[name].append(values)
        whole = {name: (np.cumsum([0, *map(len, of_rows)]), np.concatenate(of_rows)) for name, of_rows in parts.items()}
        return stored_entries.Made(whole, frozenset(wrong))

    def _is_plain_text(self) -> bool:
        """Tell whether all rows are windows of plain text in UTF-8, without messages and alternatives of tokens."""
        others = [len(self._lists[name][1]) for name in ("message_roles", "message_lengths") if name in self._lists]
        try:
            self._text.validate(full=True)
        except pa.ArrowInvalid:
            return False
        starts = self._scalars["window_start"].to_numpy()
        return not any(others) and (starts >= 0).all() and {*self._lists, *self._scalars} <= _PLAIN

    def _between(self, first: int, last: int) -> tuple[stored_entries.Texts, stored_entries.Lists]:
        """Return the documents and lists of some rows, with offsets from 0."""
        document = self._scalars["document"][first:last]
        _, offsets, data = document.buffers()
        at = np.frombuffer(offsets, dtype=np.int32)[document.offset : document.offset + len(document) + 1]
        whole = np.frombuffer(b"" if data is None else data, dtype=np.uint8)
        lists = {
            name: (of_list[first : last + 1] - of_list[first], values[of_list[first] : of_list[last]])
            for name, (of_list, values) in self._lists.items()
        }
        return stored_entries.Texts(at - at[0], whole[at[0] : at[-1]]), lists
