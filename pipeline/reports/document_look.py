"""Style and script of the page that `pipeline.reports.document_page` draws; both go into the file."""

# The shades go from the page's own ground through amber to a deep red, even steps of lightness; the last four carry white text.
STYLE = """
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
SCRIPT = r"""
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
