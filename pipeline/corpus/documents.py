"""Corpus: usable documents in order, and a count of what was left out, by reason.

Rows become documents (or faults), documents pass the filters (`exclude`, `unique`), then `skip` and `limit` apply. A
pass is a pure function of the config and the files: the n-th document is always the same one.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.config import CorpusConfig
from pipeline.corpus.chats import UnusableError, column, read_chat
from pipeline.corpus.row import FIRST, Goal, Row, RowPlace
from pipeline.corpus.rows import TOO_LONG, RowSource
from pipeline.tokenization.chat_template import Message
from pipeline.tokenization.conversation import Conversation, Excerpt
from schemas import ARITHMETIC


@dataclass(frozen=True)
class Document:
    """A usable document.

    Attributes:
        text: valid UTF-8, not empty; for a chat, what the assistant says.
        messages: role and content of a chat's messages; None for plain text.
        conversation: the whole chat if it has more than that; else None.
    """

    doc_id: str
    text: bytes
    messages: tuple[Message, ...] | None
    conversation: Conversation | None = None

    @property
    def texts(self) -> Iterator[bytes | tuple[Message, ...] | Excerpt]:
        """Yield what a model with any template is evaluated on: the text, or the chat.

        A chat with reasoning or calls is yielded turn by turn.
        """
        if self.conversation is None:
            yield self.messages or self.text
            return
        done = 0
        for index in self.conversation.turns:
            yield Excerpt(self.conversation.until(index + 1), index + 1 - done)
            done = index + 1


class PlacedDocument(NamedTuple):
    """A document, and how to find it again without the corpus before it.

    Attributes:
        filtered: numbers of the rows that the filters (`exclude`, `unique`) left out since the document before; which
            ones they are is known only to a pass from the start.
    """

    document: Document
    place: RowPlace
    filtered: tuple[int, ...]


_EXCLUDED, _DUPLICATE = "in an excluded corpus", "a duplicate"


class Corpus:
    """Documents of a recipe's corpus section; may be iterated any number of times.

    Attributes:
        counts: figures of the last full pass: `documents`, `bytes`, `skipped`, and `left out: <reason>`; empty before.
        first_places: place of the first row left out for each reason in the last pass: file and line, or row.
    """

    def __init__(self, config: CorpusConfig, arithmetic: int = ARITHMETIC) -> None:
        """Resolve the sources, downloading pinned ones. Raises ValueError for an invalid source or pattern.

        Args:
            arithmetic: the dump's version of the arithmetic; it decides which rows of a file are documents.
        """
        self.config = config
        self.counts: dict[str, int] = {}
        self.first_places: dict[str, str] = {}
        self._source = RowSource.resolve(config.source, config.split, config.max_row_bytes, arithmetic)
        self._pattern = _compiled(config.key_pattern)
        self._excluded_keys: frozenset[bytes] | None = None
        self._others = [
            Corpus(
                other if other.key_pattern else other.model_copy(update={"key_pattern": config.key_pattern}), arithmetic
            )
            for other in config.exclude
        ]

    def documents(self) -> Iterator[Document]:
        """Yield usable documents in order. Raises ValueError, with counts, if there is none."""
        return (placed.document for placed in self.placed())

    def placed(self) -> Iterator[PlacedDocument]:
        """Yield the documents with their places. Raises as `documents` does."""
        counts: Counter[str] = Counter()
        self.first_places = {}
        filtered: list[int] = []
        for place, item in self._filtered():
            if isinstance(item, str):
                reason, where = item.split("\0")
                counts[f"left out: {reason}"] += 1
                self.first_places.setdefault(reason, where)
                if reason in (_EXCLUDED, _DUPLICATE):
                    filtered.append(place.number)
                continue
            if counts["skipped"] < self.config.skip:
                counts["skipped"] += 1
                continue
            counts["documents"] += 1
            counts["bytes"] += len(item.text)
            yield PlacedDocument(item, place, tuple(filtered))
            filtered = []
            if counts["documents"] == self.config.limit:
                break
        self.counts = {key: number for key, number in counts.items() if number}
        if not counts["documents"]:
            first = next((f"; the first left out: {where}: {why}" for why, where in self.first_places.items()), "")
            malformed = "left out: malformed JSON" in counts
            json = "JSON is read as one object a line, or as one array of objects. " if malformed else ""
            raise ValueError(
                f"{self.config.source} yields no usable document (field {self.config.field!r}): "
                f"{self.counts or 'it is empty'}{first}. {json}Check corpus.field, corpus.skip and the filters."
            )

    def keys(self, text: bytes) -> set[bytes]:
        """Return a document's keys, 16 bytes each: its named groups, or the whole text without a match."""
        match = self._pattern.match(text.decode("utf-8")) if self._pattern else None
        named = match.groupdict() if match else {}
        groups = {name: value for name, value in named.items() if value} or {"": text.decode("utf-8")}
        return {hashlib.blake2b(f"{name}\0{value}".encode(), digest_size=16).digest() for name, value in groups.items()}

    def _filtered(self) -> Iterator[tuple[RowPlace, Document | str]]:
        """Yield each row's place, and its document if that passes the filters; else `reason NUL place`."""
        excluded = self._excluded()
        seen: set[bytes] = set()
        for place, row in self._source.rows():
            try:
                document = _document(row, self.config, place.number)
            except UnusableError as error:
                yield place, f"{error}\0{row.where}"
                continue
            keys = self.keys(document.text) if excluded or self.config.unique else set()
            if not keys.isdisjoint(excluded):
                yield place, f"{_EXCLUDED}\0{row.where}"
            elif self.config.unique and not keys.isdisjoint(seen):
                yield place, f"{_DUPLICATE}\0{row.where}"
            else:
                if self.config.unique:
                    seen |= keys
                yield place, document

    def reader(self) -> "DocumentReader":
        """Return a reader of documents by their places."""
        return DocumentReader(self._source, self.config)

    def _excluded(self) -> frozenset[bytes]:
        if self._excluded_keys is None:
            self._excluded_keys = frozenset(
                key for other in self._others for document in other.documents() for key in other.keys(document.text)
            )
        return self._excluded_keys


