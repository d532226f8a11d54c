"""Rows of a corpus, from JSONL, text and Parquet files, folders, globs and hub names.

JSON is read line by line in binary, or as one array of objects: a bad line costs one row, not the file, and a row keeps
its line number.
"""

import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import IO, Any

from pipeline.corpus.files import COMPRESSIONS, Peeked, opened, pass_over, peek
from pipeline.corpus.json_array import JsonArray, is_array
from pipeline.corpus.parquet_rows import parquet_rows
from pipeline.corpus.row import Goal, Row, RowPlace
from pipeline.dumps.hub import require_data_set
from pipeline.sources.resolve import resolve_file
from schemas import ARITHMETIC, dump_files
from schemas.storage.locations import Location, is_location, location
from schemas.text_corpus import is_text_corpus, text_shards

_JSONL = (".jsonl", ".ndjson", ".json")
TEXT = (".txt", ".text", ".md")
PARQUET = (".parquet",)
_COMPRESSED = tuple(COMPRESSIONS)
COUNTED = -1  # in place of a byte
_MARK = b"\xef\xbb\xbf"  # a byte order mark is not part of the text
TOO_LONG = "longer than corpus.max_row_bytes"
_KNOWN = f"{', '.join(_JSONL + TEXT)} (each also with {', '.join(_COMPRESSED)}) and {', '.join(PARQUET)}"


@dataclass(frozen=True)
class RowSource:
    """A resolved source: files in order, or a hub data set. Lines and text files above `max_bytes` are faults.

    `arithmetic` is the dump's version (`schemas.ARITHMETIC`): under 1, only names decided compression, a text kept its
    byte order mark, and JSON was read as lines only. `is_written`: the files are of a corpus that `bld generate` wrote.
    """

    files: tuple[str, ...]
    hub: str | None
    split: str
    max_bytes: int
    arithmetic: int
    is_written: bool = False

    @classmethod
    def resolve(cls, source: str, split: str, max_bytes: int, arithmetic: int = ARITHMETIC) -> "RowSource":
        """Resolve a source.

        Raises ValueError for a missing path, an unknown kind of file, or a name that is no data set on the hub.
        """
        files = source_files(source, arithmetic)
        if files is None:
            require_data_set(source)
            return cls((), source, split, max_bytes, arithmetic)
        return cls(files, None, split, max_bytes, arithmetic, written_folder(source) is not None)

    def rows(self, goal: Goal | None = None) -> Iterator[tuple[RowPlace, Row]]:
        """Yield all rows in order, including faults, each with its place.

        Args:
            goal: the row to begin with; its owner may move it forward within the file that is being read.
        """
        goal = goal or Goal()
        before = goal.place.number - goal.row  # rows of earlier files
        if self.hub is not None:
            from datasets import load_dataset

            given = _numbered(load_dataset(self.hub, split=self.split, streaming=True), f"{self.hub} [{self.split}]")
            yield from ((RowPlace(0, row, COUNTED, before + row), value) for row, value in _from(goal, given))
        for file in range(goal.place.file, len(self.files)):
            if file > goal.place.file:
                goal.place = RowPlace(file, 0, 0, before)
            num_rows = 0
            for row, byte, value in self.file_rows(self.files[file], goal):
                yield RowPlace(file, row, byte, before + row), value
                num_rows = row + 1
            before += num_rows

    def file_rows(self, name: str, goal: Goal) -> Iterator[tuple[int, int, Row]]:
        """Yield number, byte and content of a file's rows, from the goal on."""
        suffix = suffix_of(name)
        if suffix in PARQUET:
            yield from ((number, COUNTED, row) for number, row in parquet_rows(name, goal, self.is_written))
            return
        with opened(name, by_content=self.arithmetic > 1) as file:
            if suffix in TEXT:
                yield 0, COUNTED, self._text(name, file)
                return
            head, file = peek(file)
            if self.arithmetic < 2 or not is_array(head):
                yield from _json_lines(file, f"{name}, line", self.max_bytes, goal)
            else:
                yield from ((number, COUNTED, row) for number, row in _from(goal, self._array(name, file)))

    def _text(self, name: str, file: IO[bytes]) -> Row:
        text = file.read(self.max_bytes + len(_MARK) + 1)
        text = text.removeprefix(_MARK) if self.arithmetic > 1 else text
        return Row(name, fault=TOO_LONG) if len(text) > self.max_bytes else Row(name, text=text)

    def _array(self, name: str, file: IO[bytes]) -> Iterator[Row]:
        array = JsonArray(file, self.max_bytes)
        for number, element in enumerate(array.elements(), start=1):
            yield _json_row(element, f"{name}, element {number}")
        behind = io.BufferedReader(Peeked(array.rest, file))
        lines = _json_lines(behind, f"{name}, behind its array, line", self.max_bytes, Goal())
        yield from dropwhile(lambda row: array.ends and row.fault == "blank line", (row for _, _, row in lines))


