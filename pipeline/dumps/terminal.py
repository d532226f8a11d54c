"""`bld inspect` on a terminal: the printed output. `pipeline.dumps.view` reads the dump."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from pipeline.dumps import search, statistics, tokens, view
from pipeline.dumps.glyphs import printable, readable, symbol_name
from pipeline.dumps.positions import Position
from pipeline.dumps.search import Occurrence, Surprise
from pipeline.dumps.terminal_chat import conversation_lines, conversations
from pipeline.dumps.tokens import Vocabulary, vocabulary_of
from pipeline.dumps.view import DumpDocument
from pipeline.runtime import log
from schemas import END
from schemas.columns import BY_NAME
from schemas.json_text import json_text
from schemas.storage.locations import Location

_BAR = 40  # characters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SHOWN = 10  # occurrences of --find that are printed
_ESCAPES = {"\\n": b"\n", "\\r": b"\r", "\\t": b"\t", "\\\\": b"\\"}


def search_bytes(text: str) -> bytes:
    """Parse the text of `--find`: UTF-8, with `\\n`, `\\t`, `\\r`, `\\\\` and `\\xHH` as in a Python string."""
    parts = re.split(r"(\\x[0-9a-fA-F]{2}|\\[nrt\\])", text)
    sought = b"".join(
        _ESCAPES.get(part) or (bytes([int(part[2:], 16)]) if i % 2 else part.encode()) for i, part in enumerate(parts)
    )
    if not sought:
        raise ValueError("--find '': give at least one byte to look for")
    return sought


class Selection(NamedTuple):
    """A part of a dump to print; its summary if none is given.

    Attributes:
        doc_id: the positions of the document of this name.
        nth: which of several documents of that name; counted from 1.
        worst: the number of most surprising documents and positions to print.
        find: the occurrences of this text, with the distributions of its bytes.
    """

    doc_id: str | None = None
    nth: int = 1
    worst: int | None = None
    find: str | None = None


SUMMARY = Selection()


def show(dump: Location, selection: Selection = SUMMARY, top: int = 5, as_json: bool = False) -> None:
    """Print a part of a dump, with the `top` symbols of each position."""
    doc_id, nth, worst, find = selection
    console = Console(highlight=False, soft_wrap=True)
    if worst is not None:
        _show_worst(dump, worst, top, as_json, console)
    elif find is not None:
        _show_occurrences(dump, search_bytes(find), top, as_json, console)
    elif doc_id is None:
        summary = statistics.dump_statistics(dump)
        print(json_text(summary, indent=1)) if as_json else _print_summary(summary, console)
    else:
        document, vocabulary = chosen_document(dump, doc_id, nth), vocabulary_of(dump)
        if as_json:
            found = [as_values(position, vocabulary) for position in document.positions()]
            values = {"doc_id": doc_id, "positions": found}
            chat = [{"role": m.role, "start": m.start, "content": m.content.decode()} for m in document.messages]
            values |= {"messages": chat} if chat else {}
            chats = conversations(document)
            print(json_text(values | ({"conversations": chats} if chats else {})))
            return
        for line in conversation_lines(document):
            console.print(line)
        for line in document_table(document, top, vocabulary):
            console.print(line)


def chosen_document(dump: Location, doc_id: str | None, nth: int) -> DumpDocument:
    """Return the document of that name, or the first. Warns if several have the name."""
    document = view.find_document(dump, doc_id, nth)
    number = 1 if doc_id is None else view.number_named(dump, doc_id)
    if number > 1:
        log.warning(
            f"{dump}: {number} documents are named {doc_id!r}; this is number {nth} (--nth chooses). "
            "Set corpus.id_field to give each document its own name"
        )
    return document


def as_values(position: Position, vocabulary: Vocabulary = ()) -> dict[str, Any]:
    """Return a position as JSON values; its token, which may be half a character, as a list of bytes."""
    values = asdict(position) | {"token": None if position.token is None else list(position.token)}
    del values["tokens"]
    if position.tokens is not None:
        values["tokens"] = tokens.as_values(position.tokens, vocabulary)
    parts = [value if name == "measures" else {name: value} for name, value in values.items()]
    return {name: value for part in parts for name, value in part.items()}


def table(positions: Iterable[Position], top: int, vocabulary: Vocabulary = ()) -> list[Text]:
    """Return aligned lines: a header, then one per position, or two where alternatives of the token are stored.

    `|` marks where a teacher token starts, which is shown.
    """
    shown = list(positions)
    measures = {name: None for position in shown for name in position.measures}
    headings = "".join(f" {BY_NAME[name].heading:>7}" for name in measures)
    header = f"{'offset':>7}   byte   bits    tail{headings}  symbols"
    lines = [_line(position, top) for position in shown]
    for line, position in zip(lines, shown, strict=True):
        if position.tokens is not None:
            line.append("\n").append_text(tokens.token_line(position.tokens, top, vocabulary))
    return [Text(header, style="bold"), *lines]


def document_table(document: DumpDocument, top: int, vocabulary: Vocabulary = ()) -> list[Text]:
    """Return the `table` of a document's positions; in a chat each message precedes its own."""
    positions = list(document.positions())
    if not document.messages:
        return table(positions, top, vocabulary)
    header, *lines = table(positions, top, vocabulary)
    edges = [position.offset + (position.realised != END) for position in positions]  # an END belongs to its message
    shown, at = [header], 0
    for message in document.messages:
        shown.append(
            Text(f"{printable(message.role)}: ", style="bold").append(readable(message.content), style="not bold")
        )
        last = bisect_right(edges, message.end, lo=at)
        shown += lines[at:last]
        at = last
    return shown


