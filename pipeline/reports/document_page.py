"""Document of a dump as one self-contained page: its text coloured by surprise, each byte's distribution on hover.

The page loads nothing: style, script and data are in the file, and its content security policy forbids everything else.
Everything from the dump is escaped; unprintable and direction-changing characters are shown as their code.
"""

import bisect
import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.dumps.glyphs import readable
from pipeline.dumps.positions import Position
from pipeline.dumps.tokens import Vocabulary, token_name, vocabulary_of
from pipeline.dumps.view import DumpDocument, DumpMessage
from pipeline.reports.html import asset, content_policy, html_text, script_data
from schemas import END
from schemas.manifest import Manifest, flatten
from schemas.storage.atomic import committed
from schemas.storage.locations import Location

SURPRISE_BITS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0)  # edges between the ten shades
_STRIP = 240  # bars of the strip above the text
_ZERO_WIDTH_JOINER = "\u200d"
_SPACE = "␣"  # in more fonts than the terminal's mark


class Cell(NamedTuple):
    """A unit of drawing: a character with its combining marks. `start` and `end` are byte offsets."""

    text: str
    start: int
    end: int


def cells(text: bytes) -> Iterator[Cell]:
    """Yield the characters of a document, with combining marks and joined characters kept with their base.

    Raises UnicodeDecodeError if the text is not UTF-8.
    """
    pending, start, end = "", 0, 0
    for char in text.decode("utf-8"):
        joins = unicodedata.category(char).startswith("M") or char == _ZERO_WIDTH_JOINER
        if (pending and not (joins or pending.endswith(_ZERO_WIDTH_JOINER))) or pending == "\n":
            yield Cell(pending, start, end)
            pending, start = "", end
        pending += char
        end += len(char.encode())
    if pending:
        yield Cell(pending, start, end)


def glyphs(text: str) -> str:
    """Return a cell's text as escaped HTML; line breaks are marked and kept, unprintable characters shown as codes."""
    return "".join(map(_glyph, text))


def _glyph(char: str) -> str:
    if char == "\n":
        return '<i class="mark">↵</i>\n'
    if char == "\t":
        return '<i class="mark">⇥</i>\t'
    if char == " " or char == _ZERO_WIDTH_JOINER or unicodedata.category(char)[0] not in "CZ":
        return html.escape(char)
    return f'<i class="code">{ord(char):04X}</i>'


def shade(bits: float) -> int:
    """Return the shade of a surprise: 0 (expected) to 9."""
    return bisect.bisect_right(SURPRISE_BITS, bits)


def symbol_label(symbol: int) -> str:
    """Return the label of a symbol in the panel of a distribution."""
    if symbol == END:
        return "END"
    names = {0x20: _SPACE, 0x0A: "↵", 0x0D: "␍", 0x09: "⇥"}
    return names.get(symbol) or (chr(symbol) if 0x20 < symbol < 0x7F else f"{symbol:02X}")


def position_values(position: Position, vocabulary: Vocabulary = ()) -> dict[str, object]:
    """Return a position for the page's script; its keys are short, since there are many positions."""
    token = None if position.token is None else readable(position.token).replace("␠", _SPACE)
    values: dict[str, object] = {
        "o": position.offset,
        "r": symbol_label(position.realised),
        "b": round(position.surprise_bits, 3),
        "h": round(position.entropy_bits, 3),
        "e": [[symbol_label(s), round(p, 5)] for s, p in position.symbols],
        "t": round(position.tail, 5),
        "q": [round(value, 4) for value in position.measures.values()],
    }
    if token is not None and position.token_logprob is not None:
        values |= {"k": token, "l": round(position.token_logprob, 3)}
    if position.tokens is not None:
        found = position.tokens
        names = [token_name(one, vocabulary).replace("␠", _SPACE) for one, _ in found.alternatives]
        probs = [round(probability, 5) for _, probability in found.alternatives]
        is_own = [int(one == found.own) for one, _ in found.alternatives]
        values["a"] = [list(row) for row in zip(names, probs, is_own, strict=True)]
        values |= {} if found.end is None else {"z": round(found.end, 5)}
        values |= {} if found.own is None else {"y": round(found.tail, 5)}
    return values


class DrawnText(NamedTuple):
    """The text's HTML and, for each cell with positions, their values in the order of `data-i`."""

    text: str
    data: list[list[dict[str, object]]]


def draw_text(document: DumpDocument, positions: Sequence[Position], vocabulary: Vocabulary = ()) -> DrawnText:
    """Draw the document's text: a span per cell, shaded by the total bits of its bytes, with the edges of tokens."""
    by_offset = {p.offset: p for p in positions if p.realised != END}
    ends = {p.offset: p for p in positions if p.realised == END}  # after each segment: a chat has several
    edges = token_edges(document)
    parts: list[str] = []
    data: list[list[dict[str, object]]] = []

    def put(inner: str, cell_positions: Sequence[Position], edge: bool) -> None:
        parts.append(_span(inner, cell_positions, len(data), edge))
        if cell_positions:
            data.append([position_values(position, vocabulary) for position in cell_positions])

    def put_end(offset: int) -> None:
        if offset in ends:
            put('<i class="mark end">END</i>', [ends.pop(offset)], True)

    for message in document.messages or [DumpMessage("", 0, document.text)]:
        if message.role:
            parts.append(f'<b class="role">{html_text(message.role)}</b>')
        for cell in cells(message.content):
            start, end = message.start + cell.start, message.start + cell.end
            put_end(start)
            inside = [by_offset[offset] for offset in range(start, end) if offset in by_offset]
            put(glyphs(cell.text), inside, start in edges)
        put_end(message.end)
    return DrawnText("".join(parts), data)


