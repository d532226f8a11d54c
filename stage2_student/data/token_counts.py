"""Student token counts of each record and its pieces, so that each rank can plan all batches without the text.

They are counted once per dump and tokenizer, by all ranks in parallel, one shard at a time, and kept in the run's
folder:

    lengths/part-00003.parquet   absent or complete, and sealed; its metadata says what was counted with what

Shape legend: S shards, U pieces of all shards in turn (an unusable record counts as one), C records of several pieces.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime import log
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from schemas import dump_files
from schemas.dump_files import Key
from schemas.file_seal import check_seal
from schemas.record import Record, RecordText
from schemas.shard import commit_shard
from stage2_student.data.encode import Tokenizer, TurnsLeftOut, count_pieces

_GROUP = 256  # records encoded together: the tokenizer spreads them over the cores
_KEY = Key.COUNTED_OF.encode()
_SCHEMA = pa.schema(
    [
        pa.field("num_tokens", pa.list_(pa.int32())),  # of each piece; empty if the record is unusable
        pa.field("left_out", pa.string()),  # the reason, if it is unusable
        pa.field("num_bytes", pa.int64()),  # supervised
        pa.field("continues", pa.bool_()),
        pa.field("renderings", pa.int32()),
        pa.field(
            "turns_left_out",
            pa.list_(pa.struct({"reason": pa.string(), "turns": pa.int32(), "num_bytes": pa.int64()})),
        ),
        pa.field("piece_bytes", pa.list_(pa.int32())),  # supervised; empty if not counted
    ]
)
_CHUNK = 1 << 24  # pieces summed at a time


class RecordSource(Protocol):
    """The part of `stage2_student.data.reader.DumpReader` needed here."""

    @property
    def num_shards(self) -> int: ...
    def record_texts(self, shard: int) -> Iterator[RecordText | Record]: ...


class Counted(NamedTuple):
    """The counts of one record.

    Attributes:
        tokens: tokens of each of its pieces, including the start token; empty if the record is unusable.
        reason: why it is unusable; None if it is usable.
        num_bytes: supervised bytes; END is not a byte.
        continues: the record is a window of the same document as the record before it.
        renderings: how often a chat is written, each time with other turns supervised.
        turns_left_out: unusable turns of a usable chat.
        piece_bytes: supervised bytes of each of its pieces, if they are counted: of unions.
    """

    tokens: tuple[int, ...]
    reason: str | None = None
    num_bytes: int = 0
    continues: bool = False
    renderings: int = 1
    turns_left_out: tuple[TurnsLeftOut, ...] = ()
    piece_bytes: tuple[int, ...] = ()

    @property
    def is_cut(self) -> bool:
        """True if the record, or a rendering of it, is too long for the student."""
        return len(self.tokens) > self.renderings


class Unusable(NamedTuple):
    """Records left out for one reason, and the bytes they supervise."""

    records: int
    num_bytes: int


class Sums(NamedTuple):
    """Sums over the pieces of a dump. Bytes are 0 if they are not counted."""

    usable: int
    tokens: int
    num_bytes: int
    too_long: int
    tokens_too_long: int
    all_tokens: int


@dataclass(frozen=True)
class Lengths:
    """The counts of all records of a dump, in the order of its shards."""

    counts_S: np.ndarray  # int64, pieces of each shard
    tokens_U: np.ndarray  # int32, including the start token; 0: unusable
    continues_U: np.ndarray  # bool, whether it is of the same document as the piece before
    first_C: np.ndarray  # int64, the first piece of each record with several
    pieces_C: np.ndarray  # int64, the number of pieces of these records
    num_bytes: int  # supervised bytes of all records
    reasons: Mapping[int, str] = field(default_factory=dict)  # index into U -> why the record is unusable
    bytes_left_out: Counter[str] = field(default_factory=Counter)  # supervised bytes, by reason
    num_cut: int = 0  # records cut into pieces
    num_cut_pieces: int = 0  # the number of those pieces
    num_rendered: int = 0  # chats with several renderings
    num_renderings: int = 0  # the number of those renderings
    turns_left_out: Mapping[str, TurnsLeftOut] = field(default_factory=dict)  # of usable records, by reason
    # int64, supervised bytes; empty, or 0, where they are not counted
    bytes_U: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    before_C: np.ndarray | None = None  # int64, pieces after the first one of all records before; None: not yet known

    @property
    def num_records(self) -> int:
        return len(self.tokens_U) - int((self.pieces_C - 1).sum())

    def usable(self, max_tokens: int) -> np.ndarray:
        """Return U, bool: True for pieces that can be trained on."""
        return (self.tokens_U > 0) & (self.tokens_U <= max_tokens)

    def sums(self, max_tokens: int) -> "Sums":
        """Return the sums over all pieces, of which some are read at a time."""
        total = Sums(0, 0, 0, 0, 0, 0)
        for first in range(0, len(self.tokens_U), _CHUNK):
            tokens_W, bytes_W = (of[first : first + _CHUNK] for of in (self.tokens_U, self.bytes_U))
            usable_W, too_long_W = (tokens_W > 0) & (tokens_W <= max_tokens), tokens_W > max_tokens
            found = (
                *(usable_W.sum(), tokens_W[usable_W].sum(dtype=np.int64)),
                bytes_W[usable_W].sum(dtype=np.int64) if len(bytes_W) else 0,
                *(too_long_W.sum(), tokens_W[too_long_W].sum(dtype=np.int64), tokens_W.sum(dtype=np.int64)),
            )
            total = Sums(*(before + int(more) for before, more in zip(total, found, strict=True)))
        return total

    def unusable(self) -> dict[str, Unusable]:
        """Return the unusable records by reason, the most frequent reason first."""
        records = self.reason_counts()
        return {reason: Unusable(count, self.bytes_left_out[reason]) for reason, count in records.most_common()}

    def reason_counts(self) -> Counter[str]:
        """Return the number of unusable records for each reason."""
        counted: Counter[str] = getattr(self.reasons, "counted", lambda: Counter(self.reasons.values()))()
        return counted

    @property
    def num_unused_bytes(self) -> int:
        """Supervised bytes of the records and turns left out."""
        return sum(self.bytes_left_out.values()) + sum(turns.num_bytes for turns in self.turns_left_out.values())

    def rows(self, shard_W: np.ndarray, unit_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Locate the `unit`-th piece of each shard; the arguments are W, int64.

        Returns:
            (record within its shard, piece within that record), each W, int64.
        """
        first_S = np.cumsum(self.counts_S) - self.counts_S
        record_W, piece_W = self._records(first_S[shard_W] + unit_W)
        return record_W - self._records(first_S[shard_W])[0], piece_W

    def _records(self, unit_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (record, numbered through all shards; piece within it) for each piece."""
        # The last record of several pieces that starts at or before each piece.
        before_W = np.searchsorted(self.first_C, unit_W, side="right") - 1
        piece_W = np.zeros_like(unit_W)
        begun = before_W >= 0
        since_W = unit_W[begun] - self.first_C[before_W[begun]]
        last_W = self.pieces_C[before_W[begun]] - 1
        piece_W[begun] = np.where(since_W <= last_W, since_W, 0)
        passed_W = np.zeros_like(unit_W)
        passed_W[begun] = self._extra[before_W[begun]] + np.minimum(since_W, last_W)
        return unit_W - passed_W, piece_W

    @cached_property
    def _extra(self) -> np.ndarray:
        """C, int64: pieces after the first one of all records before."""
        if self.before_C is not None:
            return self.before_C
        extra_C = self.pieces_C - 1
        return np.cumsum(extra_C) - extra_C

    @classmethod
    def of(cls, shards: Iterable[Sequence[Counted]]) -> "Lengths":
        """Collect the counts of all shards, in order."""
        counts: list[int] = []
        tokens, continues, pieces = ([np.empty(0, dtype=kind)] for kind in (np.int32, bool, np.int32))
        piece_bytes: list[int] = []
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
            piece_bytes += [n for record in shard for n in record.piece_bytes or (0,) * max(len(record.tokens), 1)]
            flags = np.ones(int(sizes.sum()), dtype=bool)
            flags[first - before] = [record.continues for record in shard]
            continues.append(flags)
            pieces.append(sizes)
            counts.append(len(flags))
            before += len(flags)
            num_bytes += sum(record.num_bytes for record in shard)
            cut += [len(record.tokens) for record in shard if record.is_cut]
            rendered += [record.renderings for record in shard if record.renderings > 1]
            for reason, num_turns, turn_bytes in (left for record in shard for left in record.turns_left_out):
                total = turns.get(reason, TurnsLeftOut(reason, 0, 0))
                turns[reason] = TurnsLeftOut(reason, total.turns + num_turns, total.num_bytes + turn_bytes)
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
            bytes_U=np.array(piece_bytes, dtype=np.int64),
        )


def count_records(
    records: Iterable[RecordText | Record],
    tokenizer: Tokenizer,
    chat: ChatTokenizer | None = None,
    max_tokens: int | None = None,
    by_turn: bool = True,
    with_bytes: bool = False,
) -> Iterator[Counted]:
    """Count each of these records, in turn.

    Args:
        max_tokens: longer records are cut; None: none is.
        by_turn, with_bytes: as in `count_pieces`.
    """
    remaining = iter(records)
    before: str | None = None
    while group := list(islice(remaining, _GROUP)):
        pieces = count_pieces(group, tokenizer, chat, max_tokens, by_turn, with_bytes)
        for record, counted in zip(group, pieces, strict=True):
            num_bytes = sum(segment.length for segment in record.segments)
            continues = record.window_start > 0 and record.doc_id == before
            if isinstance(counted, str):
                yield Counted((), counted, num_bytes, continues)
            else:
                yield Counted(
                    *(counted.tokens, None, num_bytes, continues, counted.renderings, counted.left_out),
                    piece_bytes=counted.num_bytes,
                )
            before = record.doc_id


def keep_counts(folder: Path, key: str, shards: Iterable[int], count: Callable[[int], Iterable[Counted]]) -> None:
    """Count the given shards that have no stored counts under this key, and store the counts.

    Args:
        key: identifies what decides the counts: dump, tokenizer, and where records are cut.
        count: counts a shard, as `count_records` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        path = part_path(folder, shard)
        if path.exists() and _is_sound(path, key):
            continue
        rows = [_as_row(counted) for counted in count(shard)]
        table = pa.Table.from_pylist(rows, _SCHEMA)
        commit_shard(table.replace_schema_metadata({_KEY: key.encode()}), path, zstd_level=3)


def _as_row(counted: Counted) -> dict[str, Any]:
    row = dict(zip(_SCHEMA.names, counted, strict=True))
    return row | {"turns_left_out": [turns._asdict() for turns in counted.turns_left_out]}


def are_counted(folder: Path, num_shards: int, key: str) -> bool:
    """Return whether `keep_counts` has stored the counts of all `num_shards` shards under this key."""
    paths = [part_path(folder, shard) for shard in range(num_shards)]
    return bool(paths) and all(path.exists() and _is_sound(path, key) for path in paths)


def part_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard's counts."""
    return folder / dump_files.shard_name(shard)


def _is_sound(path: Path, key: str) -> bool:
    try:
        check_seal(path)
    except ValueError as error:
        log.warning(f"{error}; counting its tokens again")
        return False
    return bool(pq.read_schema(path).metadata[_KEY].decode() == key)
