"""The counts of a dump as files of plain arrays, which every rank maps into memory: a machine holds one copy of them.

    lengths/arrays.d/about.json      what was counted with what, and all sums; the folder is absent or complete
                     tokens.npy      int32, continues.npy bool, a value for each piece: 5 bytes a record
                     bytes.npy       int32, of unions only: 4 more
                     first.npy, count.npy, before.npy   int64, for each record of several pieces: 24 bytes
                     unusable.npy    int64 and reason.npy int32, for each unusable record: 12 bytes

A rank reads of them what its windows are planned from, as it goes. The files are made once, by one rank, from the
counts by shard, of which it holds one at a time.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from schemas.manifest import read_json, write_json
from schemas.storage.atomic import committed_folder
from stage2_student.data.encode import TurnsLeftOut
from stage2_student.data.lengths.parts import Totals, read_parts
from stage2_student.data.token_counts import Lengths

_FOLDER, _ABOUT = "arrays.d", "about.json"
_ARRAYS: Mapping[str, type] = {
    "tokens": np.int32,
    "continues": np.bool_,
    "bytes": np.int32,
    "first": np.int64,
    "count": np.int64,
    "before": np.int64,
    "unusable": np.int64,
    "reason": np.int32,
}


class StoredReasons(Mapping[int, str]):
    """Why records are unusable, by their piece.

    Args:
        at_K: int64, ascending, of K unusable records.
        reason_K: int32, the index of each one's reason in `names`.
    """

    def __init__(self, at_K: np.ndarray, reason_K: np.ndarray, names: list[str]) -> None:
        self._at_K, self._reason_K, self._names = at_K, reason_K, names

    def __getitem__(self, piece: int) -> str:
        index = int(np.searchsorted(self._at_K, piece))
        if index == len(self._at_K) or self._at_K[index] != piece:
            raise KeyError(piece)
        return self._names[self._reason_K[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._at_K.tolist())

    def __len__(self) -> int:
        return len(self._at_K)

    def counted(self) -> Counter[str]:
        """Return the number of records for each reason."""
        numbers = np.bincount(self._reason_K, minlength=len(self._names)).tolist()
        return Counter(dict(zip(self._names, numbers, strict=True)))


def mapped_counts(folder: Path, num_shards: int, key: str, makes: bool = True) -> Lengths:
    """Map the counts of all shards stored in `folder` under this key.

    Args:
        makes: make the files first, if they are not there, or are of another key; only one rank does.
    """
    arrays = folder / _FOLDER
    if makes and not _is_made(arrays, key, num_shards):
        with committed_folder(arrays) as partial:
            _make(folder, num_shards, key, partial)
    about = read_json(arrays / _ABOUT, "totals", "counts", remedy=f"Delete {arrays}")
    found = {name: _mapped(arrays / f"{name}.npy") for name in _ARRAYS}
    totals = about["totals"]
    turns = {reason: TurnsLeftOut(reason, *left) for reason, left in totals.pop("turns_left_out").items()}
    return Lengths(
        counts_S=np.array(about["counts"], dtype=np.int64),
        tokens_U=found["tokens"],
        continues_U=found["continues"],
        first_C=found["first"],
        pieces_C=found["count"],
        reasons=StoredReasons(found["unusable"], found["reason"], about["reasons"]),
        bytes_left_out=Counter(totals.pop("bytes_left_out")),
        turns_left_out=turns,
        bytes_U=found["bytes"],
        before_C=found["before"],
        **totals,
    )


def kept_counts(folder: Path, num_shards: int) -> Lengths:
    """Read the counts of all shards stored by `keep_counts` into memory."""
    parts = list(read_parts(folder, num_shards))
    sizes_S = np.array([len(part.tokens_U) for part in parts], dtype=np.int64)
    starts = (np.cumsum(sizes_S) - sizes_S).tolist()
    totals = Totals()
    for part in parts:
        totals.add(part.totals)
    joined = {
        name: np.concatenate([np.empty(0, dtype=kind), *(getattr(part, name) for part in parts)])
        for name, kind in (("tokens_U", np.int32), ("continues_U", np.bool_), ("bytes_U", np.int32))
    }
    return Lengths(
        counts_S=sizes_S,
        first_C=_concatenated([part.first_C + start for part, start in zip(parts, starts, strict=True)]),
        pieces_C=_concatenated([part.pieces_C for part in parts]),
        reasons={
            start + at: reason for part, start in zip(parts, starts, strict=True) for at, reason in part.reasons.items()
        },
        **joined,
        **vars(totals),
    )


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _is_made(arrays: Path, key: str, num_shards: int) -> bool:
    if not (arrays / _ABOUT).exists():
        return False
    about = json.loads((arrays / _ABOUT).read_text(encoding="utf-8"))
    return bool(about["key"] == key and len(about["counts"]) == num_shards)


def _make(folder: Path, num_shards: int, key: str, arrays: Path) -> None:
    """Write the arrays, a shard at a time."""
    arrays.mkdir()
    totals, counts, names = Totals(), list[int](), dict[str, int]()
    first = num_extra = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(_Growing(arrays / f"{name}.npy", kind)) for name, kind in _ARRAYS.items()}
        for part in read_parts(folder, num_shards):
            extra_C = part.pieces_C - 1
            added = {
                "tokens": part.tokens_U,
                "continues": part.continues_U,
                "bytes": part.bytes_U,
                "first": part.first_C + first,
                "count": part.pieces_C,
                "before": num_extra + np.cumsum(extra_C) - extra_C,
                "unusable": np.array([first + at for at in part.reasons], dtype=np.int64),
                "reason": np.array([names.setdefault(name, len(names)) for name in part.reasons.values()], dtype=int),
            }
            for name, values in added.items():
                files[name].append(values)
            totals.add(part.totals)
            counts.append(len(part.tokens_U))
            first, num_extra = first + len(part.tokens_U), num_extra + int(extra_C.sum())
        if not files["bytes"].any:
            files["bytes"].empty()
    turns = {reason: [left.turns, left.num_bytes] for reason, left in totals.turns_left_out.items()}
    sums: dict[str, Any] = {**vars(totals), "turns_left_out": turns}
    write_json(arrays / _ABOUT, {"key": key, "counts": counts, "reasons": list(names), "totals": sums})


class _Growing:
    """An array that is written to a file in parts; its length, which the file begins with, last."""

    def __init__(self, path: Path, kind: type) -> None:
        self._path, self._kind = path, np.dtype(kind)
        self._length = 0
        self.any = False  # whether a value is not 0

    def append(self, values: np.ndarray) -> None:
        values = values.astype(self._kind, copy=False)
        self._file.write(values.tobytes())
        self._length += len(values)
        self.any = self.any or bool(values.any())

    def empty(self) -> None:
        """Drop all values."""
        self._length = 0
        self._file.truncate(self._file_start)
        self._file.seek(self._file_start)

    def __enter__(self) -> "_Growing":
        self._file: IO[bytes] = self._path.open("w+b")
        self._write_head()
        self._file_start = self._file.tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_head()
        assert self._file.tell() == self._file_start
        self._file.close()

    def _write_head(self) -> None:
        """Write the head of a .npy file, of one size for any length."""
        described = f"{{'descr': {self._kind.str!r}, 'fortran_order': False, 'shape': ({self._length},), }}"
        self._file.write(np.lib.format.magic(1, 0) + (118).to_bytes(2, "little"))
        self._file.write(described.ljust(117).encode() + b"\n")


def _mapped(path: Path) -> np.ndarray:
    """Map an array. An empty one, which cannot be mapped, is read."""
    if path.stat().st_size <= 128:
        return np.load(path)
    return np.load(path, mmap_mode="r").view(np.ndarray)
