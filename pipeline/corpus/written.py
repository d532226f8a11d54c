"""Rows of a corpus that `bld generate` wrote: its texts or chats, and what of them a model wrote."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config import CorpusConfig
from pipeline.corpus.chats import Chat, UnusableError, read_chat
from pipeline.corpus.regions import NOTHING, supervised_segments
from pipeline.tokenization.chat_template import ASSISTANT
from schemas.record import Segment
from schemas.storage.locations import Location
from schemas.text_corpus import NAMES, TextManifest, segments_of

_ELSEWHERE = "damaged: what it says that a model wrote is no part of it"


class WrittenRow(NamedTuple):
    """Content of a row.

    Attributes:
        segments: the supervised parts of plain text.
        turns: numbers of a chat's messages that are supervised.
        has_end: see `pipeline.corpus.documents.Document`.
    """

    doc_id: str
    text: str
    chat: Chat | None
    segments: tuple[Segment, ...] | None
    turns: tuple[int, ...] | None
    has_end: bool


def require_kind(folder: Location, config: CorpusConfig) -> None:
    """Raise ValueError if a written corpus holds chats and the recipe reads text, or the reverse."""
    holds_chats = TextManifest.load(folder).has_chats
    if holds_chats and not config.has_chats:
        raise ValueError(f"{folder} holds chats: set corpus.field: messages")
    if not holds_chats and (config.has_chats or config.field != "text"):
        raise ValueError(f"{folder} holds plain text: set corpus.field: text, and no corpus.messages")


def read_written(columns: Mapping[str, Any], config: CorpusConfig) -> WrittenRow:
    """Read a row. Raises UnusableError, as for a row of another corpus."""
    if lacking := sorted(NAMES - columns.keys()):
        raise UnusableError(f"damaged: it has no {lacking[0]}")
    doc_id, has_end = str(columns["doc_id"]), bool(columns["is_finished"])
    if not config.has_chats:
        text = str(columns["text"])
        written = _within(columns, len(text.encode()))
        if config.supervise is not None:
            selected = supervised_segments(text.encode(), columns, config.supervise)
            written = tuple(_common(written, selected))
            if not written:
                raise UnusableError(NOTHING)
        return WrittenRow(doc_id, text, None, written, None, True)
    messages = [
        {key: value for key, value in message.items() if value or key in ("role", "content")}
        for message in columns["messages"]
    ]
    chat = read_chat({**columns, "messages": messages}, config)
    turns = tuple(columns["supervised_messages"])
    if any(turn not in range(len(messages)) or messages[turn]["role"] != ASSISTANT for turn in turns):
        raise UnusableError(_ELSEWHERE)
    return WrittenRow(doc_id, chat.assistant_text, chat, None, turns, has_end)


def _within(columns: Mapping[str, Any], num_bytes: int) -> tuple[Segment, ...]:
    """Return the supervised parts of a text of so many bytes. Raises UnusableError if they are not parts of it."""
    try:
        segments = segments_of(columns)
    except ValueError:  # as many starts as lengths
        raise UnusableError(_ELSEWHERE) from None
    end = 0
    for segment in segments:
        if segment.start < end or segment.length < 0:
            raise UnusableError(_ELSEWHERE)
        end = segment.start + segment.length
    if end > num_bytes:
        raise UnusableError(_ELSEWHERE)
    return segments


def _common(written: Sequence[Segment], selected: Sequence[Segment]) -> list[Segment]:
    """Return the parts of what was written that are selected, too."""
    return [
        Segment(start, end - start, one.has_end and end == one.start + one.length)
        for one in written
        for other in selected
        if (start := max(one.start, other.start)) < (end := min(one.start + one.length, other.start + other.length))
    ]
