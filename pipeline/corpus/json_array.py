"""The elements of a JSON array, one after another, as the file is read: none is held that is longer than allowed.

Only the structure is looked at (strings, brackets, commas); what an element says is for `json` to find out. Where it is
broken, no element is guessed: the reader is told, and what follows is read as lines, so that lines of JSON whose first
begins with a stray bracket lose that one alone.
"""

import re
from collections.abc import Iterator
from typing import IO

BROKEN = b"{"  # stands for an element that does not end as one; malformed JSON to whoever parses it
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\\n]')  # of a string, which holds no plain line end
_CLOSES = {b"}": b"{", b"]": b"["}
_CHUNK_BYTES = 1 << 20


def is_array(head: bytes) -> bool:
    """Whether a file that starts so is an array of objects; a line of JSON never does."""
    return re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", head) is not None


class JsonArray:
    """A file that `is_array`, read once.

    Attributes:
        rest: what was read of the file behind the array's end, or behind the line where it broke; known once the
            elements are through.
        ends: whether it has an end; then too.
    """

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self.rest, self.ends = b"", False
        self._file, self._max_bytes = file, max_bytes
        self._chunk, self._at = b"", 0  # what is being read, and how far it has been looked at
        self._start = 0  # of the element in the chunk
        self._kept: list[bytes] | None = []  # the element's bytes of earlier chunks; None: too many

    def elements(self) -> Iterator[bytes | None]:
        """Each element's bytes, white space around it included; None for one that is too long; `BROKEN` at the end of a
        broken array.
        """
        open_brackets: list[bytes] = []
        in_string = is_whole = False
        self._next(_OUTSIDE)  # the bracket that opens it
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
        """What the pattern finds next; None at the file's end."""
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
        """What lies before the character that was just found."""
        self._keep(self._chunk[self._start : self._at - 1])
        kept, self._kept, self._start = self._kept, [], self._at
        return None if kept is None else b"".join(kept)

    def _to_next_line(self) -> None:
        """Leave in `rest` what follows the line of the character that was just found, or that line, where nothing is
        before it.
        """
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
