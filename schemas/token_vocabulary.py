"""Bytes of the teacher's tokens, in a Parquet file: a reader of alternatives need not have its tokenizer."""

from collections.abc import Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from schemas import dump_files
from schemas.storage.atomic import committed
from schemas.storage.locations import Location, open_parquet

_SCHEMA = pa.schema([pa.field("id", pa.int32(), nullable=False), pa.field("bytes", pa.binary())])


def write_vocabulary(dump: Location, token_bytes: Sequence[bytes | None]) -> None:
    """Write the file, unless it is there; one that says something else, or is damaged, is replaced.

    Args:
        token_bytes: by id, of the teacher that the dump's identity names; None: not text.
    """
    path = dump / dump_files.VOCABULARY
    if path.exists():
        with suppress(ValueError):
            if read_vocabulary(dump) == list(token_bytes):
                return
    with committed(path) as partial:
        table = pa.table([pa.array(range(len(token_bytes)), pa.int32()), pa.array(token_bytes, pa.binary())], _SCHEMA)
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_vocabulary(dump: Location) -> list[bytes | None]:
    """Return the bytes of each of the teacher's token ids; None for one that is not text.

    Raises ValueError if the dump has no such file, or it is damaged.
    """
    path = dump / dump_files.VOCABULARY
    if not path.exists():
        raise ValueError(
            f"{dump} holds no {dump_files.VOCABULARY}, which says what the teacher's tokens spell: run `bld teacher` "
            "with its recipe again, which writes it (a dump without dump.tokens has none)"
        )
    try:
        with open_parquet(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it and run `bld teacher` again") from error
    if not table.schema.equals(_SCHEMA) or table["id"].to_pylist() != list(range(len(table))):
        raise ValueError(
            f"{path} is damaged: it is not a table of bytes by token id. Delete it and run `bld teacher` again"
        )
    spelled: list[bytes | None] = table["bytes"].to_pylist()
    return spelled
