"""The plan of a dump of many shards: a Parquet file beside the manifest, which names it by the hash of its content.

In JSON a million shards would take four times the space and many times the time to read.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas import dump_files
from schemas.storage.atomic import committed, remove
from schemas.storage.locations import Location, names

_NUMBERS = ("first_document", "num_documents", "num_bytes")
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64(), nullable=False) for name in _NUMBERS),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("folder", pa.string(), nullable=False),
    ]
)
COLUMNS = tuple(_SCHEMA.names)


def write_plan(dump: Location, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Write the file with a row for each shard, and return what the manifest says instead: how many, and which file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns), schema=_SCHEMA), buffer, compression="zstd")
    content = buffer.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    with committed(dump / dump_files.plan_name(sha256)) as path:
        path.write_bytes(content)
    return {"num_shards": len(columns["sha256"]), "sha256": sha256}


def read_plan(dump: Location, named: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Read the file that a manifest names. Raises ValueError for anything but the file that was written."""
    sha256 = str(named.get("sha256"))
    path = dump / dump_files.plan_name(sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "unnamed")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, which holds the plan")
    with path.open("rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its sha256 is not that in {dump_files.MANIFEST}")
    table = pq.read_table(io.BytesIO(content))
    if table.schema != _SCHEMA or table.num_rows != named.get("num_shards"):
        raise ValueError(f"{path} is damaged: it is not a plan of {named.get('num_shards')} shards")
    return {name: table[name].to_pylist() for name in COLUMNS}


def remove_others(dump: Location, kept: str | None) -> None:
    """Delete plans that no manifest names any more.

    Args:
        kept: hash of the one that the manifest names; None: it names none.
    """
    for name in names(dump):
        if dump_files.is_plan(name) and (kept is None or name != dump_files.plan_name(kept)):
            remove(dump / name)
