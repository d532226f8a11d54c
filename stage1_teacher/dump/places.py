"""Places of a plan's shards in the corpus, noted beside the manifest: a resume or another worker goes there directly.

The first process plans, the others find its note. A note counts only for the corpus that it was made from: the same
part of the recipe, and files of the same sizes and times. Without one the corpus is read and the dump planned again,
with the same result. Whatever a note says, the documents of a shard are checked against the plan's hash.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.documents import Document, PlacedDocument
from pipeline.corpus.row import RowPlace
from schemas import dump_files
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.atomic import committed
from schemas.storage.locations import Location, open_parquet

_NUMBERS = [pa.field(name, pa.int64()) for name in RowPlace._fields]
_SCHEMA = pa.schema([*_NUMBERS, pa.field("filtered", pa.large_list(pa.int64()))])


class Note(NamedTuple):
    """Findings of planning beside the shards.

    Attributes:
        inputs: hash of what was planned; see `input_files.plan_sha256`.
        planned: the plan's hash, as in the manifest's identity.
        audited: ids of the documents to audit.
        affordable: how many the dump could afford.
        first_places: place of the first row left out, by reason.
    """

    inputs: str
    planned: str
    audited: list[str]
    affordable: int
    first_places: dict[str, str]


class Places:
    """For each shard of a plan, the place of its first document and the numbers of the rows that filters left out."""

    def __init__(self, places_N4: np.ndarray, filtered: np.ndarray, bounds: np.ndarray) -> None:
        self._places_N4, self._filtered, self._bounds = places_N4, filtered, bounds

    def __len__(self) -> int:
        return len(self._places_N4)

    def start(self, shard: int) -> RowPlace:
        """Return the place of a shard's first document."""
        return RowPlace(*self._places_N4[shard].tolist())

    def filtered(self, shard: int) -> frozenset[int]:
        """Return the numbers of the rows among a shard's that `corpus.exclude` and `corpus.unique` leave out."""
        return frozenset(self._filtered[self._bounds[shard] : self._bounds[shard + 1]].tolist())

    def save(self, dump: Location, note: Note) -> None:
        """Write the note into a dump."""
        columns = [pa.array(column) for column in self._places_N4.T.copy()]
        filtered = pa.LargeListArray.from_arrays(pa.array(self._bounds), pa.array(self._filtered))
        table = pa.table([*columns, filtered], schema=_SCHEMA)
        with committed(dump / dump_files.PLACES) as path:
            pq.write_table(
                table.replace_schema_metadata({dump_files.PLACES_KEY: json.dumps(note._asdict())}),
                path,
                compression="zstd",
            )

    @classmethod
    def load(cls, dump: Location, inputs: str | None, manifest: Manifest) -> tuple[Self, Note] | None:
        """Read a dump's note; None if there is none, it is damaged, or it was made of another corpus or plan."""
        path = dump / dump_files.PLACES
        if inputs is None or not path.exists():
            return None
        try:
            with open_parquet(path) as file:
                note = Note(**json.loads(file.schema_arrow.metadata[dump_files.PLACES_KEY]))
                if (note.inputs, note.planned) != (inputs, manifest.identity["corpus"]["sha256"]):
                    return None
                places = cls._of(file.read())
        except (pa.ArrowException, KeyError, TypeError, ValueError):
            return None
        return (places, note) if len(places) == len(manifest.shards) else None

    @classmethod
    def _of(cls, table: pa.Table) -> Self:
        filtered = table["filtered"].combine_chunks()
        numbers_N4 = np.stack([table[field.name].to_numpy() for field in _NUMBERS], axis=1)
        return cls(numbers_N4, filtered.values.to_numpy(), filtered.offsets.to_numpy())


class PlaceNotes:
    """Collects the places of a plan's shards while it is made."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self._filtered, self._bounds = array("q"), array("q", [0])
        self._open: list[tuple[RowPlace, tuple[int, ...]]] = []  # of documents whose shard is not closed

    def passing(self, placed: Iterable[PlacedDocument]) -> Iterator[Document]:
        for document, place, filtered in placed:
            self._open.append((place, filtered))
            yield document

    def close(self, shard: ShardPlan) -> None:
        """Take note of the next shard, whose documents have passed."""
        places = self._open[: shard.num_documents]
        del self._open[: shard.num_documents]
        self._numbers.extend(places[0][0])
        for _, filtered in places[1:]:  # what was filtered before the first one is not read again
            self._filtered.extend(filtered)
        self._bounds.append(len(self._filtered))

    def places(self) -> Places:
        """Return the places of the shards closed so far."""
        numbers_N4 = np.array(self._numbers, np.int64).reshape(-1, len(_NUMBERS))
        return Places(numbers_N4, np.array(self._filtered, np.int64), np.array(self._bounds, np.int64))
