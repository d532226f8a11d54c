"""A document of a dump as one self-contained page: its text coloured by surprise, the distribution of each byte on hover.

Nothing is fetched: style, script and data are in the file, and its content security policy forbids everything else. All that comes
from the dump is escaped; characters that print nothing, or turn the direction of text, are shown by their code.
"""

import bisect
import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.dump_view import DumpDocument, Position, Said
from pipeline.inspect import readable
from pipeline.page import content_policy, script_data, shown
from schemas import END
from schemas.commit import committed
from schemas.manifest import Manifest, flatten
from schemas.store import Location

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
    """The characters of a document, combining marks and joined ones with their base. Raises UnicodeDecodeError unless UTF-8."""
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
        "q": [round(position.dropped, 4), round(position.token_end, 4), round(position.doubt, 4)],
    }
    if token is not None and position.token_logprob is not None:
        values |= {"k": token, "l": round(position.token_logprob, 3)}
    return values


class Drawn(NamedTuple):
    """The text's HTML and, for each cell that has positions, their values in the order of `data-i`."""

    text: str
    data: list[list[dict[str, object]]]


def draw_text(document: DumpDocument, positions: Sequence[Position]) -> Drawn:
    """The document's text: a span for each cell, shaded by its bytes' bits together; a token's edge before it where there is one."""
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

    for message in document.messages or [Said("", 0, document.text)]:
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
    title = shown(f"{document.doc_id} · {dump_name}")
    facts = "".join(
        f"<div><dt>{shown(k)}</dt><dd>{shown(v)}</dd></div>" for k, v in figures(document, positions).items()
    )
    rows = "".join(f"<tr><th>{shown(k)}</th><td>{shown(str(v))}</td></tr>" for k, v in flatten(identity).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{content_policy(_SCRIPT)}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{_STYLE}</style></head>
<body><header><p class="over">{shown(dump_name)}</p><h1>Document <code>{shown(document.doc_id)}</code></h1><dl>{facts}</dl>
{draw_strip(positions)}{draw_legend()}</header>
<main><div id="text" dir="auto">{drawn.text}</div>
<aside id="panel" aria-live="polite"><p class="hint">Point at a character to see what the teacher expected there. Click to keep it, arrow keys to walk.</p></aside></main>
<details><summary>Identity of the dump</summary><table>{rows}</table></details>
<script type="application/json" id="data">{script_data(drawn.data)}</script><script>{_SCRIPT}</script></body></html>
"""


def write_page(dump: Location, document: DumpDocument, out: Path) -> Path:
    """Draw a document into a file; returns its path."""
    whole = str(dump.resolve() if isinstance(dump, Path) else dump)
    text = page("/".join(whole.split("/")[-2:]), Manifest.load(dump).identity, document)
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return out


# The shades go from the page's own ground through amber to a deep red, even steps of lightness; the last four carry white text.
_STYLE = """
:root { color-scheme: light; --ground: #fbfaf8; --card: #fff; --ink: #23211e; --soft: #77716a; --line: #e5e0d8; --rule: #a9a093; --mine: #0b6e69;
  --s0: transparent; --s1: #fdf3dc; --s2: #fbe6b8; --s3: #f8d48d; --s4: #f3b966; --s5: #ea9a4c; --s6: #dc7640; --s7: #c5523a; --s8: #a33236; --s9: #741b30; }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark; --ground: #16171a; --card: #1e2024; --ink: #e4e2dd; --soft: #98948c; --line: #33353a;
  --rule: #6d6a64; --mine: #5fd0c5;
  --s1: #2b261c; --s2: #3d3320; --s3: #544226; --s4: #6e522b; --s5: #8a5f2e; --s6: #a9653a; --s7: #c4623f; --s8: #d8564b; --s9: #ee4a63; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 2rem 2rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { margin-bottom: 1.5rem; } .over { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .02em; }
h1 { margin: 0 0 1rem; font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; } h1 code { font: inherit; color: var(--mine); }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 0 0 1.2rem; } dt { color: var(--soft); font-size: .78rem; }
dd { margin: 0; font-size: 1.05rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.strip { display: flex; align-items: flex-end; gap: 1px; height: 3.4rem; border-bottom: 1px solid var(--line); margin-bottom: .7rem; }
.strip a { flex: 1 1 0; min-width: 1px; border-radius: 1px 1px 0 0; } .strip a.s0 { background: var(--line); } .strip a:hover { outline: 2px solid var(--mine); }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .8rem; list-style: none; margin: 0; padding: 0; color: var(--soft); font-size: .78rem; }
.legend b { display: inline-block; width: 1.5rem; height: .8rem; border-radius: 2px; margin-right: .3rem; vertical-align: -.05rem; border: 1px solid var(--line); }
.legend .name:last-child { margin-left: auto; }
main { display: grid; grid-template-columns: minmax(0, 1fr) 21rem; gap: 1.5rem; align-items: start; }
#text, aside { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
#text { padding: 1.4rem 1.6rem; font: 15.5px/2.05 ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.c { cursor: pointer; padding: .16em 0 .2em; border-bottom: 1px solid var(--rule); position: relative; }
.k { border-left: 2px solid var(--card); } .u { color: var(--soft); }
.s0 { background: var(--s0); } .s1 { background: var(--s1); } .s2 { background: var(--s2); } .s3 { background: var(--s3); } .s4 { background: var(--s4); }
.s5 { background: var(--s5); } .s6 { background: var(--s6); color: #fff; } .s7 { background: var(--s7); color: #fff; } .s8 { background: var(--s8); color: #fff; }
.s9 { background: var(--s9); color: #fff; } .c:hover, .c.on { outline: 2px solid var(--mine); outline-offset: -1px; border-radius: 3px; z-index: 1; }
.role { display: block; margin-top: .8rem; color: var(--mine); font-size: .8em; } .role:first-child { margin-top: 0; }
.mark { font-style: normal; opacity: .45; } .mark.end { font-size: .72em; letter-spacing: .06em; padding: 0 .35em; }
.code { font-style: normal; font-size: .62em; border: 1px solid currentColor; border-radius: 3px; padding: 0 .25em; margin: 0 .1em; opacity: .75; vertical-align: .12em; }
aside { position: sticky; top: 1.2rem; padding: 1rem 1.1rem; max-height: calc(100vh - 2.4rem); overflow: auto; font-variant-numeric: tabular-nums; }
.hint { color: var(--soft); margin: 0; } aside h2 { margin: 0; font-size: 1rem; font-weight: 600; display: flex; justify-content: space-between; align-items: baseline; }
aside h2 + p, .sub { margin: 0 0 .6rem; color: var(--soft); font-size: .82rem; } aside section + section { margin-top: 1.1rem; padding-top: 1rem; border-top: 1px solid var(--line); }
.glyph { font: 600 1.35rem/1 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; color: var(--mine); }
.row { display: grid; grid-template-columns: 2.6rem 1fr 3.9rem; gap: .5rem; align-items: center; height: 1.35rem; font-size: .84rem; }
.row > :first-child { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; text-align: right; } .row > :last-child { text-align: right; color: var(--soft); }
.row i { display: block; height: .62rem; border-radius: 2px; background: var(--rule); min-width: 1px; } .row.is { font-weight: 650; color: var(--mine); }
.row.is i { background: var(--mine); } .row.is > :last-child { color: inherit; } .row.tail { color: var(--soft); }
.row.tail i { background: repeating-linear-gradient(45deg, var(--line) 0 3px, var(--rule) 3px 5px); }
.trust { display: flex; gap: 1rem; margin: .6rem 0 0; color: var(--soft); font-size: .78rem; } .trust b { color: var(--ink); font-weight: 600; }
details { margin-top: 1.5rem; color: var(--soft); font-size: .85rem; } summary { cursor: pointer; } table { border-collapse: collapse; margin-top: .6rem; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; font-weight: 400; overflow-wrap: anywhere; border-bottom: 1px solid var(--line); } td { color: var(--ink); }
@media (max-width: 60rem) { body { padding: 1rem; } main { grid-template-columns: minmax(0, 1fr); } aside { position: sticky; bottom: .5rem; top: auto; max-height: 45vh; box-shadow: 0 4px 24px #0004; } }
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), panel = document.getElementById("panel");
const cells = Array.from(text.querySelectorAll(".c"));
let kept = -1;
function make(name, cls, content) {
  const node = document.createElement(name);
  if (cls) node.className = cls;
  if (content !== undefined) node.textContent = content;
  return node;
}
function percent(p) { return p < 0.00005 ? "< 0.01 %" : p >= 0.0995 ? (100 * p).toFixed(1) + " %" : (100 * p).toFixed(2) + " %"; }
function row(name, p, cls) {
  const line = make("div", "row " + cls), bar = make("span"), fill = make("i");
  fill.style.width = Math.max(0.5, 100 * p) + "%";
  bar.append(fill);
  line.append(make("span", "", name), bar, make("span", "", percent(p)));
  return line;
}
function section(at) {
  const part = make("section"), head = make("h2");
  head.append(make("span", "glyph", at.r), make("span", "", at.b.toFixed(2) + " bits"));
  part.append(head, make("p", "", "byte " + at.o + " · entropy " + at.h.toFixed(2) + " bits"));
  if (at.k !== undefined) part.append(make("p", "sub", "token |" + at.k + "| starts here, " + at.l.toFixed(2) + " nats"));
  for (const [name, p] of at.e) part.append(row(name, p, name === at.r ? "is" : ""));
  if (at.t > 0.00005) part.append(row("tail", at.t, "tail"));
  const trust = make("p", "trust");
  ["dropped", "token_end", "doubt"].forEach((name, i) => {
    const item = make("span", "", name + " ");
    item.append(make("b", "", at.q[i].toFixed(3)));
    trust.append(item);
  });
  part.append(trust);
  return part;
}
function show(index) {
  text.querySelectorAll(".on").forEach(cell => cell.classList.remove("on"));
  if (index < 0) return;
  cells[index].classList.add("on");
  panel.replaceChildren(...data[index].map(section));
}
function keep(index) { kept = index; show(index); }
text.addEventListener("mouseover", event => {
  const cell = event.target.closest(".c");
  if (cell && kept < 0) show(Number(cell.dataset.i));
});
text.addEventListener("click", event => {
  const cell = event.target.closest(".c");
  const index = cell ? Number(cell.dataset.i) : -1;
  keep(index === kept ? -1 : index);
});
document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (event.key === "Escape") keep(-1);
  if (!step || kept < 0) return;
  event.preventDefault();
  keep(Math.min(cells.length - 1, Math.max(0, kept + step)));
  cells[kept].scrollIntoView({block: "nearest"});
});
function follow() {
  const cell = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (cell && cell.dataset.i !== undefined) keep(Number(cell.dataset.i));
}
addEventListener("hashchange", follow);
follow();
"""
