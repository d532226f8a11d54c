"""Windows: every byte supervised once, at character boundaries, within the budget, with context."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stage1_teacher.inputs.windows import WindowError, cut_windows, is_boundary


def pairs(document: bytes) -> list[int]:
    """Return token lengths of a tokenizer of two bytes a token, which may split a character."""
    return [2] * (len(document) // 2) + [1] * (len(document) % 2)


# Tokens that end inside characters nearly everywhere: cuts cannot wait for a token's end that is a character's.
@example(text="0\x80\x80\x80\x80\x80\x80𐀀𐀀𐀀", budget=12, overlap=0)
@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.integers(12, 20), st.integers(0, 5))
def test_each_byte_is_supervised_once_and_in_order(text: str, budget: int, overlap: int) -> None:
    document = text.encode()
    windows = cut_windows(document, pairs(document), lambda part: len(pairs(part)), budget, overlap)
    assert windows[0].supervised == 0 and windows[-1].end == len(document)
    for before, after in pairwise(windows):
        assert after.supervised == before.end
        assert after.supervised - after.start >= 2 * overlap or after.start == 0
    assert [window.has_end for window in windows] == [False] * (len(windows) - 1) + [True]
    for window in windows:
        assert is_boundary(document, window.start) and is_boundary(document, window.end)
        assert len(pairs(document[window.start : window.end])) <= budget


def test_a_window_that_cannot_move_on_is_refused() -> None:
    document = b"abcdefgh"
    with pytest.raises(WindowError, match="no window of 2 tokens moves past byte"):
        cut_windows(document, pairs(document), lambda part: 99, 2, 0)
