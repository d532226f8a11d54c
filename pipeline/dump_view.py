"""What a dump says, document by document and position by position. Shards are streamed, a document at a time."""

import difflib
import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from schemas import END
from schemas.manifest import Manifest, flatten
from schemas.record import Record
from schemas.shard import read_shard
from schemas.store import Location, names, open_parquet

ENTROPY_BINS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.1)  # bits; 257 classes hold at most 8.006


@dataclass(frozen=True)
class Position:
    """One position of a document. `offset` is in bytes of the whole document; shares and probabilities are 0..1.

    Attributes:
        token: the teacher token that starts here, None inside one and at END.
        token_logprob: nats of that token, given those before it.
        symbols: the stored (symbol, probability), as they are stored: most probable first.
        surprise_bits: -log2 of what the target gives the realised symbol.
        entropy_bits: of the target, its tail counted as one class.
    """

    offset: int
    realised: int
    token_starts: bool
    token: bytes | None
    token_logprob: float | None
    symbols: list[tuple[int, float]]
    tail: float
    dropped: float
    token_end: float
    doubt: float
    surprise_bits: float
    entropy_bits: float


class Decoded(NamedTuple):
    """A record's targets as arrays over its P positions, float64; `starts_P` is where a position's entries start."""

    starts_P: np.ndarray
    probs_E: np.ndarray
    tail_P: np.ndarray
    surprise_bits_P: np.ndarray
    entropy_bits_P: np.ndarray


def decode(record: Record) -> Decoded:
    """A record's probabilities, tails, surprises and entropies."""
    counts_P = record.entry_counts.astype(np.int64)
    starts_P = np.cumsum(counts_P) - counts_P
    logprobs_E = record.logprobs.astype(np.float64)
    probs_E = np.exp(logprobs_E)
    if not len(counts_P):
        return Decoded(starts_P, probs_E, *(np.empty(0) for _ in range(3)))
    tail_P = np.maximum(1.0 - np.add.reduceat(probs_E, starts_P), 0.0)
    position_E = np.repeat(np.arange(len(counts_P)), counts_P)
    is_realised_E = record.symbols == record.realised()[position_E]
    surprise_bits_P = np.full(len(counts_P), math.inf)  # the format stores it always: what stays inf is a spoiled shard
    surprise_bits_P[position_E[is_realised_E]] = np.maximum(-logprobs_E[is_realised_E], 0.0) / math.log(2)
    tail_nats_P = tail_P * np.log(np.where(tail_P > 0, tail_P, 1.0))
    entropy_bits_P = -(np.add.reduceat(probs_E * logprobs_E, starts_P) + tail_nats_P) / math.log(2)
    return Decoded(starts_P, probs_E, tail_P, surprise_bits_P, np.maximum(entropy_bits_P, 0.0))


def offsets(record: Record) -> list[int]:
    """Byte offset, in the record, of each of its positions."""
    return [s.start + i for s in record.segments for i in range(s.num_positions)]


def positions(record: Record) -> Iterator[Position]:
    """The positions of one record, in order."""
    edges = [0, *np.cumsum(record.teacher_token_lengths).tolist()]
    tokens = {
        start: (record.document[start:end], float(logprob))
        for (start, end), logprob in zip(pairwise(edges), record.teacher_token_logprobs, strict=True)
    }
    decoded, realised = decode(record), record.realised()
    for index, offset in enumerate(offsets(record)):
        start = int(decoded.starts_P[index])
        entries = slice(start, start + int(record.entry_counts[index]))
        is_end = realised[index] == END
        token, logprob = (None, None) if is_end else tokens.get(offset, (None, None))
        yield Position(
            offset=record.window_start + offset,
            realised=int(realised[index]),
            token_starts=bool(is_end) or offset in tokens,
            token=token,
            token_logprob=logprob,
            symbols=list(zip(record.symbols[entries].tolist(), decoded.probs_E[entries].tolist(), strict=True)),
            tail=float(decoded.tail_P[index]),
            dropped=float(record.dropped[index]),
            token_end=float(record.token_end[index]),
            doubt=float(record.doubt[index]),
            surprise_bits=float(decoded.surprise_bits_P[index]),
            entropy_bits=float(decoded.entropy_bits_P[index]),
        )


