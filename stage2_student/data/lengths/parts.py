"""Token counts as `stage2_student.data.token_counts.keep_counts` stores them, read a shard at a time into arrays.

No record becomes a Python object: a dump may have a thousand million of them.

Shape legend: N records of a shard, U their pieces (an unusable record counts as one), C records of several pieces.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stage2_student.data.encode import TurnsLeftOut
from stage2_student.data.token_counts import part_path


@dataclass(frozen=True)
class Part:
    """The counts of a shard, and its totals."""

    tokens_U: np.ndarray  # int32; 0: unusable
    continues_U: np.ndarray  # bool
    bytes_U: np.ndarray  # int32; 0 where they are not counted
    first_C: np.ndarray  # int64, within the shard
    pieces_C: np.ndarray  # int64
    reasons: dict[int, str]  # piece within the shard -> why its record is unusable
    totals: "Totals"


@dataclass
class Totals:
    """Sums over records, which can be added up."""

    num_bytes: int = 0
    bytes_left_out: Counter[str] = field(default_factory=Counter)
    num_cut: int = 0
    num_cut_pieces: int = 0
    num_rendered: int = 0
    num_renderings: int = 0
    turns_left_out: dict[str, TurnsLeftOut] = field(default_factory=dict)

    def add(self, other: "Totals") -> None:
        """Add another shard's sums to these."""
        for name in ("num_bytes", "num_cut", "num_cut_pieces", "num_rendered", "num_renderings"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bytes_left_out.update(other.bytes_left_out)
        for turns in other.turns_left_out.values():
            _add_turns(self.turns_left_out, turns)


def _add_turns(turns: dict[str, TurnsLeftOut], more: TurnsLeftOut) -> None:
    before = turns.get(more.reason, TurnsLeftOut(more.reason, 0, 0))
    turns[more.reason] = TurnsLeftOut(more.reason, before.turns + more.turns, before.num_bytes + more.num_bytes)


def read_parts(folder: Path, num_shards: int) -> Iterator[Part]:
    """Read the counts of all shards in turn."""
    for shard in range(num_shards):
        yield as_part(pq.read_table(part_path(folder, shard), page_checksum_verification=True))


def as_part(table: pa.Table) -> Part:
    """Turn a shard's table into arrays."""
    columns = {name: table[name].combine_chunks() for name in table.schema.names}
    tokens = columns["num_tokens"]
    counts_N = np.diff(tokens.offsets.to_numpy())
    pieces_N = np.maximum(counts_N, 1)
    first_N = np.cumsum(pieces_N, dtype=np.int64) - pieces_N
    at_V = np.repeat(first_N - (np.cumsum(counts_N) - counts_N), counts_N) + np.arange(counts_N.sum())
    tokens_U = np.zeros(int(pieces_N.sum()), dtype=np.int32)
    tokens_U[at_V] = _values(tokens)
    bytes_U = np.zeros_like(tokens_U)
    if "piece_bytes" in columns and len(piece_bytes := _values(columns["piece_bytes"])):
        bytes_U[at_V] = piece_bytes
    continues_U = np.ones(len(tokens_U), dtype=bool)
    continues_U[first_N] = columns["continues"].to_numpy(zero_copy_only=False)
    several_N = pieces_N > 1
    bytes_N = columns["num_bytes"].to_numpy()
    unusable = np.flatnonzero(columns["left_out"].is_valid().to_numpy(zero_copy_only=False))
    reasons = dict(
        zip(first_N[unusable].tolist(), columns["left_out"].take(pa.array(unusable)).to_pylist(), strict=True)
    )
    left_out: Counter[str] = Counter()
    for reason, num_bytes in zip(reasons.values(), bytes_N[unusable].tolist(), strict=True):
        left_out[reason] += num_bytes
    renderings_N = columns["renderings"].to_numpy() if "renderings" in columns else np.ones(len(counts_N), dtype=int)
    cut_N, rendered_N = counts_N > renderings_N, renderings_N > 1
    turns: dict[str, TurnsLeftOut] = {}
    for values in columns["turns_left_out"].flatten().to_pylist() if "turns_left_out" in columns else []:
        _add_turns(turns, TurnsLeftOut(**values))
    totals = Totals(
        num_bytes=int(bytes_N.sum()),
        bytes_left_out=left_out,
        num_cut=int(cut_N.sum()),
        num_cut_pieces=int(counts_N[cut_N].sum()),
        num_rendered=int(rendered_N.sum()),
        num_renderings=int(renderings_N[rendered_N].sum()),
        turns_left_out=turns,
    )
    several = first_N[several_N], pieces_N[several_N].astype(np.int64)
    return Part(tokens_U, continues_U, bytes_U, *several, reasons, totals)


def _values(lists: pa.ListArray) -> np.ndarray:
    """Return the elements of all lists in turn."""
    values: np.ndarray = lists.flatten().to_numpy(zero_copy_only=False)
    return values
