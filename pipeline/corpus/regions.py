"""Supervised regions of plain text: the bytes of a document that are learned, as segments."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import SuperviseConfig
from pipeline.corpus.chats import UnusableError, column
from pipeline.tokenization.chat_template import Message
from schemas.record import Segment


class TextParts(NamedTuple):
    """A text of which some parts are supervised.

    Attributes:
        spans: their bytes, each `start .. end`; ascending.
    """

    text: bytes
    spans: tuple[tuple[int, int], ...]


class ChatParts(NamedTuple):
    """A chat of which some turns are supervised.

    Attributes:
        turns: numbers of their messages.
    """

    messages: tuple[Message, ...]
    turns: tuple[int, ...]


_GROUP = "supervised"
NOTHING = "corpus.supervise selects nothing of it"


def supervised_segments(text: bytes, columns: Mapping[str, Any] | None, config: SuperviseConfig) -> tuple[Segment, ...]:
    """Return the segments of a text that are learned. The one that reaches its end has the END after it.

    Args:
        columns: the row's; None for a text file.
    Raises:
        UnusableError: there is none, or the column's ranges are not such.
    """
    ranges = _matches(text, config.pattern) if config.pattern is not None else _ranges(columns, config.field, len(text))
    segments = tuple(Segment(start, end - start, end == len(text)) for start, end in _joined(ranges))
    if not segments:
        raise UnusableError(NOTHING)
    return segments


def _matches(text: bytes, pattern: str) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of a pattern's matches, ascending; groups in look-arounds may overlap."""
    compiled = _compiled(pattern)
    group: int | str = _GROUP if _GROUP in compiled.groupindex else 0
    characters = text.decode("utf-8")
    spans = sorted(match.span(group) for match in compiled.finditer(characters) if match[group])
    if spans:
        codes = np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
        sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        byte_of = np.append(0, sizes.cumsum())
        yield from ((int(byte_of[start]), int(byte_of[end])) for start, end in spans)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _ranges(columns: Mapping[str, Any] | None, field: str | None, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a column. Raises UnusableError for anything but ascending ranges within the text."""
    assert field is not None  # the section has a pattern or a field
    values = column(columns or {}, field)
    if not isinstance(values, list):
        raise UnusableError(f"field {field!r} is not a list of byte ranges")
    before = 0
    for value in values:
        pair = [value["start"], value["end"]] if isinstance(value, dict) and value.keys() == {"start", "end"} else value
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(offset) is int for offset in pair):
            raise UnusableError(f"field {field!r} holds something else than pairs of whole numbers, start and end")
        start, end = pair
        if not before <= start <= end <= num_bytes:
            raise UnusableError(f"field {field!r} holds ranges that overlap, descend or lie outside the text")
        before = end
        yield start, end


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ascending ranges without empty ones, those that touch or overlap as one."""
    start = end = 0
    for first, last in ranges:
        if first > end:
            if end > start:
                yield start, end
            start = first
        elif start == end:
            start = first
        end = max(end, last)
    if end > start:
        yield start, end
