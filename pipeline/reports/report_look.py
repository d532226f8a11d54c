"""How a report looks, and what it does under the pointer: its style sheet and its script."""

# Light and dark: apart in lightness as well as in hue, readable as a line on either ground.
COLOURS = (
    ("#0b6e99", "#56b4e9"),
    ("#d95f02", "#ff9e4a"),
    ("#1b8a5a", "#3ecf8e"),
    ("#b0308f", "#e58ad0"),
    ("#7a5c00", "#e3c341"),
    ("#5b4fc4", "#a79cff"),
    ("#c0272d", "#ff7b7b"),
    ("#4d7c0f", "#a3d65c"),
    ("#555b66", "#b8bec9"),
    ("#0f766e", "#5eead4"),
)


def style() -> str:
    """The page's style sheet, with the runs' colours."""
    light = " ".join(f"--c{i}: {pair[0]};" for i, pair in enumerate(COLOURS))
    dark = " ".join(f"--c{i}: {pair[1]};" for i, pair in enumerate(COLOURS))
    classes = " ".join(f".c{i} {{ --own: var(--c{i}); }}" for i in range(len(COLOURS)))
    return _STYLE.replace("/*light*/", light).replace("/*dark*/", dark) + classes


_STYLE = """
:root { color-scheme: light; --ground: #fbfaf8; --card: #fff; --ink: #23211e; --soft: #6f6a63; --line: #e5e0d8; --rule: #a9a093; --mine: #0b6e69; --warn: #9a5b00; /*light*/ }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark; --ground: #16171a; --card: #1e2024; --ink: #e4e2dd; --soft: #a09c94; --line: #33353a;
  --rule: #6d6a64; --mine: #5fd0c5; --warn: #f0b35b; /*dark*/ } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 2rem 2rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
.over { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .02em; } .soft { color: var(--soft); font-size: .82rem; font-weight: 400; }
h1 { margin: 0 0 .5rem; font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 .7rem; font-size: 1.15rem; font-weight: 650; } h3 { margin: 1.2rem 0 .4rem; font-size: .92rem; font-weight: 600; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; text-align: left; vertical-align: top; font-weight: 400; border-top: 1px solid var(--line); max-width: 26rem; overflow-wrap: break-word; }
thead th { border-top: 0; color: var(--soft); font-size: .8rem; white-space: nowrap; } tbody th { position: sticky; left: 0; background: var(--card); white-space: nowrap; max-width: none; }
.n { text-align: right; white-space: nowrap; } td b { color: var(--mine); }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1rem; }
.done { color: var(--mine); } .open { color: var(--warn); }
.swatch { display: inline-block; width: .9rem; height: .25rem; border-radius: 2px; margin-right: .5rem; vertical-align: .2rem; background: var(--own); }
.swatch.dashed { background: repeating-linear-gradient(90deg, var(--own) 0 .25rem, transparent .25rem .4rem); }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.5rem; align-items: center; justify-content: space-between; position: sticky; top: 0; z-index: 2;
  padding: .5rem 0; background: var(--ground); }
.legend, .axes { display: flex; flex-wrap: wrap; gap: .35rem; } .axes { margin-left: auto; }
button { font: inherit; font-size: .84rem; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 7px; padding: .2rem .7rem; cursor: pointer; }
button:hover { border-color: var(--rule); } button:focus-visible { outline: 2px solid var(--mine); } button[aria-pressed=false] { color: var(--soft); }
.legend button[aria-pressed=false] { text-decoration: line-through; } .legend button[aria-pressed=false] .swatch { opacity: .25; }
.axes button[aria-pressed=true] { background: var(--mine); border-color: var(--mine); color: var(--ground); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin-bottom: 1rem; }
figure { margin: 0; padding: .9rem 1rem .5rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figcaption { font-size: .9rem; font-weight: 600; } svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font-size: 12px; fill: var(--soft); } .grid { stroke: var(--line); fill: none; }
.curve path { fill: none; stroke: var(--own); stroke-width: 1.6; stroke-linejoin: round; } .curve circle { fill: var(--own); } .curve.dashed path { stroke-dasharray: 5 3; }
.raw { opacity: .22; } .raw path { stroke-width: 1; } .curve.off { display: none; } .guide { stroke: var(--rule); stroke-dasharray: 2 3; } .hit { fill: var(--own); stroke: var(--card); stroke-width: 1.5; }
.none { color: var(--soft); font-size: .85rem; margin: 2rem 0; text-align: center; }
[data-axis=step] > figure > [data-axis]:not([data-axis=step]), [data-axis=supervised_bytes] > figure > [data-axis]:not([data-axis=supervised_bytes]),
[data-axis=seconds] > figure > [data-axis]:not([data-axis=seconds]) { display: none; }
#tip { position: fixed; z-index: 3; pointer-events: none; padding: .5rem .7rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  box-shadow: 0 4px 20px #0003; font-size: .82rem; font-variant-numeric: tabular-nums; max-width: min(26rem, 90vw); }
#tip p { margin: 0 0 .2rem; color: var(--soft); } #tip div { display: flex; gap: 1rem; justify-content: space-between; } #tip span { overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; margin: .3rem 0 1rem; } dt { color: var(--soft); font-size: .78rem; } dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
details { margin: .6rem 0; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); } details .scroll { margin-top: .5rem; }
code { font: .92em ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; } th, td { padding: .4rem .6rem; } tbody th { min-width: 6.5rem; max-width: 11rem; white-space: normal; }
  figure { padding: .7rem .6rem .3rem; } svg text { font-size: 15px; } .controls { position: static; } }
@media print { .controls { display: none; } .scroll { overflow: visible; } }
"""

