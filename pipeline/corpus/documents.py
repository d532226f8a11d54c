"""Corpus: usable documents in order, and a count of what was left out, by reason.

Rows become documents (or faults), documents pass the filters (`exclude`, `unique`), then `skip` and `limit` apply. A
pass is a pure function of the config and the files: the n-th document is always the same one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.config import CorpusConfig
from pipeline.corpus.chats import UnusableError, column, read_chat
from pipeline.corpus.key_set import KeySet
from pipeline.corpus.keys import KeyFinder
from pipeline.corpus.regions import ChatParts, TextParts, supervised_segments
from pipeline.corpus.row import FIRST, Goal, Row, RowPlace
from pipeline.corpus.rows import TOO_LONG, RowSource, written_folder
from pipeline.corpus.written import read_written, require_kind
from pipeline.runtime import log
from pipeline.tokenization.chat_template import Message
from pipeline.tokenization.conversation import Conversation, Excerpt
from schemas import ARITHMETIC
from schemas.record import Segment


@dataclass(frozen=True)
class Document:
    """A usable document.

    Attributes:
        text: valid UTF-8, not empty; for a chat, what the assistant says.
        messages: role and content of a chat's messages; None for plain text.
        conversation: the whole chat if it has more than that; else None.
        segments: the supervised bytes of plain text; None: all of them, and END.
        turns: numbers of a chat's messages that are supervised; None: all that the assistant says.
        has_end: END follows the last supervised turn of a chat; False for a turn that was cut off.
    """

    doc_id: str
    text: bytes
    messages: tuple[Message, ...] | None
    conversation: Conversation | None = None
    segments: tuple[Segment, ...] | None = None
    turns: tuple[int, ...] | None = None
    has_end: bool = True

    @property
    def texts(self) -> Iterator[bytes | TextParts | tuple[Message, ...] | ChatParts | Excerpt]:
        """Yield what a model with any template is evaluated on: the text or the chat, or the supervised parts of it.

        A chat with reasoning or calls is yielded turn by turn.
        """
        if self.segments is not None:
            yield TextParts(self.text, tuple((s.start, s.start + s.length) for s in self.segments))
            return
        if self.conversation is None:
            assert self.turns is None or self.messages is not None
            yield (self.messages or self.text) if self.turns is None else ChatParts(self.messages or (), self.turns)
            return
        done = 0
        for index in self.conversation.turns:
            if self.turns is None or index in self.turns:
                yield Excerpt(self.conversation.until(index + 1), index + 1 - done)
            done = index + 1


# What a row holds: its place; its document, or the reason why it is none; the keys by which filters know that, none
# without a filter; where it is, for messages. A plain tuple, as a named one takes a microsecond to make.
Found = tuple[RowPlace, Document | str, Set[bytes], str]
_NO_KEYS: frozenset[bytes] = frozenset()


class PlacedDocument(NamedTuple):
    """A document, and how to find it again without the corpus before it.

    Attributes:
        filtered: numbers of the rows that the filters (`exclude`, `unique`) left out since the document before; which
            ones they are is known only to a pass from the start.
    """

    document: Document
    place: RowPlace
    filtered: tuple[int, ...]


ASKED_FOR = _EXCLUDED, _DUPLICATE = "in an excluded corpus", "a duplicate"  # `corpus.exclude` and `corpus.unique`


class Corpus:
    """Documents of a recipe's corpus section; may be iterated any number of times.

    Attributes:
        counts: figures of the last full pass: `documents`, `bytes`, `skipped`, and `left out: <reason>`; empty before.
        first_places: place of the first row left out for each reason in the last pass: file and line, or row.
    """

    def __init__(self, config: CorpusConfig, arithmetic: int = ARITHMETIC, source: RowSource | None = None) -> None:
        """Resolve the sources, downloading pinned ones. Raises ValueError for an invalid source or pattern.

        Args:
            arithmetic: the dump's version of the arithmetic; it decides which rows of a file are documents.
            source: resolved before, to read some of its rows only.
        """
        self.config = config
        self.counts: dict[str, int] = {}
        self.first_places: dict[str, str] = {}
        if source is None and (folder := written_folder(config.source)) is not None:
            require_kind(folder, config)
        self.source = source or RowSource.resolve(config.source, config.split, config.max_row_bytes, arithmetic)
        self._finder = KeyFinder(config.key_pattern)
        self._excluded_keys: KeySet | None = None
        self._others = [
            Corpus(
                other if other.key_pattern else other.model_copy(update={"key_pattern": config.key_pattern}), arithmetic
            )
            for other in (config.exclude if source is None else ())
        ]

    def documents(self) -> Iterator[Document]:
        """Yield usable documents in order. Raises ValueError, with counts, if there is none."""
        return (placed.document for placed in self.placed())

    def placed(self, found: Iterable[Found] | None = None) -> Iterator[PlacedDocument]:
        """Yield the documents with their places. Raises as `documents` does.

        Args:
            found: what `found` yields, if someone else has read it.
        """
        counts: Counter[str] = Counter()
        self.first_places = {}
        excluded, seen = self._excluded(), KeySet()
        filtered: list[int] = []
        for place, document, keys, where in self.found() if found is None else found:
            reason = document if isinstance(document, str) else None
            if keys and not excluded.isdisjoint(keys):
                reason = _EXCLUDED
            elif keys and not seen.isdisjoint(keys):
                reason = _DUPLICATE
            if reason is not None or isinstance(document, str):
                counts[f"left out: {reason}"] += 1
                self.first_places.setdefault(str(reason), where)
                if keys:
                    filtered.append(place.number)
                continue
            if self.config.unique:
                seen.update(keys)
            if counts["skipped"] < self.config.skip:
                counts["skipped"] += 1
                continue
            counts["documents"] += 1
            counts["bytes"] += len(document.text)
            yield PlacedDocument(document, place, tuple(filtered))
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
        """Return a document's keys, 16 bytes each."""
        return self._finder.keys(text)

    def found(self, goal: Goal | None = None) -> Iterator[Found]:
        """Yield each row's document, whatever filters say of it, from the goal on."""
        needs_keys = self.config.unique or bool(self.config.exclude)
        for place, row in self.source.rows(goal):
            try:
                document = _document(row, self.config, place.number, self.source.is_written)
            except UnusableError as error:
                yield place, str(error), _NO_KEYS, row.where
            else:
                yield place, document, self.keys(document.text) if needs_keys else _NO_KEYS, row.where

    def reader(self) -> "DocumentReader":
        """Return a reader of documents by their places."""
        return DocumentReader(self.source, self.config)

    def _excluded(self) -> KeySet:
        if self._excluded_keys is None:
            self._excluded_keys = KeySet()
            for other in self._others:
                for document in other.documents():
                    self._excluded_keys.update(other.keys(document.text))
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
        self._has_said = False

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
                documents.append(_document(row, self._config, place.number, self._source.is_written))
            except UnusableError:
                continue
        if self._goal.read_through and not self._has_said:
            self._has_said = True
            log.info(
                f"{self._config.source}: a file is compressed, or not of lines, and is read from its start to reach "
                "documents in it"
            )
        return documents


