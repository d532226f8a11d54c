"""A set of keys for any number of documents: the newest in memory, the others in sorted files.

Membership is exact. A Python set takes 83 bytes for a key; this one takes 2 to 4, and 16 in a temporary file (TMPDIR)
that has no name and vanishes with the process.
"""

import tempfile
from collections.abc import Iterator, Set
from functools import partial

import numpy as np

KEY_BYTES = 16
_HELD_KEYS = 2_000_000  # in memory, 170 MB
_BITS_PER_KEY = 16  # of a file's filter, which one key in so many passes though it is not in the file
_MERGED_KEYS = 1 << 20  # held at once while two files are merged
_LARGEST = (1 << 64) - 1


class KeySet:
    """A growing set of keys of 16 bytes that are evenly distributed, as hashes are."""

    def __init__(self, held_keys: int = _HELD_KEYS) -> None:
        self._held_keys = held_keys
        self._held: set[bytes] = set()
        self._files: list[_SortedFile] = []  # ever smaller

    def update(self, keys: Set[bytes]) -> None:
        self._held.update(keys)
        if len(self._held) >= self._held_keys:
            self._spill()

    def __bool__(self) -> bool:
        return bool(self._held or self._files)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held or any(key in file for file in self._files)

    def isdisjoint(self, keys: Set[bytes]) -> bool:
        return self._held.isdisjoint(keys) and not any(key in file for file in self._files for key in keys)

    def _spill(self) -> None:
        """Move what is held to a file, merging files so that few remain: each is more than twice as large as the next.

        A key is in one file at most if its owner asks before it adds it; twice does no harm.
        """
        keys_K2 = np.frombuffer(b"".join(self._held), np.uint64).reshape(-1, 2)
        self._held.clear()
        newest = _SortedFile(iter([_sorted(keys_K2)]), len(keys_K2))
        while self._files and self._files[-1].num_keys < 2 * newest.num_keys:
            newest = self._files.pop().merged_with(newest)
        self._files.append(newest)


class _SortedFile:
    """Keys in a nameless file, sorted by their first half, with a filter in memory that most others do not pass."""

    def __init__(self, parts: Iterator[np.ndarray], num_keys: int) -> None:
        self.num_keys = num_keys
        self._shift = 64 - int(num_keys * _BITS_PER_KEY).bit_length()
        self._filter = np.zeros((_LARGEST >> self._shift) // 8 + 1, np.uint8)
        with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
            for part_K2 in parts:
                for file, half_K in ((first, part_K2[:, 0]), (second, part_K2[:, 1])):
                    half_K.tofile(file)
                bits_K = part_K2[:, 0] >> np.uint64(self._shift)
                np.bitwise_or.at(self._filter, bits_K >> np.uint64(3), _bit(bits_K))
            mapped = partial(np.memmap, dtype=np.uint64, mode="r", shape=(num_keys,))
            self._first, self._second = mapped(first), mapped(second)

    def __contains__(self, key: bytes) -> bool:
        first, second = np.frombuffer(key, np.uint64)
        bit = int(first) >> self._shift
        if not self._filter[bit >> 3] & (1 << (bit & 7)):
            return False
        at = int(np.searchsorted(self._first, first))
        while at < self.num_keys and self._first[at] == first:
            if self._second[at] == second:
                return True
            at += 1
        return False

    def merged_with(self, other: "_SortedFile") -> "_SortedFile":
        num_keys = self.num_keys + other.num_keys
        num_parts = -(-num_keys // _MERGED_KEYS)
        ends = [(_LARGEST * (part + 1)) // num_parts for part in range(num_parts)]
        parts = zip(self._cut(ends), other._cut(ends), strict=True)
        return _SortedFile((_sorted(np.concatenate(pair)) for pair in parts), num_keys)

    def _cut(self, ends: list[int]) -> Iterator[np.ndarray]:
        """Yield the keys up to each end."""
        start = 0
        for end in ends:
            stop = int(np.searchsorted(self._first, np.uint64(end), side="right"))
            yield np.stack([self._first[start:stop], self._second[start:stop]], axis=1)
            start = stop


def _sorted(keys_K2: np.ndarray) -> np.ndarray:
    return keys_K2[np.argsort(keys_K2[:, 0], kind="stable")]


def _bit(bits_K: np.ndarray) -> np.ndarray:
    return np.uint8(1) << (bits_K & np.uint64(7)).astype(np.uint8)