SCRIPT = r"""
"use strict";
const runs = JSON.parse(document.getElementById("data").textContent);
const plots = document.getElementById("plots"), tip = document.getElementById("tip");
const hidden = new Set();
const COLOURS = 10;
let drawnOn = null;
function svgNode(name, values) {
  const node = document.createElementNS(plots.querySelector("svg").namespaceURI, name);
  for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
  return node;
}
function numbers(node, name) { return node.dataset[name].split(" ").map(Number); }
function time(s) {
  const whole = Math.round(s), h = Math.floor(whole / 3600), m = Math.floor(whole / 60) % 60;
  return (h ? h + ":" + String(m).padStart(2, "0") : String(m)) + ":" + String(whole % 60).padStart(2, "0");
}
function shown(value, key) {
  if (key === "seconds") return time(value);
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return Math.abs(value) < 0.01 && value !== 0 ? value.toPrecision(4) : value.toFixed(4);
}
function nearest(columns, axis, key, x) {
  const xs = columns[axis], ys = columns[key];
  let best = -1;
  if (xs && ys) for (let i = 0; i < xs.length; i++)
    if (xs[i] !== null && ys[i] !== null && (best < 0 || Math.abs(xs[i] - x) < Math.abs(xs[best] - x))) best = i;
  return best;
}
function clear() {
  if (drawnOn) drawnOn.querySelectorAll(".guide, .hit").forEach(node => node.remove());
  drawnOn = null;
  tip.hidden = true;
}
function tipRow(run, name, value) {
  const row = document.createElement("div"), left = document.createElement("span"), right = document.createElement("b");
  if (runs.length > 1) {
    const swatch = document.createElement("i");
    swatch.className = "swatch c" + run % COLOURS + (run >= COLOURS ? " dashed" : "");
    left.append(swatch);
  }
  left.append(name);
  right.textContent = value;
  row.append(left, right);
  return row;
}
function point(svg, clientX, clientY) {
  clear();
  const {axis, key} = svg.dataset, box = svg.getBoundingClientRect();
  const [x0, x1] = numbers(svg, "x"), [y0, y1] = numbers(svg, "y"), [left, right, low, high] = numbers(svg, "frame");
  const at = (clientX - box.left) / box.width * svg.viewBox.baseVal.width;
  const x = x0 + (x1 - x0) * (Math.min(right, Math.max(left, at)) - left) / (right - left);
  const rows = [];
  let guide = null;
  runs.forEach((run, index) => {
    if (hidden.has(index)) return;
    const i = nearest(run.columns, axis, key, x);
    if (i < 0) return;
    const own = run.columns[axis][i], value = run.columns[key][i];
    const px = left + (right - left) * (own - x0) / (x1 - x0), py = low + (high - low) * (value - y0) / (y1 - y0);
    if (guide === null || Math.abs(px - at) < Math.abs(guide - at)) guide = px;
    svg.append(svgNode("circle", {"class": "hit c" + index % COLOURS, cx: px, cy: py, r: 4}));
    rows.push({index, own, node: tipRow(index, runs.length > 1 ? run.name : key.replaceAll("_", " "), shown(value, key))});
  });
  if (!rows.length) return;
  drawnOn = svg;
  svg.append(svgNode("path", {"class": "guide", d: "M" + guide + " " + high + "V" + low}));
  const head = document.createElement("p"), owns = new Set(rows.map(row => shown(row.own, axis)));
  head.textContent = axis.replaceAll("_", " ") + " " + (owns.size === 1 ? [...owns][0] : "about " + shown(rows[0].own, axis));
  tip.replaceChildren(head, ...rows.map(row => row.node));
  tip.hidden = false;
  const beside = clientX + 16 + tip.offsetWidth > innerWidth ? clientX - 16 - tip.offsetWidth : clientX + 16;
  tip.style.left = Math.max(4, beside) + "px";
  tip.style.top = Math.max(4, Math.min(clientY + 12, innerHeight - tip.offsetHeight - 4)) + "px";
}
if (plots) {
  plots.addEventListener("pointermove", event => {
    const svg = event.target.closest("svg");
    if (svg) point(svg, event.clientX, event.clientY); else clear();
  });
  plots.addEventListener("pointerdown", event => {
    const svg = event.target.closest("svg");
    if (svg) point(svg, event.clientX, event.clientY);
  });
  plots.addEventListener("pointerleave", clear);
  addEventListener("scroll", clear, {passive: true});
}
document.querySelectorAll(".axes button").forEach((button, _, all) => button.addEventListener("click", () => {
  clear();
  plots.dataset.axis = button.dataset.axis;
  all.forEach(other => other.setAttribute("aria-pressed", other === button));
}));
document.querySelectorAll(".legend button").forEach(button => button.addEventListener("click", () => {
  clear();
  const run = Number(button.dataset.run), off = !hidden.has(run);
  if (off) hidden.add(run); else hidden.delete(run);
  button.setAttribute("aria-pressed", !off);
  document.querySelectorAll('.curve[data-run="' + run + '"]').forEach(curve => curve.classList.toggle("off", off));
}));
"""