def source_files(source: str, arithmetic: int = ARITHMETIC) -> tuple[str, ...] | None:
    """List a source's files or addresses, in order; None for a hub name. Raises ValueError as `RowSource.resolve` does.

    `arithmetic` is the dump's version: under 1, linked folders inside a folder were skipped, hidden ones were read, and
    a glob followed circular links.
    """
    resolved = resolve_file(source)
    if (folder := written_folder(source)) is not None:
        return tuple(map(str, text_shards(folder)))
    if isinstance(resolved, Path):
        files = _files_of(resolved, arithmetic)
    elif any(mark in resolved for mark in "*?[") and "://" not in resolved:
        files = [name for name in sorted(glob.glob(resolved, recursive=True)) if Path(name).is_file()]  # noqa: PTH207
        files = files if arithmetic < 2 else [name for name in files if not _is_in_circle(Path(name))]
        if not files:
            raise ValueError(f"no file matches {resolved!r} (from {Path.cwd()})")
    elif "://" in resolved:
        files = [resolved]
    else:
        return None
    for name in files:
        if suffix_of(name) not in _JSONL + TEXT + PARQUET:
            raise ValueError(f"{name}: unknown kind of file; known are {_KNOWN}")
    for above in {str(above): above for name in files for above in _folders_above(name)}.values():
        if is_text_corpus(above):  # else what was written and its prompt would be alike
            raise ValueError(f"{source} is a shard of the text written in {above}; give that folder as the source")
    return tuple(files)


def written_folder(source: str) -> Location | None:
    """Return the folder of a corpus that `bld generate` wrote; None for any other source.

    Raises OSError if it is an address that cannot be read.
    """
    if "://" in source and (not is_location(source) or suffix_of(source) in _JSONL + TEXT + PARQUET):
        return None
    folder = location(source) if "://" in source else Path(source).expanduser()
    return folder if is_text_corpus(folder) else None


def _folders_above(name: str) -> list[Location]:
    """Return the folders of which a file could be a shard."""
    if "://" not in name:
        return list(Path(name).parents[1:3])
    # A store is asked only about a file with the name of a shard.
    if not is_location(name) or not re.search(rf"/{dump_files.SHARDS}/(\d+/)?{dump_files.PART_NAMES}$", name):
        return []
    return [location(name.rpartition(f"/{dump_files.SHARDS}/")[0])]


def _files_of(path: Path, arithmetic: int) -> list[str]:
    """List a single file, or a folder's files of known kinds at any depth, ordered by name."""
    if path.is_file():
        return [str(path)]
    paths = sorted(path.rglob("*") if arithmetic < 2 else _walk(path))
    files = [str(file) for file in paths if file.is_file() and not file.name.startswith(".")]
    known = [name for name in files if suffix_of(name) in _JSONL + TEXT + PARQUET]
    if not known:
        raise ValueError(f"the folder {path} holds no file of a known kind: {_KNOWN}")
    return known


def _walk(folder: Path) -> Iterator[Path]:
    """Yield files at any depth, following links to folders, but not in hidden folders (git, notebooks, hub caches)."""
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(Path(at, name))]
        yield from (Path(at, name) for name in names)


def _leads_back(folder: Path) -> bool:
    """Return whether a link leads to a folder that contains it, directly or through other links."""
    if not folder.is_symlink():
        return False
    target = os.path.realpath(folder)
    return any(Path(os.path.realpath(parent)).is_relative_to(target) for parent in folder.absolute().parents)


def _is_in_circle(file: Path) -> bool:
    return any(map(_leads_back, file.parents))


def suffix_of(name: str) -> str:
    path = Path(name)
    return (Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix).lower()


def _numbered(rows: Any, where: str) -> Iterator[Row]:
    for number, columns in enumerate(rows):
        yield Row(f"{where}, row {number}", columns=columns)


def _from(goal: Goal, rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """Yield rows that can only be counted, from the goal on, with their numbers."""
    for number, row in enumerate(rows):
        if number >= goal.row:
            yield number, row
        else:
            goal.read_through = True


def _line(file: IO[bytes], max_bytes: int) -> tuple[bytes | None, int]:
    """Return the next line with its end, and its size; None for a line above `max_bytes`, which is never held whole."""
    line = file.readline(max_bytes + 1)
    size = len(line)
    if size <= max_bytes:
        return line, size
    while line and not line.endswith(b"\n"):
        line = file.readline(max_bytes)
        size += len(line)
    return None, size


def _json_lines(file: IO[bytes], where: str, max_bytes: int, goal: Goal) -> Iterator[tuple[int, int, Row]]:
    """Yield number, first byte and content of each line, from the goal on."""
    number = at = 0
    aim = None
    while True:
        if aim is not goal.place:
            aim = goal.place
            if aim.row > number:
                goal.read_through |= pass_over(file, aim.byte - at)
                number, at = aim.row, aim.byte
        line, size = _line(file, max_bytes)
        if not size:
            return
        yield number, at, _json_row(line.removeprefix(_MARK) if line and not number else line, f"{where} {number + 1}")
        number, at = number + 1, at + size


def _json_row(content: bytes | None, where: str) -> Row:
    """Parse a line or an array element of JSON; `content` is None for one that is too long."""
    if content is None:
        return Row(where, fault=TOO_LONG)
    if not content.strip():
        return Row(where, fault="blank line")
    try:
        columns = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        return Row(where, fault="not valid UTF-8")
    except (ValueError, RecursionError):
        return Row(where, fault="malformed JSON")
    return Row(where, columns=columns) if isinstance(columns, dict) else Row(where, fault="not a JSON object")