def _document(row: Row, config: CorpusConfig, number: int, is_written: bool) -> Document:
    """Return a row's document. Raises UnusableError.

    Args:
        is_written: the row is of a corpus that `bld generate` wrote, and says what is supervised.
    """
    if row.fault is not None:
        raise UnusableError(row.fault)
    if is_written:
        assert row.columns is not None  # its files are Parquet
        found = read_written(row.columns, config)
        messages, conversation = found.chat or (None, None)
        content = _encoded(found.text, config.max_row_bytes)
        return Document(found.doc_id, content, messages, conversation, found.segments, found.turns, found.has_end)
    if row.text is not None:
        return _text_document(str(number), _decodable(row.text), row, config)
    assert row.columns is not None  # a row has columns, text or a fault
    doc_id = str(number) if config.id_field is None else _name(column(row.columns, config.id_field), config.id_field)
    if config.has_chats:
        chat = read_chat(row.columns, config)
        if not config.answered:
            text = "".join(message["content"] for message in chat.messages)
            return Document(doc_id, _encoded(text, config.max_row_bytes), *chat)
        turns = None if config.supervise is None else chat.last_turn
        return Document(doc_id, _encoded(chat.assistant_text, config.max_row_bytes), *chat, turns=turns)
    value = column(row.columns, config.field)
    if not isinstance(value, str):
        raise UnusableError(f"field {config.field!r} is not text")
    return _text_document(doc_id, _encoded(value, config.max_row_bytes), row, config)


def _text_document(doc_id: str, text: bytes, row: Row, config: CorpusConfig) -> Document:
    segments = None if config.supervise is None else supervised_segments(text, row.columns, config.supervise)
    return Document(doc_id, text, None, segments=segments)


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
