"""How many of the student's tokens each record has, in how many pieces: known before training, so that every rank can
plan all batches without their text.

Counted once for a dump and a tokenizer, by all ranks in parallel, a shard at a time, and kept in the run's folder:

    lengths/part-00003.parquet   absent or complete, and sealed; its metadata says what was counted with what

Shape legend: S shards, U pieces of all shards in turn (a record that cannot be used counts as one), C records of
several pieces.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime import log
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from schemas import dump_files
from schemas.dump_files import Key
from schemas.file_seal import check_seal
from schemas.record import Question, Record
from schemas.shard import commit_shard
from stage2_student.data.encode import Tokenizer, TurnsLeftOut, count_pieces

_GROUP = 256  # records that are encoded together: the tokenizer shares them among the cores
_KEY = Key.COUNTED_OF.encode()
_SCHEMA = pa.schema(
    [
        pa.field("num_tokens", pa.list_(pa.int32())),  # of each piece; empty where it cannot be used
        pa.field("left_out", pa.string()),  # then: why
        pa.field("num_bytes", pa.int64()),  # supervised
        pa.field("continues", pa.bool_()),
        pa.field("renderings", pa.int32()),
        pa.field(
            "turns_left_out",
            pa.list_(pa.struct({"reason": pa.string(), "turns": pa.int32(), "num_bytes": pa.int64()})),
        ),
    ]
)
_MAY_LACK = {"renderings": 1, "turns_left_out": []}  # what earlier releases did not count, which used chats whole


class Asking(Protocol):
    """What is needed of `stage2_student.data.reader.DumpReader`."""

    @property
    def num_shards(self) -> int: ...
    def questions(self, shard: int) -> Iterator[Question | Record]: ...


class Counted(NamedTuple):
    """What there is to know of a record.

    Attributes:
        tokens: of each of its pieces, the start token included; empty where it cannot be used.
        reason: then why.
        num_bytes: that it supervises; END is not one.
        continues: it is a window of the same document as the record before it.
        renderings: of a chat, how often it is written, each time with other turns supervised.
        turns_left_out: of a chat that can be used, those of its turns that cannot.
    """

    tokens: tuple[int, ...]
    reason: str | None = None
    num_bytes: int = 0
    continues: bool = False
    renderings: int = 1
    turns_left_out: tuple[TurnsLeftOut, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether it, or a rendering of it, is too long for the student."""
        return len(self.tokens) > self.renderings


class Unusable(NamedTuple):
    """Records that are left out for one reason, and the bytes that they supervise."""

    records: int
    num_bytes: int


@dataclass(frozen=True)
class Lengths:
    """Of all records of a dump, in the order of its shards."""

    counts_S: np.ndarray  # int64, pieces of each shard
    tokens_U: np.ndarray  # int32, the start token included; 0: it cannot be used
    continues_U: np.ndarray  # bool, of the same document as the piece before
    first_C: np.ndarray  # int64, the first piece of each record that has several
    pieces_C: np.ndarray  # int64, how many
    num_bytes: int  # supervised, of all records
    reasons: dict[int, str] = field(default_factory=dict)  # of U: why a record cannot be used
    bytes_left_out: Counter[str] = field(default_factory=Counter)  # supervised, by reason
    num_cut: int = 0  # records that are cut
    num_cut_pieces: int = 0  # into so many
    num_rendered: int = 0  # chats with several renderings
    num_renderings: int = 0  # of these
    turns_left_out: Mapping[str, TurnsLeftOut] = field(default_factory=dict)  # of records that can be used, by reason

    @property
    def num_records(self) -> int:
        return len(self.tokens_U) - int((self.pieces_C - 1).sum())

    def usable(self, max_tokens: int) -> np.ndarray:
        """U, bool: which pieces can be trained on."""
        return (self.tokens_U > 0) & (self.tokens_U <= max_tokens)

    def unusable(self) -> dict[str, Unusable]:
        """What cannot be used, by reason."""
        records = Counter(self.reasons.values())
        return {reason: Unusable(count, self.bytes_left_out[reason]) for reason, count in records.most_common()}

    @property
    def num_unused_bytes(self) -> int:
        """Supervised, of records and turns that are left out."""
        return sum(self.bytes_left_out.values()) + sum(turns.num_bytes for turns in self.turns_left_out.values())

    def rows(self, shard_W: np.ndarray, unit_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record of its shard, piece of that record) of the `unit`-th piece of each shard; W each, int64."""
        first_S = np.cumsum(self.counts_S) - self.counts_S
        record_W, piece_W = self._records(first_S[shard_W] + unit_W)
        return record_W - self._records(first_S[shard_W])[0], piece_W

    def _records(self, unit_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record of all shards, piece of it) of each piece."""
        extra_C = np.append(0, np.cumsum(self.pieces_C - 1))
        before_W = (
            np.searchsorted(self.first_C, unit_W, side="right") - 1
        )  # the last record of several pieces that has begun
        piece_W = np.zeros_like(unit_W)
        begun = before_W >= 0
        since_W = unit_W[begun] - self.first_C[before_W[begun]]
        last_W = self.pieces_C[before_W[begun]] - 1
        piece_W[begun] = np.where(since_W <= last_W, since_W, 0)
        passed_W = extra_C[np.maximum(before_W, 0)]
        passed_W[begun] += np.minimum(since_W, last_W)
        return unit_W - passed_W, piece_W

    @classmethod
    def of(cls, shards: Iterable[Sequence[Counted]]) -> "Lengths":
        """Of what was counted, shard by shard."""
        counts: list[int] = []
        tokens, continues, pieces = ([np.empty(0, dtype=kind)] for kind in (np.int32, bool, np.int32))
        reasons: dict[int, str] = {}
        left_out: Counter[str] = Counter()
        turns: dict[str, TurnsLeftOut] = {}
        before = num_bytes = 0
        rendered: list[int] = []
        cut: list[int] = []
        for shard in shards:
            sizes = np.array([max(len(record.tokens), 1) for record in shard], dtype=np.int32)
            first = before + np.cumsum(sizes) - sizes
            for at, record in zip(first.tolist(), shard, strict=True):
                if record.reason is not None:
                    reasons[at] = record.reason
                    left_out[record.reason] += record.num_bytes
            tokens.append(np.array([n for record in shard for n in record.tokens or (0,)], dtype=np.int32))
            flags = np.ones(int(sizes.sum()), dtype=bool)
            flags[first - before] = [record.continues for record in shard]
            continues.append(flags)
            pieces.append(sizes)
            counts.append(len(flags))
            before += len(flags)
            num_bytes += sum(record.num_bytes for record in shard)
            cut += [len(record.tokens) for record in shard if record.is_cut]
            rendered += [record.renderings for record in shard if record.renderings > 1]
            for found in (found for record in shard for found in record.turns_left_out):
                known = turns.get(found.reason, TurnsLeftOut(found.reason, 0, 0))
                turns[found.reason] = TurnsLeftOut(
                    found.reason, known.turns + found.turns, known.num_bytes + found.num_bytes
                )
        pieces_N = np.concatenate(pieces)
        first_N = np.cumsum(pieces_N, dtype=np.int64) - pieces_N
        several_N = pieces_N > 1
        return cls(
            counts_S=np.array(counts, dtype=np.int64),
            tokens_U=np.concatenate(tokens),
            continues_U=np.concatenate(continues),
            first_C=first_N[several_N],
            pieces_C=pieces_N[several_N].astype(np.int64),
            num_bytes=num_bytes,
            reasons=reasons,
            bytes_left_out=left_out,
            num_cut=len(cut),
            num_cut_pieces=sum(cut),
            num_rendered=len(rendered),
            num_renderings=sum(rendered),
            turns_left_out=turns,
        )


