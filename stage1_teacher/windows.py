"""Documents longer than the teacher's context, cut into windows at character boundaries; each position is supervised once."""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple


class Window(NamedTuple):
    """Bytes `start .. end` of a document are the record; its bytes `supervised .. end` are supervised, with END if `has_end`."""

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
    """Windows of at most `budget` tokens, each but the first with at least `overlap` tokens of context before what it supervises.

    Args:
        token_lengths: bytes of each token of the whole document's encoding, the tokenizer's prefix not counted.
        count_tokens: tokens of the encoding of some bytes; a window is encoded on its own, and may need more tokens
            than the same bytes took inside the document.
    Raises:
        ValueError: not even one token past the overlap fits, so that no cut makes progress.
    """
    ends = [0, *accumulate(token_lengths)]
    boundaries = [i for i, offset in enumerate(ends) if is_boundary(document, offset)]
    if len(token_lengths) <= budget:
        return [Window(0, len(document), 0, True)]
    windows: list[Window] = []
    first, done = 0, 0  # token index where the window starts; where supervision has got to
    while ends[done] < len(document):
        last = _last_token(document, ends, boundaries, first, done, count_tokens, budget)
        windows.append(Window(ends[first], ends[last], ends[done], last == len(ends) - 1))
        done = last
        first = max((i for i in boundaries if i <= done - overlap), default=0)
    return windows


def _last_token(
    document: bytes,
    ends: list[int],
    boundaries: list[int],
    first: int,
    done: int,
    count_tokens: Callable[[bytes], int],
    budget: int,
) -> int:
    candidates = [i for i in boundaries if done < i <= first + budget and ends[i] > ends[done]]
    for last in reversed(candidates):
        if count_tokens(document[ends[first] : ends[last]]) <= budget:
            return last
    raise ValueError(
        f"no window of {budget} tokens moves past byte {ends[done]} of the document; "
        "lower teacher.overlap_tokens or raise teacher.max_tokens"
    )
