"""A document of a dump as one self-contained page: its text coloured by surprise, the distribution of each byte on
hover.

Nothing is fetched: style, script and data are in the file, and its content security policy forbids everything else. All
that comes from the dump is escaped; characters that print nothing, or turn the direction of text, are shown by their
code.
"""

import bisect
import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.dumps.glyphs import readable
from pipeline.dumps.positions import Position
from pipeline.dumps.view import DumpDocument, DumpMessage
from pipeline.reports.html import asset, content_policy, script_data, shown
from schemas import END
from schemas.manifest import Manifest, flatten
from schemas.storage.atomic import committed
from schemas.storage.locations import Location

SURPRISE_BITS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0)  # edges between the ten shades
_STRIP = 240  # bars of the strip above the text
_ZERO_WIDTH_JOINER = "\u200d"
_SPACE = "␣"  # more fonts have it than the terminal's mark


class Cell(NamedTuple):
    """What is drawn as one: a character with the marks that combine with it. `start` and `end` are byte offsets."""

    text: str
    start: int
    end: int


def cells(text: bytes) -> Iterator[Cell]:
    """The characters of a document, combining marks and joined ones with their base. Raises UnicodeDecodeError unless
    UTF-8.
    """
    held, start, end = "", 0, 0
    for char in text.decode("utf-8"):
        joins = unicodedata.category(char).startswith("M") or char == _ZERO_WIDTH_JOINER
        if (held and not (joins or held.endswith(_ZERO_WIDTH_JOINER))) or held == "\n":
            yield Cell(held, start, end)
            held, start = "", end
        held += char
        end += len(char.encode())
    if held:
        yield Cell(held, start, end)


def glyphs(text: str) -> str:
    """Escaped HTML of a cell's text; a break is marked and made, and what prints nothing is shown by its code."""
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
    """0, expected, to 9."""
    return bisect.bisect_right(SURPRISE_BITS, bits)


def symbol_label(symbol: int) -> str:
    """A symbol in the panel of a distribution."""
    if symbol == END:
        return "END"
    names = {0x20: _SPACE, 0x0A: "↵", 0x0D: "␍", 0x09: "⇥"}
    return names.get(symbol) or (chr(symbol) if 0x20 < symbol < 0x7F else f"{symbol:02X}")


def position_values(position: Position) -> dict[str, object]:
    """A position for the page's script; short keys, for there are many."""
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
    return values


class Drawn(NamedTuple):
    """The text's HTML and, for each cell that has positions, their values in the order of `data-i`."""

    text: str
    data: list[list[dict[str, object]]]


def draw_text(document: DumpDocument, positions: Sequence[Position]) -> Drawn:
    """The document's text: a span for each cell, shaded by its bytes' bits together; a token's edge before it where
    there is one.
    """
    by_offset = {p.offset: p for p in positions if p.realised != END}
    ends = {p.offset: p for p in positions if p.realised == END}  # after each segment: of a chat there are several
    edges = token_edges(document)
    parts: list[str] = []
    data: list[list[dict[str, object]]] = []

    def put(inner: str, found: Sequence[Position], edge: bool) -> None:
        parts.append(_span(inner, found, len(data), edge))
        if found:
            data.append([position_values(position) for position in found])

    def put_end(offset: int) -> None:
        if offset in ends:
            put('<i class="mark end">END</i>', [ends.pop(offset)], True)

    for message in document.messages or [DumpMessage("", 0, document.text)]:
        if message.role:
            parts.append(f'<b class="role">{shown(message.role)}</b>')
        for cell in cells(message.content):
            start, end = message.start + cell.start, message.start + cell.end
            put_end(start)
            found = [by_offset[offset] for offset in range(start, end) if offset in by_offset]
            put(glyphs(cell.text), found, start in edges)
        put_end(message.end)
    return Drawn("".join(parts), data)


def mark_name(position: Position) -> str:
    """The anchor of a position: `b12` of a byte, `e12` of the END before byte 12."""
    return f"{'e' if position.realised == END else 'b'}{position.offset}"


def _span(inner: str, found: Sequence[Position], index: int, edge: bool) -> str:
    names = " k" if edge else ""
    if not found:
        return f'<span class="u{names}">{inner}</span>'
    bits = sum(position.surprise_bits for position in found)
    return f'<span class="c s{shade(bits)}{names}" id="{mark_name(found[0])}" data-i="{index}">{inner}</span>'


def token_edges(document: DumpDocument) -> set[int]:
    """Byte offsets in the document where a teacher token starts, in the window that supervises that byte."""
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
    """Surprise along the document, as bars: the largest of each stretch. A bar leads to its place in the text."""
    if not positions:
        return ""
    each = max(1, -(-len(positions) // _STRIP))
    bars = []
    for start in range(0, len(positions), each):
        worst = max(positions[start : start + each], key=lambda position: position.surprise_bits)
        height = 4 + 96 * min(worst.surprise_bits, 14.0) / 14.0
        bars.append(
            f'<a class="s{shade(worst.surprise_bits)}" style="height:{height:.0f}%" href="#{mark_name(worst)}" '
            f'title="byte {worst.offset}: {worst.surprise_bits:.1f} bits"></a>'
        )
    return f'<nav class="strip" aria-label="surprise along the document">{"".join(bars)}</nav>'


def draw_legend() -> str:
    """The shades with the bits at which each starts."""
    labels = ["0", *(f"{edge:g}" for edge in SURPRISE_BITS)]
    boxes = "".join(f'<li><b class="s{i}"></b>{label}</li>' for i, label in enumerate(labels))
    return f'<ol class="legend"><li class="name">bits of surprise, from</li>{boxes}<li class="name">a line under the text: a teacher token starts where it breaks</li></ol>'


def figures(document: DumpDocument, positions: Sequence[Position]) -> dict[str, str]:
    """What stands in the page's head, by name."""
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


def page(dump_name: str, identity: Mapping[str, object], document: DumpDocument) -> str:
    """The whole page."""
    positions = list(document.positions())
    drawn = draw_text(document, positions)
    measures = " ".join(positions[0].measures) if positions else ""
    title = shown(f"{document.doc_id} · {dump_name}")
    facts = "".join(
        f"<div><dt>{shown(k)}</dt><dd>{shown(v)}</dd></div>" for k, v in figures(document, positions).items()
    )
    rows = "".join(f"<tr><th>{shown(k)}</th><td>{shown(str(v))}</td></tr>" for k, v in flatten(identity).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{content_policy(asset("document.js"))}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{asset("document.css")}</style></head>
<body><header><p class="over">{shown(dump_name)}</p><h1>Document <code>{shown(document.doc_id)}</code></h1><dl>{facts}</dl>
{draw_strip(positions)}{draw_legend()}</header>
<main><div id="text" dir="auto">{drawn.text}</div>
<aside id="panel" data-measures="{measures}" aria-live="polite"><p class="hint">Point at a character to see what the teacher expected there. Click to keep it, arrow keys to walk.</p></aside></main>
<details><summary>Identity of the dump</summary><table>{rows}</table></details>
<script type="application/json" id="data">{script_data(drawn.data)}</script><script>{asset("document.js")}</script></body></html>
"""


def write_page(dump: Location, document: DumpDocument, out: Path) -> Path:
    """Draw a document into a file; returns its path."""
    whole = str(dump.resolve() if isinstance(dump, Path) else dump)
    text = page("/".join(whole.split("/")[-2:]), Manifest.load(dump).identity, document)
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return out
