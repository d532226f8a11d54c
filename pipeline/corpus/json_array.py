"""Streaming reader of the elements of a JSON array; no element longer than allowed is held in memory.

Only the structure is parsed (strings, brackets, commas); elements are left to `json`. A broken array is reported
without guessing at its elements, and the rest is read as lines. JSON lines whose first line starts with a stray bracket
therefore lose only that line.
"""

import re
from collections.abc import Iterator
from typing import IO

BROKEN = b"{"  # in place of an element that does not end properly; malformed JSON to any parser
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\\n]')  # inside a string, which holds no literal line end
_CLOSES = {b"}": b"{", b"]": b"["}
_CHUNK_BYTES = 1 << 20


def is_array(head: bytes) -> bool:
    """Return whether a file with this head is an array of objects; a line of JSON never starts so."""
    return re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", head) is not None


class JsonArray:
    """A file that `is_array`, read once.

    Attributes:
        rest: bytes read beyond the array's end, or beyond the line where it broke; valid after the last element.
        ends: whether the array has an end; valid after the last element.
    """

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self.rest, self.ends = b"", False
        self._file, self._max_bytes = file, max_bytes
        self._chunk, self._at = b"", 0  # the current chunk, and how far it has been scanned
        self._start = 0  # of the element in the chunk
        self._kept: list[bytes] | None = []  # the element's bytes of earlier chunks; None: too many

    def elements(self) -> Iterator[bytes | None]:
        """Yield each element's bytes, including white space around it.

        None stands for an element that is too long; `BROKEN` ends a broken array.
        """
        open_brackets: list[bytes] = []
        in_string = is_whole = False
        self._next(_OUTSIDE)  # the opening bracket
        self._kept, self._start = [], self._at
        while (found := self._next(_INSIDE if in_string else _OUTSIDE)) is not None:
            if in_string:
                if found == b"\\":
                    self._skip_one()
                elif found == b"\n":
                    self.rest = self._chunk[self._at :]
                    yield BROKEN
                    return
                else:
                    in_string = False
            elif found == b"," and not open_brackets:
                yield self._element()
                is_whole = False
            elif found == b"]" and not open_brackets:
                last = self._element()
                if last is None or last.strip():
                    yield last
                self.rest, self.ends = self._chunk[self._at :], True
                return
            elif found in _CLOSES:
                if not open_brackets or open_brackets.pop() != _CLOSES[found]:
                    break
                is_whole = not open_brackets
            elif found != b",":
                if is_whole:  # a second value without a comma before it
                    break
                in_string = found == b'"'
                if not in_string:
                    open_brackets.append(found)
        yield BROKEN
        self._to_next_line()

    def _next(self, pattern: re.Pattern[bytes]) -> bytes | None:
        """Find the next match of the pattern; None at the file's end."""
        while (match := pattern.search(self._chunk, self._at)) is None:
            self._keep(self._chunk[self._start :])
            if not self._read():
                return None
        self._at = match.end()
        return match[0]

    def _skip_one(self) -> None:
        if self._at == len(self._chunk):
            self._keep(self._chunk[self._start :])
            self._read()
        self._at += 1

    def _read(self) -> bool:
        self._chunk, self._at, self._start = self._file.read(_CHUNK_BYTES), 0, 0
        return bool(self._chunk)

    def _keep(self, part: bytes) -> None:
        if self._kept is not None:
            self._kept.append(part)
            if sum(map(len, self._kept)) > self._max_bytes:
                self._kept = None

    def _element(self) -> bytes | None:
        """Return the bytes before the character just found."""
        self._keep(self._chunk[self._start : self._at - 1])
        kept, self._kept, self._start = self._kept, [], self._at
        return None if kept is None else b"".join(kept)

    def _to_next_line(self) -> None:
        """Set `rest` to what follows the line of the character just found, or to that line if it starts there."""
        if not self._chunk:
            return
        kept = self._kept[-1] if self._kept else b""
        before = (kept + self._chunk[self._start : self._at - 1]).rstrip(b" \t\r")
        if before.endswith(b"\n"):
            self.rest = self._chunk[self._at - 1 :]
            return
        while (end := self._chunk.find(b"\n", self._at)) < 0:
            if not self._read():
                return
        self.rest = self._chunk[end + 1 :]
