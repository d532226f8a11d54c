"""How many of the student's tokens each record has: known before training, so that every rank can plan all batches without their text.

Counted once for a dump and a tokenizer, by all ranks in parallel, a shard at a time, and kept in the run's folder:

    lengths/part-00003.parquet   absent or complete, and sealed; its metadata says what was counted with what

Shape legend: S shards, N records of all shards in turn.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat import ChatTokenizer
from pipeline.logs import warn
from schemas.record import Question, Record
from schemas.seal import check_seal
from schemas.shard import commit_shard
from stage2_student.encode import Tokenizer, count_tokens

_GROUP = 256  # records that are encoded together: the tokenizer shares them among the cores
_KEY = b"bld.counted_of"
_SCHEMA = pa.schema([pa.field("num_tokens", pa.int32()), pa.field("left_out", pa.string())])  # one of them is null


class Asking(Protocol):
    """What is needed of `stage2_student.reader.DumpReader`."""

    @property
    def num_shards(self) -> int: ...
    def questions(self, shard: int) -> Iterator[Question | Record]: ...


@dataclass(frozen=True)
class Lengths:
    """Of all records of a dump, in the order of its shards."""

    counts_S: np.ndarray  # int64, records of each shard
    tokens_N: np.ndarray  # int32, the start token included; 0: it cannot be used
    reasons: dict[int, str]  # of N: why a record cannot be used

    def usable(self, max_tokens: int) -> np.ndarray:
        """Bool: which records can be trained on."""
        return (self.tokens_N > 0) & (self.tokens_N <= max_tokens)

    @classmethod
    def of(cls, shards: Iterable[Sequence[int | str]]) -> "Lengths":
        """Of the tokens of each record, or the reason why it cannot be used, shard by shard."""
        counts: list[int] = []
        tokens = [np.empty(0, dtype=np.int32)]
        reasons: dict[int, str] = {}
        before = 0
        for shard in shards:
            reasons |= {before + row: found for row, found in enumerate(shard) if isinstance(found, str)}
            tokens.append(np.array([0 if isinstance(found, str) else found for found in shard], dtype=np.int32))
            counts.append(len(shard))
            before += len(shard)
        return cls(np.array(counts, dtype=np.int64), np.concatenate(tokens), reasons)


def count_shard(
    reader: Asking, shard: int, tokenizer: Tokenizer, chat: ChatTokenizer | None = None
) -> Iterator[int | str]:
    """Of each record of a shard its tokens, or the reason why it cannot be used."""
    questions = reader.questions(shard)
    while group := list(islice(questions, _GROUP)):
        yield from count_tokens(group, tokenizer, chat)


def keep_counts(
    folder: Path, key: str, reader: Asking, tokenizer: Tokenizer, chat: ChatTokenizer | None, part: int, parts: int
) -> None:
    """Count, of every `parts`-th shard from `part`, what is not there yet.

    Args:
        key: what decides the counts: dump and tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(part, reader.num_shards, parts):
        path = _path(folder, shard)
        if path.exists() and _is_sound(path, key):
            continue
        found = list(count_shard(reader, shard, tokenizer, chat))
        columns = [
            [None if isinstance(n, str) else n for n in found],
            [n if isinstance(n, str) else None for n in found],
        ]
        table = pa.Table.from_pydict(dict(zip(_SCHEMA.names, columns, strict=True)), _SCHEMA)
        commit_shard(table.replace_schema_metadata({_KEY: key.encode()}), path, zstd_level=3)


def kept_counts(folder: Path, num_shards: int) -> Lengths:
    """What `keep_counts` has written of all shards."""
    return Lengths.of(_read(_path(folder, shard)) for shard in range(num_shards))


def _path(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:05d}.parquet"


def _is_sound(path: Path, key: str) -> bool:
    try:
        check_seal(path)
    except ValueError as error:
        warn(f"{error}; counting its tokens again")
        return False
    return bool(pq.read_schema(path).metadata[_KEY].decode() == key)


def _read(path: Path) -> list[int | str]:
    columns = pq.read_table(path, page_checksum_verification=True).to_pydict()
    return [reason or tokens for tokens, reason in zip(*(columns[name] for name in _SCHEMA.names), strict=True)]
