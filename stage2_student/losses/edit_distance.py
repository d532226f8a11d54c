"""Nearest strings by Levenshtein's edit distance, of bytes.

Shape legend: Q strings asked, N strings known, B bytes of all known strings, H bins of a histogram.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

_BINS = 32


def edit_distance(a: bytes, b: bytes) -> int:
    """Return the least number of bytes to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def nearest(asked: Sequence[bytes], known: Sequence[bytes]) -> np.ndarray:
    """Return for each string the index of the nearest known one; of several, of the nearest length, then the first.

    Returns:
        Q, int64.
    """
    if not asked:
        return np.empty(0, dtype=np.int64)
    order = np.argsort([len(spelled) for spelled in known], kind="stable")
    by_length = [known[i] for i in order.tolist()]
    found: np.ndarray = _nearest(*_packed(asked), *_packed(by_length))
    return order[found]


def _packed(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (bytes of all strings, where each begins and the last ends, a histogram of each one's bytes)."""
    firsts = np.cumsum([0, *map(len, strings)])
    text = np.frombuffer(b"".join(strings), dtype=np.uint8)
    histogram = np.zeros((len(strings), _BINS), dtype=np.int16)
    np.add.at(histogram, (np.repeat(np.arange(len(strings)), np.diff(firsts)), text % _BINS), 1)
    return text, firsts, histogram


@njit(cache=True)
def _nearest(
    asked: np.ndarray,
    asked_at: np.ndarray,
    asked_QH: np.ndarray,
    known: np.ndarray,
    known_at: np.ndarray,
    known_NH: np.ndarray,
) -> np.ndarray:
    """Return Q: the nearest known string, which are sorted by length; lengths are visited outwards from its own."""
    lengths = known_at[1:] - known_at[:-1]
    found = np.zeros(len(asked_at) - 1, dtype=np.int64)
    for q in range(len(found)):
        word = asked[asked_at[q] : asked_at[q + 1]]
        size = len(word)
        best = 1 << 30
        row = np.empty(lengths[-1] + 2, dtype=np.int64)
        apart = 0
        while apart < best and apart <= max(size, lengths[-1]):
            for side in range(2 if apart else 1):
                wanted = size + apart if side else size - apart
                first = np.searchsorted(lengths, wanted, side="left")
                last = np.searchsorted(lengths, wanted, side="right")
                for n in range(first, last):
                    more, less = 0, 0
                    for h in range(asked_QH.shape[1]):
                        difference = asked_QH[q, h] - known_NH[n, h]
                        if difference > 0:
                            more += difference
                        else:
                            less -= difference
                    if max(more, less) >= best:
                        continue
                    distance = _distance_below(word, known[known_at[n] : known_at[n + 1]], row, best)
                    if distance < best:
                        best, found[q] = distance, n
            apart += 1
    return found


@njit(cache=True)
def _distance_below(a: np.ndarray, b: np.ndarray, row: np.ndarray, limit: int) -> int:
    """Return the edit distance; any number from `limit` on if it is not below that."""
    for j in range(len(b) + 1):
        row[j] = j
    for i in range(len(a)):
        before = row[0]
        row[0] = i + 1
        least = row[0]
        for j in range(len(b)):
            cost = before if a[i] == b[j] else before + 1
            before = row[j + 1]
            row[j + 1] = min(cost, row[j + 1] + 1, row[j] + 1)
            least = min(least, row[j + 1])
        if least >= limit:
            return limit
    return int(row[len(b)])
