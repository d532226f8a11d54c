"""Documents longer than the teacher's context, cut into windows at character boundaries; each position is supervised
once.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple


class WindowError(ValueError):
    """No window of a document fits the budget, so that it cannot be dumped; other documents can."""


class Window(NamedTuple):
    """Bytes `start .. end` of a document are the record; its bytes `supervised .. end` are supervised, with END if
    `has_end`.
    """

    start: int
    end: int
    supervised: int
    has_end: bool


def is_boundary(document: bytes, offset: int) -> bool:
    """Whether a UTF-8 character starts at `offset`, or the document ends there."""
    return offset == len(document) or document[offset] & 0xC0 != 0x80


def cut_windows(
    document: bytes, token_lengths: list[int], count_tokens: Callable[[bytes], int], budget: int, overlap: int
) -> list[Window]:
    """Windows of at most `budget` tokens, each but the first with at least `overlap` tokens of context before what it
    supervises.

    Args:
        token_lengths: bytes of each token of the whole document's encoding, the tokenizer's prefix not counted.
        count_tokens: tokens of the encoding of some bytes; a window is encoded on its own, and may need more tokens
            than the same bytes took inside the document.
    Raises:
        WindowError: not even one character past the overlap fits, so that no cut makes progress.
    """
    if len(token_lengths) <= budget:
        return [Window(0, len(document), 0, True)]
    ends = [0, *accumulate(token_lengths)]
    windows: list[Window] = []
    start, done = 0, 0  # where the window starts; where supervision has got to
    while done < len(document):
        # No document token more than the budget fits; a fresh encoding seldom needs fewer.
        last = min(bisect_left(ends, start) + budget, len(ends) - 1)
        end = _last_fitting(document, start, done, ends[last], count_tokens, budget)
        windows.append(Window(start, end, done, end == len(document)))
        done = end
        context = bisect_right(ends, done) - 1 - overlap
        start = _character_start(document, ends[max(context, 0)])
    return windows


def _character_start(document: bytes, offset: int) -> int:
    """The last character boundary at or before `offset`. Tokens may end inside characters, so cuts do not follow
    tokens.
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
        end = _character_start(document, max(end - excess, done))  # every token has a byte at least
    raise WindowError(
        f"no window of {budget} tokens moves past byte {done} of the document; "
        "lower teacher.overlap_tokens or raise teacher.max_tokens"
    )
