"""A shard before it is written: the windows and sparse targets that its records are made of, and how it is written.

It travels to the process that writes it (`stage1_teacher.coordination.shard_writers`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from schemas import SCHEMA_VERSION
from schemas.columns import MEASURES
from schemas.shard import commit_shard, to_table
from schemas.storage.locations import Location
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.sparse_targets import SparseTargets
from stage1_teacher.targets.assembly import assemble


@dataclass
class Draft:
    """The windows of a shard and their sparse targets, as they come; picklable."""

    token_lengths: np.ndarray  # bytes of each token id
    exact: bool  # every number is stored as float32
    version: int = SCHEMA_VERSION  # of the dump's format
    windows: list[tuple[EncodedWindow, list[SparseTargets]]] = field(default_factory=list)

    def write(self, path: Location, identity: Mapping[str, object], extra: Mapping[str, str], zstd_level: int) -> int:
        """Round, compress and commit the shard, unless it exists; returns its size in bytes.

        Args:
            identity: the shard's, see `schemas.manifest.shard_identity`.
            extra: metadata by key.
        """
        records = [assemble(window, spans, self.token_lengths, self.exact) for window, spans in self.windows]
        table = to_table(records, dict(identity), self.version)
        added = {key.encode(): value.encode() for key, value in extra.items()}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **added})
        return commit_shard(table, path, zstd_level, first=True)


class Sums(NamedTuple):
    """Positions, and the probability mass that is dropped there and that lies in tails."""

    positions: int
    dropped: float
    tail: float


def sums(spans: Sequence[SparseTargets]) -> Sums:
    """Sum up some spans."""
    of_dropped = [column.name for column in MEASURES].index("dropped")
    num_positions, dropped, tail = 0, 0.0, 0.0
    for of_span in spans:
        counts_P = of_span.entries.counts_P.astype(np.int64)
        num_positions += len(counts_P)
        dropped += float(of_span.measures_MP[of_dropped].sum(dtype=np.float64))
        if len(counts_P):
            kept_P = np.add.reduceat(of_span.entries.probs_E, counts_P.cumsum() - counts_P)
            tail += float(np.maximum(1.0 - kept_P, 0.0).sum())
    return Sums(num_positions, dropped, tail)
