"""What a dump says, document by document and position by position. Shards are streamed, a document at a time."""

import difflib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.dumps.positions import Position, positions
from schemas import dump_files
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_shard, window_names
from schemas.storage.locations import Location, names


@dataclass(frozen=True)
class DumpDocument:
    """A document with all its windows."""

    doc_id: str
    records: tuple[Record, ...]

    @property
    def text(self) -> bytes:
        """The document's bytes; windows overlap, and agree where they do."""
        text = bytearray()
        for record in self.records:
            text[record.window_start :] = record.document
        return bytes(text)

    @property
    def messages(self) -> list["Said"]:
        """Of a chat, its messages in order; empty for plain text. Windows overlap by whole messages, and agree where
        they do.
        """
        messages: list[Said] = []
        for record in self.records:
            heard = messages[-1].end if messages else -1
            messages += [message for message in said(record) if message.end > heard]
        return messages

    def positions(self) -> Iterator[Position]:
        for record in self.records:
            yield from positions(record)


class Said(NamedTuple):
    """A message of a chat: who says it, from which byte of the document on, and what."""

    role: str
    start: int
    content: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.content)


def said(record: Record) -> list[Said]:
    """The messages of a record that is a chat; empty for plain text."""
    starts = np.cumsum([0, *record.message_lengths]).tolist()
    return [
        Said(role, record.window_start + start, record.document[start:end])
        for role, (start, end) in zip(record.message_roles, pairwise(starts), strict=True)
    ]


def records(dump: Location) -> Iterator[Record]:
    """The records of the shards that exist, in order. Raises ValueError where the folder is not a dump."""
    for path in complete_shards(dump):
        yield from read_shard(path)


def complete_shards(dump: Location) -> list[Location]:
    """The planned shards that exist, in order."""
    there = names(dump / dump_files.SHARDS)
    return [path for path in (shard.path(dump) for shard in Manifest.load(dump).shards) if path.name in there]


def documents(dump: Location) -> Iterator[DumpDocument]:
    """The documents of the shards that exist, in order. A window that starts at 0 starts a document, whatever its
    name.
    """
    windows: list[Record] = []
    for record in records(dump):
        if windows and (record.window_start == 0 or record.doc_id != windows[0].doc_id):
            yield DumpDocument(windows[0].doc_id, tuple(windows))
            windows = []
        windows.append(record)
    if windows:
        yield DumpDocument(windows[0].doc_id, tuple(windows))


def find_document(dump: Location, doc_id: str | None, nth: int = 1) -> DumpDocument:
    """The `nth` document of that name; with None of all. Raises ValueError, naming near ids, where there is none."""
    found = 0
    for document in documents(dump):
        found += doc_id is None or document.doc_id == doc_id
        if found == nth:
            return document
    if found:
        name = "documents" if doc_id is None else f"documents named {doc_id!r}"
        raise ValueError(f"{dump} holds {found} {name}; --nth {nth} is none of them")
    if doc_id is None:
        raise ValueError(f"{dump} holds no document yet: run `bld teacher` first")
    ids = (record.doc_id for record in records(dump))
    near = heapq.nlargest(3, ((difflib.SequenceMatcher(None, doc_id, name).ratio(), name) for name in ids))
    names = ", ".join(dict.fromkeys(repr(name) for _, name in near)) or "none: no shard is there yet"
    raise ValueError(f"{dump} holds no document {doc_id!r}; the nearest ids: {names}")


def number_named(dump: Location, doc_id: str) -> int:
    """How many documents have that name; reads names and windows only."""
    return sum(name == (doc_id, 0) for path in complete_shards(dump) for name in window_names(path))
