"""The documents that several dumps have in common, as arrays that are made once and mapped by every rank.

    RUN/joined/about.json     of which dumps, and remarks; the folder is absent or complete
               NAME.npy       20 bytes for each document of each dump, and 8 for each that all of them have

Shape legend: N documents of the first dump, M of another one, K that all have.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from schemas.manifest import read_json, write_json
from schemas.storage.atomic import committed_folder
from schemas.storage.locations import Location
from stage2_student.data.contents.by_id import contents_of
from stage2_student.data.contents.opened import OpenDump
from stage2_student.data.contents.table import Contents

_ABOUT = "about.json"


class ContentIndex:
    """An index of a dump's documents by content: shard, row and number of records, ascending."""

    def __init__(self, keys_N: np.ndarray, locations: np.ndarray) -> None:
        self.keys_N, self.locations = keys_N, locations

    @classmethod
    def made_of(cls, contents: Contents) -> "ContentIndex":
        """Sort a dump's documents."""
        order = np.lexsort((contents.row_N, contents.shard_N, contents.keys_N))
        locations = np.stack([contents.shard_N, contents.row_N, contents.count_N], axis=1)
        return cls(contents.keys_N[order], locations[order])

    def of(self, key: np.uint64) -> list[tuple[int, int, int]]:
        """Return the (shard, row, number of records) of each document with this key."""
        first, end = np.searchsorted(self.keys_N, key, "left"), np.searchsorted(self.keys_N, key, "right")
        return [tuple(location) for location in self.locations[first:end].tolist()]


@dataclass(frozen=True)
class JoinTable:
    """The documents of dumps that are joined.

    Attributes:
        remarks: sentences about documents that are left out because a dump lacks them, or of which dumps supervise
            different positions; each names the dumps, and has the number of these documents.
    """

    keys_N: np.ndarray  # uint64, in the first dump's order
    shard_N: np.ndarray  # int32, ascending
    common_K: np.ndarray  # uint64, ascending
    others: Sequence[ContentIndex]
    remarks: dict[str, int]

    @classmethod
    def of(cls, dumps: Sequence[OpenDump]) -> "JoinTable":
        """Find the documents that all dumps hold. Raises ValueError if there is none."""
        contents = contents_of(dumps)
        common_K: np.ndarray = reduce(np.intersect1d, [table.keys_N for table in contents])
        if not len(common_K):
            raise ValueError(
                f"no document is in all of {', '.join(str(dump.path) for dump in dumps)}; "
                "student.dumps must name dumps of one corpus"
            )
        others = [ContentIndex.made_of(table) for table in contents[1:]]
        remarks = _remarks([dump.path for dump in dumps], contents)
        return cls(contents[0].keys_N, contents[0].shard_N, common_K, others, remarks)

    def keys_of(self, shard: int) -> np.ndarray:
        """Return the keys of the documents of one of the first dump's shards, in order."""
        of_kind = np.int32(shard)  # another kind would have the whole array converted
        first, end = np.searchsorted(self.shard_N, of_kind, "left"), np.searchsorted(self.shard_N, of_kind, "right")
        return self.keys_N[first:end]

    def are_common(self, keys: np.ndarray) -> np.ndarray:
        """Tell of each key whether all dumps have a document with it."""
        at = np.minimum(np.searchsorted(self.common_K, keys), len(self.common_K) - 1)
        are: np.ndarray = self.common_K[at] == keys
        return are


class Keep(NamedTuple):
    """A folder that keeps a table, so that one rank makes it, once for a run, and every rank maps it.

    Attributes:
        makes: make it if it is not there, or is one of other dumps; only one rank does, before the others.
    """

    folder: Path
    makes: bool

    def table(self, dumps: Sequence[OpenDump]) -> JoinTable:
        """Return the table of these dumps. Raises ValueError if no document is in all of them."""
        key = _key(dumps)
        if self.makes and not self._is_made(key):
            with committed_folder(self.folder) as partial:
                _write(JoinTable.of(dumps), key, partial)
        about = read_json(self.folder / _ABOUT, "remarks", remedy=f"Delete {self.folder}")

        def mapped(name: str) -> np.ndarray:
            return np.load(self.folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)

        others = [ContentIndex(mapped(f"keys-{i}"), mapped(f"locations-{i}")) for i in range(1, len(dumps))]
        return JoinTable(mapped("keys"), mapped("shards"), mapped("common"), others, about["remarks"])

    def _is_made(self, key: str) -> bool:
        about = self.folder / _ABOUT
        return about.exists() and read_json(about, "key", remedy=f"Delete {self.folder}")["key"] == key


def _key(dumps: Sequence[OpenDump]) -> str:
    of = [[str(one.path), one.manifest.identity, [plan.content() for plan in one.manifest.shards]] for one in dumps]
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def _write(table: JoinTable, key: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    arrays = {"keys": table.keys_N, "shards": table.shard_N, "common": table.common_K}
    for i, other in enumerate(table.others, 1):
        arrays |= {f"keys-{i}": other.keys_N, f"locations-{i}": other.locations}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    write_json(folder / _ABOUT, {"key": key, "remarks": table.remarks})


def _remarks(paths: Sequence[Location], contents: Sequence[Contents]) -> dict[str, int]:
    """Describe what the dumps do not have in common.

    Returns:
        The number of documents for each remark; the remark continues the sentence after that number.
    """
    remarks: dict[str, int] = {}
    for path, table in zip(paths, contents, strict=True):
        for other_path, other in zip(paths, contents, strict=True):
            lacking = int((~np.isin(table.keys_N, other.keys_N)).sum())
            remarks[f"in {path} but not in {other_path}: left out"] = lacking
    order = np.argsort(contents[0].keys_N, kind="stable")
    keys, supervised_N = contents[0].keys_N[order], contents[0].supervised_N[order]
    for path, table in zip(paths[1:], contents[1:], strict=True):
        # Of several equal documents the last, as in `ContentIndex`.
        last = np.searchsorted(keys, table.keys_N, side="right") - 1
        common = (last >= 0) & (keys[last] == table.keys_N)
        differing = int((supervised_N[last[common]] != table.supervised_N[common]).sum())
        remark = f"with other positions supervised in {path} than in {paths[0]}: those that both supervise are mixed"
        remarks[remark] = differing
    return {remark: count for remark, count in remarks.items() if count}
