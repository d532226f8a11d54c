"""The summary of a dump: counts over its shards, read from the shards alone, whoever made them and when."""

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from schemas.dump_files import Key
from schemas.file_seal import check_seal
from schemas.manifest import Manifest, ShardPlan
from schemas.shard import num_supervised, shard_metadata
from schemas.storage.locations import Location, open_parquet
from stage1_teacher.coordination.thread_map import thread_map
from stage1_teacher.dump.shard_cost import total_cost

_SUMMED = ("documents", "records", "bytes", "positions", "teacher_tokens", "computed_tokens", "stored_bytes")


class _Counted(NamedTuple):
    """A shard's share of the summary."""

    counts: dict[str, int]  # of `_SUMMED`
    left_out: dict[str, str]
    engine: str
    version: int  # of the format
    listed: dict[str, Any]


def summarise(dump: Location, manifest: Manifest) -> dict[str, Any]:
    """Return the content of `summary.json`; reads every byte.

    Raises ValueError for a shard that is damaged or holds other documents than planned.
    """
    counted = thread_map(partial(_count, dump), manifest.shards)
    totals: dict[str, Any] = {name: sum(shard.counts[name] for shard in counted) for name in _SUMMED}
    totals["stored_bytes_per_text_byte"] = round(totals["stored_bytes"] / max(totals["bytes"], 1), 4)
    counts = {key: value for key, value in manifest.corpus_counts.items() if key.startswith("left out")}
    cost = total_cost(dump, manifest)
    versions = sorted({shard.version for shard in counted})
    return {
        **totals,
        **({} if cost is None else {"cost": cost}),
        **({"schema_versions": versions} if len(versions) > 1 else {}),  # of a merged dump
        "left_out_by_corpus": counts,
        "left_out_unspellable": {name: why for shard in counted for name, why in shard.left_out.items()},
        "shards_by_engine": dict(Counter(shard.engine for shard in counted)),
        "shards": [shard.listed for shard in counted],
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return the figures of a summary as a line of text; of documents that are left out, how many, by reason."""
    figures = [f"{key} {value:,}" for key, value in summary.items() if isinstance(value, int | float)]
    left_out = {**summary.get("left_out_by_corpus", {}), **Counter(summary.get("left_out_unspellable", {}).values())}
    return "; ".join((*figures, *(f"{reason} {number:,}" for reason, number in left_out.items())))


def _count(dump: Location, shard: ShardPlan) -> _Counted:
    path = shard.path(dump)
    try:
        digest = check_seal(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it and run the same command again, which makes that shard again") from error
    with open_parquet(path) as file:
        metadata = shard_metadata(path, file.schema_arrow)
        num_bytes, num_ends = num_supervised(file)
        num_records = file.metadata.num_rows
    if metadata[Key.SHARD_SHA256] != shard.sha256:  # written late, by a process from before the dump was extended
        raise ValueError(f"{path} holds other documents than planned; delete it and run `bld teacher` again")
    left_out = json.loads(metadata[Key.LEFT_OUT])
    size = path.stat().st_size
    counts = {
        "documents": shard.num_documents - len(left_out),
        "records": num_records,
        "bytes": num_bytes,
        "positions": num_bytes + num_ends,
        "teacher_tokens": int(metadata[Key.TEACHER_TOKENS]),
        "computed_tokens": int(metadata[Key.COMPUTED_TOKENS]),
        "stored_bytes": size,
    }
    listed = {"name": path.name, "bytes": size, "sha256": digest}
    return _Counted(counts, left_out, metadata[Key.ENGINE], int(metadata[Key.SCHEMA_VERSION]), listed)
