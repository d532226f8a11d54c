"""The nearest string by edit distance against all of them in turn."""

import numpy as np
import pytest

from stage2_student.losses.edit_distance import edit_distance, nearest


def slow_distance(a: bytes, b: bytes) -> int:
    """Follow the definition: insert, delete, or replace the last byte."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[:-1], b) + 1, slow_distance(a, b[:-1]) + 1, slow_distance(a[:-1], b[:-1]) + (a[-1] != b[-1])
    )


def random_words(rng: np.random.Generator, count: int, longest: int) -> list[bytes]:
    return [rng.integers(97, 101, rng.integers(1, longest)).astype(np.uint8).tobytes() for _ in range(count)]


def test_the_distance_is_the_definition() -> None:
    words = random_words(np.random.default_rng(0), 40, 6)
    for a, b in zip(words[::2], words[1::2], strict=True):
        assert edit_distance(a, b) == slow_distance(a, b) == edit_distance(b, a)


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_string_is_that_of_all_in_turn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, asked = random_words(rng, 60, 9), random_words(rng, 80, 14)
    for word, found in zip(asked, nearest(asked, known).tolist(), strict=True):
        apart = [(edit_distance(word, one), abs(len(word) - len(one))) for one in known]
        assert apart[found] == min(apart)
        same_length = [i for i, one in enumerate(known) if apart[i] == min(apart) and len(one) == len(known[found])]
        assert found == same_length[0]


def test_nothing_asked_is_nothing_found() -> None:
    assert nearest([], [b"a"]).shape == (0,)