def mark_name(position: Position) -> str:
    """Return the anchor of a position: `b12` for byte 12, `e12` for the END before it."""
    return f"{'e' if position.realised == END else 'b'}{position.offset}"


def _span(inner: str, positions: Sequence[Position], index: int, edge: bool) -> str:
    edge_class = " k" if edge else ""
    if not positions:
        return f'<span class="u{edge_class}">{inner}</span>'
    bits = sum(position.surprise_bits for position in positions)
    name = mark_name(positions[0])
    return f'<span class="c s{shade(bits)}{edge_class}" id="{name}" data-i="{index}">{inner}</span>'


def token_edges(document: DumpDocument) -> set[int]:
    """Return the byte offsets in the document where a teacher token starts, in the window that supervises that byte."""
    edges: set[int] = set()
    for record in document.records:
        supervised = [range(s.start, s.start + s.length) for s in record.segments]
        offset = 0
        for length in record.teacher_token_lengths.tolist():
            if not supervised or any(offset in part for part in supervised):
                edges.add(record.window_start + offset)
            offset += length
    return edges


def draw_strip(positions: Sequence[Position]) -> str:
    """Draw the surprise along the document as bars, the maximum of each section. A bar links to its position."""
    if not positions:
        return ""
    per_bar = max(1, -(-len(positions) // _STRIP))
    bars = []
    for start in range(0, len(positions), per_bar):
        worst = max(positions[start : start + per_bar], key=lambda position: position.surprise_bits)
        height = 4 + 96 * min(worst.surprise_bits, 14.0) / 14.0
        bars.append(
            f'<a class="s{shade(worst.surprise_bits)}" style="height:{height:.0f}%" href="#{mark_name(worst)}" '
            f'title="byte {worst.offset}: {worst.surprise_bits:.1f} bits"></a>'
        )
    return f'<nav class="strip" aria-label="surprise along the document">{"".join(bars)}</nav>'


def draw_legend() -> str:
    """Draw the shades with the bits at which each starts."""
    labels = ["0", *(f"{edge:g}" for edge in SURPRISE_BITS)]
    boxes = "".join(f'<li><b class="s{i}"></b>{label}</li>' for i, label in enumerate(labels))
    tokens = "underlined: teacher tokens; each starts at a gap in the line"
    return f'<ol class="legend"><li class="name">bits of surprise, from</li>{boxes}<li class="name">{tokens}</li></ol>'


def figures(document: DumpDocument, positions: Sequence[Position]) -> dict[str, str]:
    """Return the figures in the page's head, by name."""
    of_bytes = [p.surprise_bits for p in positions if p.realised != END]
    mean = sum(of_bytes) / max(len(of_bytes), 1)
    worst = max(positions, key=lambda p: p.surprise_bits, default=None)
    return {
        "bytes": f"{len(document.text):,}",
        "supervised": f"{len(of_bytes):,}",
        "teacher tokens": f"{len(token_edges(document)):,}",
        "bits per byte": f"{mean:.3f}",
        "entropy, bits": f"{sum(p.entropy_bits for p in positions) / max(len(positions), 1):.3f}",
        "most surprising": "none" if worst is None else f"{worst.surprise_bits:.1f} bits, byte {worst.offset:,}",
    }


def page(dump_name: str, identity: Mapping[str, object], document: DumpDocument, vocabulary: Vocabulary = ()) -> str:
    """Return the whole page."""
    positions = list(document.positions())
    drawn = draw_text(document, positions, vocabulary)
    measures = " ".join(positions[0].measures) if positions else ""
    title = html_text(f"{document.doc_id} · {dump_name}")
    facts = "".join(
        f"<div><dt>{html_text(k)}</dt><dd>{html_text(v)}</dd></div>" for k, v in figures(document, positions).items()
    )
    rows = "".join(
        f"<tr><th>{html_text(k)}</th><td>{html_text(str(v))}</td></tr>" for k, v in flatten(identity).items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{content_policy(asset("document.js"))}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{asset("document.css")}</style></head>
<body><header><p class="over">{html_text(dump_name)}</p>
<h1>Document <code>{html_text(document.doc_id)}</code></h1><dl>{facts}</dl>
{draw_strip(positions)}{draw_legend()}</header>
<main><div id="text" dir="auto">{drawn.text}</div>
<aside id="panel" data-measures="{measures}" aria-live="polite">
<p class="hint">Point at a character to see the teacher's distribution there. Click to pin it; move with the arrow keys.
</p></aside></main>
<details><summary>Identity of the dump</summary><table>{rows}</table></details>
<script type="application/json" id="data">{script_data(drawn.data)}</script>
<script>{asset("document.js")}</script></body></html>
"""


def write_page(dump: Location, document: DumpDocument, out: Path) -> Path:
    """Write a document's page to a file and return its path."""
    whole = str(dump.resolve() if isinstance(dump, Path) else dump)
    text = page("/".join(whole.split("/")[-2:]), Manifest.load(dump).identity, document, vocabulary_of(dump))
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return out
