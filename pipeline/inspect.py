"""A look into a dump: its summary, or one document position by position. Shards are streamed, a few records at once."""

import difflib
import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from schemas import END
from schemas.manifest import Manifest, flatten
from schemas.shard import Record, read_shard

_NAMES = {END: "END", 0x20: "␠", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Position:
    """One position of a document. `offset` is in bytes of the whole document; shares and probabilities are 0..1."""

    offset: int
    realised: int
    token_starts: bool
    symbols: list[tuple[int, float]]
    tail: float
    dropped: float
    token_end: float
    doubt: float


def records(dump: Path) -> Iterator[Record]:
    """The records of the shards that exist, in order. Raises ValueError where the folder is not a dump."""
    for shard in Manifest.load(dump).shards:
        path = shard.path(dump)
        if path.exists():
            yield from read_shard(path)


def symbol_name(symbol: int) -> str:
    """A symbol to read: `a`, `␠`, `\\n`, `c3`, `END`."""
    if symbol in _NAMES:
        return _NAMES[symbol]
    return chr(symbol) if 0x20 < symbol < 0x7F else f"{symbol:02x}"


def document_records(dump: Path, doc_id: str) -> list[Record]:
    """The windows of one document. Raises ValueError, naming near ids, where the dump does not hold it."""
    found: list[Record] = []
    for record in records(dump):
        if record.doc_id == doc_id:
            found.append(record)
        elif found:  # the windows of a document follow each other
            break
    if found:
        return found
    ids = (record.doc_id for record in records(dump))
    near = heapq.nlargest(3, ((difflib.SequenceMatcher(None, doc_id, name).ratio(), name) for name in ids))
    names = ", ".join(dict.fromkeys(name for _, name in near)) or "none: no shard is there yet"
    raise ValueError(f"{dump} holds no document {doc_id!r}; the nearest ids: {names}")


def positions(record: Record) -> Iterator[Position]:
    """The positions of one record, in order."""
    edges = {0, *np.cumsum(record.teacher_token_lengths).tolist()}
    ends = np.cumsum(record.entry_counts.astype(np.int64))
    offsets = [s.start + i for s in record.segments for i in range(s.num_positions)]
    realised = record.realised()
    for index, offset in enumerate(offsets):
        entries = slice(int(ends[index]) - int(record.entry_counts[index]), int(ends[index]))
        probabilities = np.exp(record.logprobs[entries].astype(np.float64)).tolist()
        yield Position(
            offset=record.window_start + offset,
            realised=int(realised[index]),
            token_starts=offset in edges,
            symbols=sorted(
                zip(record.symbols[entries].tolist(), probabilities, strict=True), key=lambda entry: -entry[1]
            ),
            tail=max(0.0, 1.0 - sum(probabilities)),
            dropped=float(record.dropped[index]),
            token_end=float(record.token_end[index]),
            doubt=float(record.doubt[index]),
        )


def summarise(dump: Path) -> dict[str, Any]:
    """Counts and means over the shards that exist; keys say their units."""
    manifest = Manifest.load(dump)
    done = [shard.path(dump) for shard in manifest.shards if shard.path(dump).exists()]
    tail = nats = doubt = token_end = 0.0
    num_records = num_bytes = num_positions = num_documents = 0
    entry_counts: Counter[int] = Counter()
    last_id: str | None = None
    for record in records(dump):
        num_documents += record.doc_id != last_id
        last_id = record.doc_id
        num_records += 1
        num_bytes += sum(s.length for s in record.segments)
        num_positions += record.num_positions
        entry_counts.update(record.entry_counts.tolist())
        record_tail, record_nats = _tail_and_nats(record)
        tail, nats = tail + record_tail, nats + record_nats
        doubt += float(record.doubt.sum(dtype=np.float64))
        token_end += float(record.token_end.sum(dtype=np.float64))
    stored = sum(path.stat().st_size for path in done)
    each, byte = max(num_positions, 1), max(num_bytes, 1)
    return {
        "identity": flatten(manifest.identity),
        "corpus_counts": manifest.corpus_counts,
        "left_out_unspellable": _left_out(dump),
        "shards_planned": len(manifest.shards),
        "shards_done": len(done),
        "documents": num_documents,
        "records": num_records,
        "text_bytes": num_bytes,
        "positions": num_positions,
        "stored_bytes": stored,
        "stored_bytes_per_text_byte": stored / byte,
        "entries_per_position": sum(k * v for k, v in entry_counts.items()) / each,
        "entry_count_positions": dict(sorted(entry_counts.items())),
        "mean_tail": tail / each,
        "mean_token_end": token_end / each,
        "mean_doubt": doubt / each,
        "target_bits_per_byte": nats / (byte * math.log(2)),
    }


def _left_out(dump: Path) -> dict[str, str]:
    path = dump / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")).get("left_out_unspellable", {}) if path.exists() else {}


def _tail_and_nats(record: Record) -> tuple[float, float]:
    """The sum of a record's tails, and the nats that its targets give the realised bytes; END is not a byte."""
    if not record.num_positions:
        return 0.0, 0.0
    counts = record.entry_counts.astype(np.int64)
    logprobs = record.logprobs.astype(np.float64)
    stored = np.add.reduceat(np.exp(logprobs), np.cumsum(counts) - counts)
    realised = np.repeat(record.realised(), counts)
    counted = (record.symbols == realised) & (realised != END)
    return float(np.maximum(1.0 - stored, 0.0).sum()), float(-logprobs[counted].sum())


def show(dump: Path, doc_id: str | None, top: int, as_json: bool) -> None:
    """Print a dump's summary, or with `doc_id` that document's positions with their `top` symbols."""
    console = Console(highlight=False, soft_wrap=True)
    if doc_id is None:
        summary = summarise(dump)
        print(json.dumps(summary, indent=1)) if as_json else _print_summary(summary, console)
        return
    found = [position for record in document_records(dump, doc_id) for position in positions(record)]
    if as_json:
        print(json.dumps({"doc_id": doc_id, "positions": [asdict(position) for position in found]}))
        return
    for line in table(found, top):
        console.print(line)


def table(found: list[Position], top: int) -> list[Text]:
    """Aligned lines: a header, then a position each. A teacher token starts at the lines marked `|`."""
    header = f"{'offset':>7}   byte    tail dropped tok_end   doubt  symbols"
    return [Text(header, style="bold"), *[_line(position, top) for position in found]]


def _line(position: Position, top: int) -> Text:
    mark = "|" if position.token_starts else " "
    line = Text(f"{position.offset:>7} {mark} ")
    line.append(f"{symbol_name(position.realised):<5}", style="bold cyan" if position.token_starts else "cyan")
    for share in (position.tail, position.dropped, position.token_end, position.doubt):
        line.append(f" {share:7.4f}", style="yellow" if share > 0.05 else "dim")
    line.append(" ")
    for symbol, probability in position.symbols[:top]:
        style = "bold green" if symbol == position.realised else ""
        line.append(f" {symbol_name(symbol):>3} {probability:.4f}", style=style)
    return line


def _print_summary(summary: dict[str, Any], console: Console) -> None:
    nested = ("identity", "corpus_counts", "left_out_unspellable", "entry_count_positions")
    flat = {key: value for key, value in summary.items() if key not in nested}
    for title in nested[:3]:
        if summary[title]:
            console.print(Text(title.replace("_", " "), style="bold"))
            for key, value in summary[title].items():
                console.print(Text(f"  {key:<28} {value}"))
    console.print(Text("shards", style="bold"))
    for key, value in flat.items():
        console.print(Text(f"  {key:<28} {value:,.4f}" if isinstance(value, float) else f"  {key:<28} {value:,}"))
    console.print(Text("positions by stored entries", style="bold"))
    largest = max(summary["entry_count_positions"].values(), default=1)
    for count, num_positions in summary["entry_count_positions"].items():
        console.print(Text(f"  {count:>4} {num_positions:>12,} {'#' * round(_BAR * num_positions / largest)}"))