def count_shard(
    reader: Asking,
    shard: int,
    tokenizer: Tokenizer,
    chat: ChatTokenizer | None = None,
    max_tokens: int | None = None,
    by_turn: bool = True,
) -> Iterator[Counted]:
    """Of each record of a shard. `max_tokens`: longer ones are cut; None: none is. `by_turn`: as of `count_pieces`."""
    return count_questions(reader.questions(shard), tokenizer, chat, max_tokens, by_turn)


def count_questions(
    asked: Iterable[Question | Record],
    tokenizer: Tokenizer,
    chat: ChatTokenizer | None,
    max_tokens: int | None,
    by_turn: bool = True,
) -> Iterator[Counted]:
    """Of each of these, in turn."""
    questions = iter(asked)
    before: str | None = None
    while group := list(islice(questions, _GROUP)):
        for record, found in zip(group, count_pieces(group, tokenizer, chat, max_tokens, by_turn), strict=True):
            num_bytes = sum(segment.length for segment in record.segments)
            continues = record.window_start > 0 and record.doc_id == before
            if isinstance(found, str):
                yield Counted((), found, num_bytes, continues)
            else:
                yield Counted(found.tokens, None, num_bytes, continues, found.renderings, found.left_out)
            before = record.doc_id


def keep_counts(folder: Path, key: str, shards: Iterable[int], count: Callable[[int], Iterable[Counted]]) -> None:
    """Count those of these shards that are not there yet under this key.

    Args:
        key: what decides the counts: dump, tokenizer, and where records are cut.
        count: counts a shard, as `count_shard` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        path = _path(folder, shard)
        if path.exists() and _is_sound(path, key):
            continue
        rows = [(*one[:-1], [turns._asdict() for turns in one.turns_left_out]) for one in count(shard)]
        table = pa.Table.from_pylist([dict(zip(_SCHEMA.names, row, strict=True)) for row in rows], _SCHEMA)
        commit_shard(table.replace_schema_metadata({_KEY: key.encode()}), path, zstd_level=3)


def are_counted(folder: Path, num_shards: int, key: str) -> bool:
    """Whether `keep_counts` has written all of so many shards, and under this key."""
    paths = [_path(folder, shard) for shard in range(num_shards)]
    return bool(paths) and all(path.exists() and _is_sound(path, key) for path in paths)


def kept_counts(folder: Path, num_shards: int) -> Lengths:
    """What `keep_counts` has written of all shards."""
    return Lengths.of(_read(_path(folder, shard)) for shard in range(num_shards))


def _path(folder: Path, shard: int) -> Path:
    return folder / dump_files.shard_name(shard)


def _is_sound(path: Path, key: str) -> bool:
    try:
        check_seal(path)
    except ValueError as error:
        log.warning(f"{error}; counting its tokens again")
        return False
    return bool(pq.read_schema(path).metadata[_KEY].decode() == key)


def _read(path: Path) -> list[Counted]:
    rows = (_MAY_LACK | row for row in pq.read_table(path, page_checksum_verification=True).to_pylist())
    return [
        Counted(
            tuple(row["num_tokens"]),
            row["left_out"],
            row["num_bytes"],
            row["continues"],
            row["renderings"],
            tuple(TurnsLeftOut(**turns) for turns in row["turns_left_out"]),
        )
        for row in rows
    ]