@dataclass(frozen=True)
class DumpDocument:
    """A document with all its windows."""

    doc_id: str
    records: tuple[Record, ...]

    @property
    def text(self) -> bytes:
        """The document's bytes; windows overlap, and agree where they do."""
        text = bytearray()
        for record in self.records:
            text[record.window_start :] = record.document
        return bytes(text)

    @property
    def messages(self) -> list["Said"]:
        """Of a chat, its messages in order; empty for plain text. Windows overlap by whole messages, and agree where they do."""
        messages: list[Said] = []
        for record in self.records:
            heard = messages[-1].end if messages else -1
            messages += [message for message in said(record) if message.end > heard]
        return messages

    def positions(self) -> Iterator[Position]:
        for record in self.records:
            yield from positions(record)


class Said(NamedTuple):
    """A message of a chat: who says it, from which byte of the document on, and what."""

    role: str
    start: int
    content: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.content)


def said(record: Record) -> list[Said]:
    """The messages of a record that is a chat; empty for plain text."""
    starts = np.cumsum([0, *record.message_lengths]).tolist()
    return [
        Said(role, record.window_start + start, record.document[start:end])
        for role, (start, end) in zip(record.message_roles, pairwise(starts), strict=True)
    ]


def records(dump: Location) -> Iterator[Record]:
    """The records of the shards that exist, in order. Raises ValueError where the folder is not a dump."""
    for path in complete_shards(dump):
        yield from read_shard(path)


def complete_shards(dump: Location) -> list[Location]:
    """The planned shards that exist, in order."""
    there = names(dump / "shards")
    return [path for path in (shard.path(dump) for shard in Manifest.load(dump).shards) if path.name in there]


def documents(dump: Location) -> Iterator[DumpDocument]:
    """The documents of the shards that exist, in order. A window that starts at 0 starts a document, whatever its name."""
    windows: list[Record] = []
    for record in records(dump):
        if windows and (record.window_start == 0 or record.doc_id != windows[0].doc_id):
            yield DumpDocument(windows[0].doc_id, tuple(windows))
            windows = []
        windows.append(record)
    if windows:
        yield DumpDocument(windows[0].doc_id, tuple(windows))


def find_document(dump: Location, doc_id: str | None) -> DumpDocument:
    """The first document of that name; with None the first of all. Raises ValueError, naming near ids, where there is none."""
    for document in documents(dump):
        if doc_id is None or document.doc_id == doc_id:
            return document
    if doc_id is None:
        raise ValueError(f"{dump} holds no document yet: run `bld teacher` first")
    ids = (record.doc_id for record in records(dump))
    near = heapq.nlargest(3, ((difflib.SequenceMatcher(None, doc_id, name).ratio(), name) for name in ids))
    names = ", ".join(dict.fromkeys(name for _, name in near)) or "none: no shard is there yet"
    raise ValueError(f"{dump} holds no document {doc_id!r}; the nearest ids: {names}")


class Surprising(NamedTuple):
    """A document, or one byte of it, and how little the teacher expected it."""

    bits: float  # of a document: per byte
    doc_id: str
    offset: int  # of a document: 0
    context: bytes  # of a position: the bytes before it; of a document: its first bytes
    position: Position | None


CONTEXT_BYTES = 32


def worst_documents(dump: Location, number: int) -> list[Surprising]:
    """The documents of most bits per byte under their targets, the worst first; END is not a byte."""

    def scores() -> Iterator[tuple[float, int, Surprising]]:
        for index, document in enumerate(documents(dump)):
            num_bytes = sum(s.length for record in document.records for s in record.segments)
            bits = sum(float(decode(r).surprise_bits_P[r.realised() != END].sum()) for r in document.records)
            mean = bits / max(num_bytes, 1)
            yield mean, -index, Surprising(mean, document.doc_id, 0, document.text[: 2 * CONTEXT_BYTES], None)

    return [found for *_, found in heapq.nlargest(number, scores())]


