"""Parts of a corpus that can be read on their own: where each begins, and how many rows it has."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.files import is_plain, opened, pass_over, peek
from pipeline.corpus.json_array import is_array
from pipeline.corpus.row import Goal
from pipeline.corpus.rows import COUNTED, PARQUET, TEXT, RowSource, suffix_of

_CHUNK_BYTES = 1 << 20


class Part(NamedTuple):
    """Part of a file: of one of lines, those that begin in a range of bytes; of a Parquet file, a range of rows.

    Attributes:
        stop: None for a whole file.
    """

    file: int
    start: int
    stop: int | None


def parts(source: RowSource, part_bytes: int) -> Iterator[Part]:
    """Yield the parts of a source of local files in order, each of some `part_bytes` where a file can be cut."""
    for file, name in enumerate(source.files):
        if suffix_of(name) in PARQUET:
            yield from _row_groups(file, name, part_bytes)
        elif suffix_of(name) not in TEXT and _has_plain_lines(source, name):
            size = Path(name).stat().st_size
            yield from (Part(file, at, min(at + part_bytes, size)) for at in range(0, size, part_bytes))
        else:
            yield Part(file, 0, None)


def count(source: RowSource, part: Part) -> tuple[int, int]:
    """Return the byte where the first row of a part begins (-1 where rows can only be counted), and how many it has."""
    name = source.files[part.file]
    if suffix_of(name) in PARQUET:
        num_rows = sum(1 for _ in source.file_rows(name, Goal())) if part.stop is None else part.stop - part.start
        return COUNTED, num_rows
    if suffix_of(name) in TEXT:
        return COUNTED, 1
    with opened(name, by_content=source.arithmetic > 1) as file:
        head, file = peek(file)
        if source.arithmetic > 1 and is_array(head):
            return COUNTED, sum(1 for _ in source.file_rows(name, Goal()))
        if part.stop is None:
            return 0, _num_lines(file)
        return _lines_in(file, part.start, part.stop)


def _row_groups(file: int, name: str, part_bytes: int) -> Iterator[Part]:
    try:
        metadata = pq.read_metadata(name)
    except (pa.ArrowException, OSError):
        yield Part(file, 0, None)
        return
    start = stop = size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        stop, size = stop + group.num_rows, size + group.total_byte_size
        if size >= part_bytes:
            yield Part(file, start, stop)
            start, size = stop, 0
    if stop > start:
        yield Part(file, start, stop)


def _has_plain_lines(source: RowSource, name: str) -> bool:
    try:
        with opened(name, by_content=source.arithmetic > 1) as file:
            head, file = peek(file)
            return is_plain(file) and (source.arithmetic < 2 or not is_array(head))
    except ValueError:  # damaged, as whoever reads it will say
        return False


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


def _num_lines(file: IO[bytes]) -> int:
    ends, last = 0, b"\n"
    for chunk in _chunks(file):
        ends, last = ends + chunk.count(b"\n"), chunk[-1:]
    return ends + (last != b"\n")


def _lines_in(file: IO[bytes], start: int, stop: int) -> tuple[int, int]:
    """Return where the first line that begins in a range begins, and how many do; a line begins behind an end."""
    at = max(start - 1, 0)
    pass_over(file, at)
    first, number = (0, 1) if start == 0 else (stop, 0)
    for chunk in _chunks(file):
        chunk = chunk[: max(stop - 1 - at, 0)]
        if not number and b"\n" in chunk:
            first = at + chunk.index(b"\n") + 1
        number += chunk.count(b"\n")
        at += len(chunk)
        if at >= stop - 1:
            break
    return first, number
