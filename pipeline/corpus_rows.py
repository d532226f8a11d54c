"""Rows of a corpus, from JSONL, text and Parquet files, folders, globs and hub names.

JSON is read line by line in binary: one bad line costs one row, not the file, and a row keeps its line number.
"""

import glob
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa

from pipeline.source import resolve_file

_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md")
_PARQUET = (".parquet",)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
TOO_LONG = "longer than corpus.max_row_bytes"
_KNOWN = f"{', '.join(_JSONL + _TEXT)} (each also with {', '.join(_COMPRESSED)}) and {', '.join(_PARQUET)}"


@dataclass(frozen=True)
class Row:
    """What a corpus holds at one place: named columns, the bytes of a text file, or what is wrong there."""

    where: str
    columns: dict[str, Any] | None = None
    text: bytes | None = None
    fault: str | None = None


@dataclass(frozen=True)
class RowSource:
    """A resolved source: files in order, or a hub data set. Lines and text files of more than `max_bytes` are faults."""

    files: tuple[str, ...]
    hub: str | None
    split: str
    max_bytes: int

    @classmethod
    def resolve(cls, source: str, split: str, max_bytes: int) -> "RowSource":
        """Raises ValueError for a missing path or a kind of file that is not known."""
        resolved = resolve_file(source)
        if isinstance(resolved, Path):
            files = _files_of(resolved)
        elif any(mark in resolved for mark in "*?[") and "://" not in resolved:
            files = [name for name in sorted(glob.glob(resolved, recursive=True)) if Path(name).is_file()]  # noqa: PTH207
            if not files:
                raise ValueError(f"no file matches {resolved!r} (from {Path.cwd()})")
        elif "://" in resolved:
            files = [resolved]
        else:
            return cls((), resolved, split, max_bytes)
        for name in files:
            if _suffix(name) not in _JSONL + _TEXT + _PARQUET:
                raise ValueError(f"{name}: its kind is not known by its name; known are {_KNOWN}")
        return cls(tuple(files), None, split, max_bytes)

    def rows(self) -> Iterator[Row]:
        """All rows in order, good and bad."""
        if self.hub is not None:
            from datasets import load_dataset

            yield from _numbered(load_dataset(self.hub, split=self.split, streaming=True), f"{self.hub} [{self.split}]")
        for name in self.files:
            suffix = _suffix(name)
            if suffix in _TEXT:
                with _opened(name) as file:
                    text = file.read(self.max_bytes + 1)
                    yield Row(name, fault=TOO_LONG) if len(text) > self.max_bytes else Row(name, text=text)
            elif suffix in _PARQUET:
                yield from _parquet_rows(name)
            else:
                yield from _json_lines(name, self.max_bytes)


def _files_of(path: Path) -> list[str]:
    """A file alone, or a folder's files of known kinds, at any depth, in the order of their names."""
    if path.is_file():
        return [str(path)]
    files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    known = [name for name in files if _suffix(name) in _JSONL + _TEXT + _PARQUET]
    if not known:
        raise ValueError(f"the folder {path} holds no file of a known kind: {_KNOWN}")
    return known


def _suffix(name: str) -> str:
    path = Path(name)
    return (Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix).lower()


def _numbered(rows: Any, where: str) -> Iterator[Row]:
    for number, columns in enumerate(rows):
        yield Row(f"{where}, row {number}", columns=columns)


def _parquet_rows(name: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        yield from _numbered(load_dataset("parquet", data_files=name, split="train", streaming=True), name)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Fetch or write it again.") from error


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    """A file's content, decompressed by its name. Raises ValueError for compressed content that is damaged."""
    is_zstd = name.lower().endswith(".zst")
    try:
        with fsspec.open(name, "rb", compression=None if is_zstd else "infer") as file:
            if (
                is_zstd
            ):  # fsspec's reader stops, without a word, after the first frame of several, and where a frame is cut off
                file = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
            yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Fetch or compress it again.") from error


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Lines with their ends; None for one of more than `max_bytes`, which is never held whole."""
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(max_bytes)
        yield None


def _json_lines(name: str, max_bytes: int) -> Iterator[Row]:
    with _opened(name) as file:
        for number, line in enumerate(_lines(file, max_bytes), start=1):
            where = f"{name}, line {number}"
            if line is None:
                yield Row(where, fault=TOO_LONG)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not part of the text
            if not line.strip():
                yield Row(where, fault="blank line")
                continue
            try:
                columns = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield Row(where, fault="not valid UTF-8")
            except (ValueError, RecursionError):
                yield Row(where, fault="malformed JSON")
            else:
                if isinstance(columns, dict):
                    yield Row(where, columns=columns)
                else:
                    yield Row(where, fault="not a JSON object")
