"""Rows of a Parquet file, from any row on: groups of rows before it are not read."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.row import Goal, Row
from schemas.storage.locations import StoreError, location, open_parquet

_BATCH_ROWS = 256  # held as Python objects at once


def parquet_rows(name: str, goal: Goal, is_ours: bool = False) -> Iterator[tuple[int, Row]]:
    """Yield each row from the goal on, with its number in the file. Raises ValueError, naming a damaged file.

    Args:
        is_ours: `bld generate` wrote it: one in a store is read by the client that wrote it.
    """
    number = 0
    try:
        with _opened(name, is_ours) as parquet:
            for group in range(parquet.num_row_groups):
                end = number + parquet.metadata.row_group(group).num_rows
                if end <= goal.row:
                    number = end
                    continue
                for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                    before = min(max(goal.row - number, 0), batch.num_rows)
                    number += before
                    for columns in _plain_rows(batch[before:]):
                        if number >= goal.row:
                            yield number, _row(columns, f"{name}, row {number}")
                        number += 1
    except StoreError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Fetch or write it again.") from error


@contextmanager
def _opened(name: str, is_ours: bool) -> Iterator[pq.ParquetFile]:
    if is_ours and "://" in name:
        with open_parquet(location(name), small_buffers=True) as parquet:
            yield parquet
        return
    with (
        nullcontext(name) if "://" not in name else fsspec.open(name, "rb") as file,
        pq.ParquetFile(file, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def _row(columns: dict[str, Any] | None, where: str) -> Row:
    return Row(where, fault="not valid UTF-8") if columns is None else Row(where, columns=columns)


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