class DocumentReader:
    """Reader of runs of documents whose places a pass over the corpus has noted.

    Runs in the corpus's order are read fastest: a compressed file, or an array of JSON, is then read once.
    """

    def __init__(self, source: RowSource, config: CorpusConfig) -> None:
        self._source, self._config = source, config
        self._goal = Goal()
        self._rows = source.rows(self._goal)
        self._next = FIRST  # the row after the last one read

    def read(self, start: RowPlace, number: int, filtered: Set[int]) -> list[Document]:
        """Return that many documents from a row on, or fewer if the corpus ends before.

        Args:
            filtered: numbers of the rows among them that the filters left out.
        """
        if start.file == self._next.file and start.row >= self._next.row:
            self._goal.place = start
        else:
            self._goal = Goal(start)
            self._rows = self._source.rows(self._goal)
        documents: list[Document] = []
        while len(documents) < number and (found := next(self._rows, None)) is not None:
            place, row = found
            self._next = place._replace(row=place.row + 1)
            if place.number in filtered:
                continue
            try:
                documents.append(_document(row, self._config, place.number))
            except UnusableError:
                continue
        return documents


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"key_pattern {pattern!r} is not a regular expression: {error}") from error
    if not compiled.groupindex:
        raise ValueError(
            f"key_pattern {pattern!r} names no group; name the parts that make up a key, as in (?P<title>...)"
        )
    return compiled


def _document(row: Row, config: CorpusConfig, number: int) -> Document:
    if row.fault is not None:
        raise UnusableError(row.fault)
    if row.text is not None:
        return Document(str(number), _decodable(row.text), None)
    assert row.columns is not None  # a row has columns, text or a fault
    doc_id = str(number) if config.id_field is None else _name(column(row.columns, config.id_field), config.id_field)
    if config.has_chats:
        chat = read_chat(row.columns, config)
        return Document(doc_id, _encoded(chat.assistant_text, config.max_row_bytes), *chat)
    value = column(row.columns, config.field)
    if not isinstance(value, str):
        raise UnusableError(f"field {config.field!r} is not text")
    return Document(doc_id, _encoded(value, config.max_row_bytes), None)


def _name(value: Any, field: str) -> str:
    """Return a document's id from a text or a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise UnusableError(f"field {field!r} is neither text nor a whole number")
    return _encoded(value).decode()


def _encoded(text: str, max_bytes: int | None = None) -> bytes:
    if not text:
        raise UnusableError("empty text")
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableError("half of a surrogate pair") from error
    if max_bytes is not None and len(content) > max_bytes:
        raise UnusableError(TOO_LONG)
    return content


def _decodable(content: bytes) -> bytes:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableError("not valid UTF-8") from error
    if not content:
        raise UnusableError("empty text")
    return content