def worst_positions(dump: Location, number: int) -> list[Surprising]:
    """The positions whose realised symbol had the least probability, the worst first."""

    def scores() -> Iterator[tuple[float, int, Record, int]]:
        count = 0
        for record in records(dump):
            surprise_bits_P = decode(record).surprise_bits_P
            # Only a record's own worst can be among the dump's worst: the heap sees `number` of each.
            for index in np.argsort(-surprise_bits_P, kind="stable")[:number].tolist():
                count += 1
                yield float(surprise_bits_P[index]), -count, record, index

    return [_surprising(bits, record, index) for bits, _, record, index in heapq.nlargest(number, scores())]


def _surprising(bits: float, record: Record, index: int) -> Surprising:
    offset = offsets(record)[index]
    context = record.document[max(0, offset - CONTEXT_BYTES) : offset]
    position = list(positions(record))[index]
    return Surprising(bits, record.doc_id, record.window_start + offset, context, position)


class Occurrence(NamedTuple):
    """Where a byte string stands in a document, and the positions of its bytes that are supervised."""

    doc_id: str
    offset: int
    before: bytes
    after: bytes
    positions: list[Position]


def find(dump: Location, wanted: bytes) -> Iterator[Occurrence]:
    """Each place where `wanted` stands in a document, overlapping ones included."""
    for document in documents(dump):
        text = document.text
        start = text.find(wanted)
        if start < 0:
            continue
        by_offset = {p.offset: p for p in document.positions() if p.realised != END}
        while start >= 0:
            end = start + len(wanted)
            yield Occurrence(
                document.doc_id,
                start,
                text[max(0, start - CONTEXT_BYTES) : start],
                text[end : end + CONTEXT_BYTES],
                [by_offset[offset] for offset in range(start, end) if offset in by_offset],
            )
            start = text.find(wanted, start + 1)


def summarise(dump: Location) -> dict[str, Any]:
    """Counts, means and histograms over the shards that exist; keys say their units."""
    manifest, done = Manifest.load(dump), complete_shards(dump)
    sums: Counter[str] = Counter()
    entry_counts: Counter[int] = Counter()
    entropy_counts = np.zeros(len(ENTROPY_BINS) - 1, dtype=np.int64)
    tail = nats = entropy = doubt = token_end = 0.0
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
            doubt += float(record.doubt.sum(dtype=np.float64))
            token_end += float(record.token_end.sum(dtype=np.float64))
    stored = sum(path.stat().st_size for path in done)
    each, byte = max(sums["positions"], 1), max(sums["bytes"], 1)
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
        "stored_bytes": stored,
        "stored_bytes_per_text_byte": stored / byte,
        "largest_shard_bytes": max((path.stat().st_size for path in done), default=0),
        "entries_per_position": sum(k * v for k, v in entry_counts.items()) / each,
        "mean_tail": tail / each,
        "mean_token_end": token_end / each,
        "mean_doubt": doubt / each,
        "mean_entropy_bits": entropy / each,
        "target_bits_per_byte": nats / (byte * math.log(2)),
        "column_bytes": column_bytes(done),
        "entry_count_positions": dict(sorted(entry_counts.items())),
        "entropy_bits_positions": {
            f"{low:g}-{high:g}": int(number)
            for (low, high), number in zip(pairwise(ENTROPY_BINS), entropy_counts, strict=True)
        },
    }


def _num_tokens(record: Record) -> int:
    """Teacher tokens of a record; of a chat, those that lie in its segments."""
    if not record.message_roles:
        return len(record.teacher_token_lengths)
    starts = np.cumsum(record.teacher_token_lengths) - record.teacher_token_lengths
    return sum(int(((starts >= s.start) & (starts < s.start + s.length)).sum()) for s in record.segments)


def column_bytes(shards: list[Location]) -> dict[str, int]:
    """Compressed bytes of each column over some shards, the largest first; read from the files' footers."""
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
    path = dump / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")).get("left_out_unspellable", {}) if path.exists() else {}
