"""Windows of documents longer than the teacher's context, cut at character boundaries.

Each position is supervised once.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple


class WindowError(ValueError):
    """A document of which no window fits the budget, so that it cannot be dumped; other documents can."""


class Window(NamedTuple):
    """Bounds of a record in its document, in bytes.

    Bytes `start .. end` are the record; bytes `supervised .. end` are supervised, and END too if `has_end`.
    """

    start: int
    end: int
    supervised: int
    has_end: bool


def is_boundary(document: bytes, offset: int) -> bool:
    """Return whether a UTF-8 character starts at `offset`, or the document ends there."""
    return offset == len(document) or document[offset] & 0xC0 != 0x80


def cut_windows(
    document: bytes, token_lengths: list[int], count_tokens: Callable[[bytes], int], budget: int, overlap: int
) -> list[Window]:
    """Cut a document into windows of at most `budget` tokens.

    Each but the first has at least `overlap` tokens of context before what it supervises.

    Args:
        token_lengths: bytes of each token of the whole document's encoding, excluding the tokenizer's prefix.
        count_tokens: counts the tokens of some bytes, encoded; a window is encoded on its own, and may need more tokens
            than the same bytes took inside the document.
    Raises:
        WindowError: not even one character past the overlap fits, so that no cut makes progress.
    """
    if len(token_lengths) <= budget:
        return [Window(0, len(document), 0, True)]
    ends = [0, *accumulate(token_lengths)]
    windows: list[Window] = []
    start, done = 0, 0  # where the window starts; how far the document is supervised
    while done < len(document):
        # No more of the document's tokens than the budget fit; a fresh encoding seldom needs fewer.
        last = min(bisect_left(ends, start) + budget, len(ends) - 1)
        end = _last_fitting(document, start, done, ends[last], count_tokens, budget)
        windows.append(Window(start, end, done, end == len(document)))
        done = end
        context = bisect_right(ends, done) - 1 - overlap
        start = _character_start(document, ends[max(context, 0)])
    return windows


def _character_start(document: bytes, offset: int) -> int:
    """Return the last character boundary at or before `offset`.

    Tokens may end inside characters, so cuts do not follow tokens.
    """
    while not is_boundary(document, offset):
        offset -= 1
    return offset


def _last_fitting(
    document: bytes, start: int, done: int, end: int, count_tokens: Callable[[bytes], int], budget: int
) -> int:
    end = _character_start(document, end)
    while end > done:
        excess = count_tokens(document[start:end]) - budget
        if excess <= 0:
            return end
        end = _character_start(document, max(end - excess, done))  # every token has at least one byte
    raise WindowError(
        f"no window of {budget} tokens moves past byte {done} of the document; "
        "lower teacher.overlap_tokens or raise teacher.max_tokens"
    )
