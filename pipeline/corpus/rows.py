"""Rows of a corpus, from JSONL, text and Parquet files, folders, globs and hub names.

JSON is read line by line in binary, or as one array of objects: a bad line costs one row, not the file, and a row keeps
its line number.
"""

import glob
import io
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.files import COMPRESSIONS, Peeked, opened, peek
from pipeline.corpus.json_array import JsonArray, is_array
from pipeline.dumps.hub import require_data_set
from pipeline.sources.resolve import resolve_file
from schemas import ARITHMETIC

_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md")
_PARQUET = (".parquet",)
_COMPRESSED = tuple(COMPRESSIONS)
_MARK = b"\xef\xbb\xbf"  # a byte order mark is not part of the text
_BATCH_ROWS = 256  # of a Parquet file, held as Python objects at once
TOO_LONG = "longer than corpus.max_row_bytes"
_KNOWN = f"{', '.join(_JSONL + _TEXT)} (each also with {', '.join(_COMPRESSED)}) and {', '.join(_PARQUET)}"


@dataclass(frozen=True)
class Row:
    """A row of a corpus: named columns, the bytes of a text file, or a fault."""

    where: str
    columns: dict[str, Any] | None = None
    text: bytes | None = None
    fault: str | None = None


@dataclass(frozen=True)
class RowSource:
    """A resolved source: files in order, or a hub data set. Lines and text files above `max_bytes` are faults.

    `arithmetic` is the dump's version (`schemas.ARITHMETIC`): under 1, only names decided compression, a text kept its
    byte order mark, and JSON was read as lines only.
    """

    files: tuple[str, ...]
    hub: str | None
    split: str
    max_bytes: int
    arithmetic: int

    @classmethod
    def resolve(cls, source: str, split: str, max_bytes: int, arithmetic: int = ARITHMETIC) -> "RowSource":
        """Resolve a source.

        Raises ValueError for a missing path, an unknown kind of file, or a name that is no data set on the hub.
        """
        files = source_files(source, arithmetic)
        if files is None:
            require_data_set(source)
            return cls((), source, split, max_bytes, arithmetic)
        return cls(files, None, split, max_bytes, arithmetic)

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order, including faults."""
        if self.hub is not None:
            from datasets import load_dataset

            yield from _numbered(load_dataset(self.hub, split=self.split, streaming=True), f"{self.hub} [{self.split}]")
        for name in self.files:
            suffix = _suffix(name)
            if suffix in _PARQUET:
                yield from _parquet_rows(name)
                continue
            with opened(name, by_content=self.arithmetic > 1) as file:
                yield from self._text(name, file) if suffix in _TEXT else self._json(name, file)

    def _text(self, name: str, file: IO[bytes]) -> Iterator[Row]:
        text = file.read(self.max_bytes + len(_MARK) + 1)
        text = text.removeprefix(_MARK) if self.arithmetic > 1 else text
        yield Row(name, fault=TOO_LONG) if len(text) > self.max_bytes else Row(name, text=text)

    def _json(self, name: str, file: IO[bytes]) -> Iterator[Row]:
        head, file = peek(file)
        if self.arithmetic < 2 or not is_array(head):
            yield from _json_lines(file, f"{name}, line", self.max_bytes)
            return
        array = JsonArray(file, self.max_bytes)
        for number, element in enumerate(array.elements(), start=1):
            yield _json_row(element, f"{name}, element {number}")
        behind = io.BufferedReader(Peeked(array.rest, file))
        lines = _json_lines(behind, f"{name}, behind its array, line", self.max_bytes)
        yield from dropwhile(lambda row: array.ends and row.fault == "blank line", lines)


def source_files(source: str, arithmetic: int = ARITHMETIC) -> tuple[str, ...] | None:
    """List a source's files or addresses, in order; None for a hub name. Raises ValueError as `RowSource.resolve` does.

    `arithmetic` is the dump's version: under 1, linked folders inside a folder were skipped, hidden ones were read, and
    a glob followed circular links.
    """
    resolved = resolve_file(source)
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
        if _suffix(name) not in _JSONL + _TEXT + _PARQUET:
            raise ValueError(f"{name}: unknown kind of file; known are {_KNOWN}")
    return tuple(files)


def _files_of(path: Path, arithmetic: int) -> list[str]:
    """List a single file, or a folder's files of known kinds at any depth, ordered by name."""
    if path.is_file():
        return [str(path)]
    paths = sorted(path.rglob("*") if arithmetic < 2 else _walk(path))
    files = [str(file) for file in paths if file.is_file() and not file.name.startswith(".")]
    known = [name for name in files if _suffix(name) in _JSONL + _TEXT + _PARQUET]
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


def _suffix(name: str) -> str:
    path = Path(name)
    return (Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix).lower()


def _numbered(rows: Any, where: str) -> Iterator[Row]:
    for number, columns in enumerate(rows):
        yield Row(f"{where}, row {number}", columns=columns)


def _parquet_rows(name: str) -> Iterator[Row]:
    number = 0
    try:
        with (
            nullcontext(name) if "://" not in name else fsspec.open(name, "rb") as file,
            pq.ParquetFile(file) as parquet,
        ):
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
                for columns in _plain_rows(batch):
                    where = f"{name}, row {number}"
                    yield Row(where, fault="not valid UTF-8") if columns is None else Row(where, columns=columns)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Fetch or write it again.") from error


def _plain_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """Convert a batch to Python values; None for a row with invalid UTF-8, which Parquet does not check.

    A column with a value that Python cannot represent (a date in the year 30000, a time zone unknown on this machine)
    is left out.
    """
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return (
            [None]
            if batch.num_rows == 1
            else [row for i in range(batch.num_rows) for row in _plain_rows(batch[i : i + 1])]
        )
    except (ArithmeticError, LookupError, ValueError):
        convertible = [number for number, column in enumerate(batch.columns) if _is_convertible(column)]
        if len(convertible) == batch.num_columns:
            raise
        return _plain_rows(batch.select(convertible)) if convertible else [{}] * batch.num_rows


def _is_convertible(column: pa.Array) -> bool:
    """Return whether Python can represent a column's values; invalid UTF-8 does not count, as it costs only its row."""
    try:
        column.to_pylist()
    except UnicodeDecodeError:
        return True
    except (ArithmeticError, LookupError, ValueError):
        return False
    return True


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Yield lines with their ends; None for a line above `max_bytes`, which is never held whole."""
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(max_bytes)
        yield None


def _json_lines(file: IO[bytes], where: str, max_bytes: int) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, max_bytes), start=1):
        yield _json_row(line.removeprefix(_MARK) if line and number == 1 else line, f"{where} {number}")


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
