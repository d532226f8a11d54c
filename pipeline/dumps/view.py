"""Documents of a dump and their positions. Shards are streamed, one document at a time."""

import difflib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from pipeline.dumps.positions import Position, positions
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_rows, read_shard, window_names
from schemas.storage.locations import Location


@dataclass(frozen=True)
class DumpDocument:
    """A document with all its windows."""

    doc_id: str
    records: tuple[Record, ...]

    @property
    def text(self) -> bytes:
        """Return the document's bytes; windows may overlap, and agree where they do."""
        text = bytearray()
        for record in self.records:
            text[record.window_start :] = record.document
        return bytes(text)

    @property
    def messages(self) -> list["DumpMessage"]:
        """Return a chat's messages in order; empty for plain text.

        Windows overlap by whole messages, and agree where they do.
        """
        messages: list[DumpMessage] = []
        for record in self.records:
            previous_end = messages[-1].end if messages else -1
            messages += [message for message in record_messages(record) if message.end > previous_end]
        return messages

    def positions(self) -> Iterator[Position]:
        """Yield the positions of all records, in order."""
        for record in self.records:
            yield from positions(record)


class DumpMessage(NamedTuple):
    """A message of a chat: its role, its first byte in the document, and its content."""

    role: str
    start: int
    content: bytes

    @property
    def end(self) -> int:
        """Return the byte offset after the message."""
        return self.start + len(self.content)


def record_messages(record: Record) -> list[DumpMessage]:
    """Return the messages of a chat's record; empty for plain text."""
    starts = np.cumsum([0, *record.message_lengths]).tolist()
    return [
        DumpMessage(role, record.window_start + start, record.document[start:end])
        for role, (start, end) in zip(record.message_roles, pairwise(starts), strict=True)
    ]


def records(dump: Location) -> Iterator[Record]:
    """Yield the records of the shards that exist, in order. Raises ValueError if the folder is not a dump."""
    for path in complete_shards(dump):
        yield from read_shard(path)


def complete_shards(dump: Location) -> list[Location]:
    """Return the planned shards that exist, in order."""
    manifest = Manifest.load(dump)
    missing = {shard.index for shard in manifest.missing(dump)}
    return [shard.path(dump) for shard in manifest.shards if shard.index not in missing]


def documents(dump: Location) -> Iterator[DumpDocument]:
    """Yield the documents of the shards that exist, in order.

    A window that starts at 0 starts a document, whatever its name.
    """
    windows: list[Record] = []
    for record in records(dump):
        if windows and (record.window_start == 0 or record.doc_id != windows[0].doc_id):
            yield DumpDocument(windows[0].doc_id, tuple(windows))
            windows = []
        windows.append(record)
    if windows:
        yield DumpDocument(windows[0].doc_id, tuple(windows))


class _Rows(NamedTuple):
    """A document's rows in the shards that have them."""

    doc_id: str
    rows: tuple[tuple[Location, int], ...]

    def read(self) -> DumpDocument:
        shards = groupby(self.rows, key=lambda row: row[0])
        return DumpDocument(
            self.doc_id, tuple(r for path, rows in shards for r in read_rows(path, [n for _, n in rows]))
        )


def _rows_of_documents(dump: Location) -> Iterator[_Rows]:
    """Yield the rows of each document of `documents`; reads names and windows only."""
    doc_id: str | None = None
    rows: list[tuple[Location, int]] = []
    for path in complete_shards(dump):
        for row, (name, start) in enumerate(window_names(path)):
            if doc_id is not None and (start == 0 or name != doc_id):
                yield _Rows(doc_id, tuple(rows))
                rows = []
            doc_id = name
            rows.append((path, row))
    if doc_id is not None:
        yield _Rows(doc_id, tuple(rows))


def find_document(dump: Location, doc_id: str | None, nth: int = 1) -> DumpDocument:
    """Return the `nth` document of that name, or of all if it is None; reads only the row groups that it lies in.

    Raises ValueError, with similar ids, if there is none.
    """
    num_found = 0
    for document in _rows_of_documents(dump):
        num_found += doc_id is None or document.doc_id == doc_id
        if num_found == nth:
            return document.read()
    if num_found:
        name = "documents" if doc_id is None else f"documents named {doc_id!r}"
        raise ValueError(f"{dump} holds {num_found} {name}; there is no --nth {nth}")
    if doc_id is None:
        raise ValueError(f"{dump} holds no document yet: run `bld teacher` first")
    ids = (document.doc_id for document in _rows_of_documents(dump))
    near = heapq.nlargest(3, ((difflib.SequenceMatcher(None, doc_id, name).ratio(), name) for name in ids))
    names = ", ".join(dict.fromkeys(repr(name) for _, name in near)) or "none: there is no shard yet"
    raise ValueError(f"{dump} holds no document {doc_id!r}; the most similar ids: {names}")


def number_named(dump: Location, doc_id: str) -> int:
    """Count the documents of that name; reads names and windows only."""
    return sum(name == (doc_id, 0) for path in complete_shards(dump) for name in window_names(path))
