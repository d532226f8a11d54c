"""Statistics of a dump: counts, means and histograms over the shards that exist."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.dumps.positions import decode
from pipeline.dumps.view import complete_shards, documents
from schemas import END, dump_files
from schemas.columns import MEASURES
from schemas.manifest import Manifest, flatten, read_json
from schemas.record import Record
from schemas.storage.locations import Location, open_parquet

ENTROPY_BINS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.1)  # bits; 257 classes hold at most 8.006


def dump_statistics(dump: Location) -> dict[str, Any]:
    """Compute counts, means and histograms over the shards that exist; keys name their units."""
    manifest, done = Manifest.load(dump), complete_shards(dump)
    sums: Counter[str] = Counter()
    entry_counts: Counter[int] = Counter()
    entropy_counts = np.zeros(len(ENTROPY_BINS) - 1, dtype=np.int64)
    measured = dict.fromkeys((column.name for column in MEASURES), 0.0)
    tail = nats = entropy = token_tail = 0.0
    for document in documents(dump):
        sums["documents"] += 1
        for record in document.records:
            decoded = decode(record)
            sums["records"] += 1
            sums["bytes"] += sum(s.length for s in record.segments)
            sums["positions"] += record.num_positions
            sums["teacher_tokens"] += _num_tokens(record)
            entry_counts.update(record.entry_counts.tolist())
            entropy_counts += np.histogram(decoded.entropy_bits_P, bins=ENTROPY_BINS)[0]
            tail += float(decoded.tail_P.sum())
            nats += float(decoded.surprise_bits_P[record.realised() != END].sum()) * math.log(2)
            entropy += float(decoded.entropy_bits_P.sum())
            for name, value_P in record.measures.items():
                measured[name] += float(value_P.sum(dtype=np.float64))
            if record.tokens is not None:
                has_T = record.tokens.counts > 0
                sums["tokens_with_alternatives"] += int(has_T.sum())
                sums["alternatives"] += len(record.tokens.ids)
                token_tail += float(record.tokens.tails[has_T].sum())
    stored = [column for column in MEASURES if column.is_stored(manifest.identity)]
    stored_bytes = sum(path.stat().st_size for path in done)
    num_positions, num_bytes = max(sums["positions"], 1), max(sums["bytes"], 1)
    return {
        "identity": flatten(manifest.identity),
        "corpus_counts": manifest.corpus_counts,
        "left_out_unspellable": _left_out(dump),
        "shards_planned": len(manifest.shards),
        "shards_done": len(done),
        "documents": sums["documents"],
        "records": sums["records"],
        "text_bytes": sums["bytes"],
        "positions": sums["positions"],
        "teacher_tokens": sums["teacher_tokens"],
        "stored_bytes": stored_bytes,
        "stored_bytes_per_text_byte": stored_bytes / num_bytes,
        "largest_shard_bytes": max((path.stat().st_size for path in done), default=0),
        "entries_per_position": sum(k * v for k, v in entry_counts.items()) / num_positions,
        "mean_tail": tail / num_positions,
        **{f"mean_{column.name}": measured[column.name] / num_positions for column in stored},
        **(_of_tokens(sums, token_tail) if manifest.has_tokens else {}),
        "mean_entropy_bits": entropy / num_positions,
        "target_bits_per_byte": nats / (num_bytes * math.log(2)),
        "column_bytes": column_bytes(done),
        "entry_count_positions": dict(sorted(entry_counts.items())),
        "entropy_bits_positions": {
            f"{low:g}-{high:g}": int(number)
            for (low, high), number in zip(pairwise(ENTROPY_BINS), entropy_counts, strict=True)
        },
    }


def _of_tokens(sums: Counter[str], tail: float) -> dict[str, float]:
    num_tokens = max(sums["tokens_with_alternatives"], 1)
    return {"alternatives_per_token": sums["alternatives"] / num_tokens, "mean_alternative_tail": tail / num_tokens}


def _num_tokens(record: Record) -> int:
    """Count the teacher tokens of a record; in a chat, only those in its segments."""
    if not record.message_roles:
        return len(record.teacher_token_lengths)
    starts = np.cumsum(record.teacher_token_lengths) - record.teacher_token_lengths
    return sum(int(((starts >= s.start) & (starts < s.start + s.length)).sum()) for s in record.segments)


def column_bytes(shards: list[Location]) -> dict[str, int]:
    """Return each column's compressed bytes over some shards, largest first, from the files' footers."""
    sizes: Counter[str] = Counter()
    for path in shards:
        with open_parquet(path) as file:
            footer = file.metadata
        for group in range(footer.num_row_groups):
            for index in range(footer.num_columns):
                column = footer.row_group(group).column(index)
                sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return dict(sizes.most_common())


def _left_out(dump: Location) -> dict[str, str]:
    path = dump / dump_files.SUMMARY
    return dict(read_json(path).get("left_out_unspellable", {})) if path.exists() else {}