def _line(position: Position, top: int) -> Text:
    mark = "|" if position.token_starts else " "
    line = Text(f"{position.offset:>7} {mark} ")
    line.append(f"{symbol_name(position.realised):<4}", style="bold cyan" if position.token_starts else "cyan")
    line.append(f" {position.surprise_bits:5.2f}", style=_surprise_style(position.surprise_bits))
    line.append(f" {position.tail:7.4f}", style="yellow" if position.tail > 0.05 else "dim")
    for name, value in position.measures.items():
        line.append(f" {value:7.4f}", style="yellow" if value > BY_NAME[name].flagged else "dim")
    line.append(" ")
    for symbol, probability in position.symbols[:top]:
        style = "bold green" if symbol == position.realised else ""
        line.append(f" {symbol_name(symbol):>3} {probability:.4f}", style=style)
    if position.token is not None:
        line.append(f"  |{readable(position.token)}| {position.token_logprob:.2f} nats", style="magenta")
    return line


def _surprise_style(bits: float) -> str:
    return "bold red" if bits > 6 else "yellow" if bits > 3 else "dim"


def _show_worst(dump: Location, number: int, top: int, as_json: bool, console: Console) -> None:
    documents, positions = search.worst_documents(dump, number), search.worst_positions(dump, number)
    if as_json:
        print(
            json_text(
                {
                    "documents": [{"doc_id": d.doc_id, "bits_per_byte": d.bits} for d in documents],
                    "positions": [_surprise_values(position, vocabulary_of(dump)) for position in positions],
                }
            )
        )
        return
    console.print(Text("documents by bits per byte of their targets", style="bold"))
    for document in documents:
        console.print(Text(f"{document.bits:8.3f}  {printable(document.doc_id):<12} {readable(document.context)}"))
    console.print(Text("positions by bits of their realised symbol", style="bold"))
    for position in positions:
        console.print(_surprise_line(position, top))


def _surprise_values(surprise: Surprise, vocabulary: Vocabulary) -> dict[str, Any]:
    assert surprise.position is not None
    return {"doc_id": surprise.doc_id, "context": list(surprise.context), **as_values(surprise.position, vocabulary)}


def _surprise_line(surprise: Surprise, top: int) -> Text:
    position = surprise.position
    assert position is not None
    line = Text(f"{surprise.bits:8.3f}  {printable(surprise.doc_id):<12} at {surprise.offset:>6} ")
    line.append(f"{readable(surprise.context):>{search.CONTEXT_BYTES}}")
    line.append(f"[{symbol_name(position.realised)}]", style="bold red")
    for symbol, probability in position.symbols[:top]:
        line.append(f"  {symbol_name(symbol)} {probability:.3f}")
    return line


def _show_occurrences(dump: Location, sought: bytes, top: int, as_json: bool, console: Console) -> None:
    occurrences, vocabulary = search.find(dump, sought), vocabulary_of(dump)
    if as_json:
        print(json_text([_occurrence_values(occurrence, vocabulary) for occurrence in occurrences]))
        return
    shown = list(islice(occurrences, _SHOWN))
    for occurrence in shown:
        line = Text(f"{printable(occurrence.doc_id)} at {occurrence.offset}: ", style="bold")
        line.append(readable(occurrence.before), style="not bold")
        line.append(readable(sought), style="reverse")
        line.append(readable(occurrence.after), style="not bold")
        console.print(line)
        for row in table(occurrence.positions, top, vocabulary):
            console.print(row)
    num_more = sum(1 for _ in occurrences)
    if not shown:
        console.print(f"{readable(sought)!r} does not occur in {dump}", markup=False)
    elif num_more:
        console.print(f"and {num_more} more; --json prints all of them")


def _occurrence_values(occurrence: Occurrence, vocabulary: Vocabulary) -> dict[str, Any]:
    positions = [as_values(position, vocabulary) for position in occurrence.positions]
    return {"doc_id": occurrence.doc_id, "offset": occurrence.offset, "positions": positions}


_HISTOGRAMS = {
    "entry_count_positions": "positions by stored entries",
    "entropy_bits_positions": "positions by entropy, bits",
    "column_bytes": "stored bytes by column",
}
_SECTIONS = ("identity", "corpus_counts", "left_out_unspellable")


def _print_summary(summary: dict[str, Any], console: Console) -> None:
    for title in _SECTIONS:
        if summary[title]:
            console.print(Text(title.replace("_", " "), style="bold"))
            for key, value in summary[title].items():
                console.print(Text(f"  {key:<28} {value}"))
    console.print(Text("shards", style="bold"))
    for key, value in summary.items():
        if key not in _SECTIONS and key not in _HISTOGRAMS:
            console.print(Text(f"  {key:<28} {value:,.4f}" if isinstance(value, float) else f"  {key:<28} {value:,}"))
    for key, title in _HISTOGRAMS.items():
        console.print(Text(title, style="bold"))
        for line in bars(summary[key]):
            console.print(Text(line))


def bars(counts: Mapping[Any, int]) -> Iterator[str]:
    """Yield a line per key: its count, its share of the total, and a bar in eighths of a character."""
    width = max((len(str(key)) for key in counts), default=0)
    largest, total = max(counts.values(), default=0), sum(counts.values())
    for key, number in counts.items():
        eighths = round(8 * _BAR * number / max(largest, 1))
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        yield f"  {key!s:>{width}} {number:>12,} {number / max(total, 1):6.1%} {bar}".rstrip()
