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
    const name = runs.length > 1 ? run.name : key.replaceAll("_", " ");
    rows.push({index, own, node: tipRow(index, name, shown(value, key))});
  });
  if (!rows.length) return;
  drawnOn = svg;
  svg.append(svgNode("path", {"class": "guide", d: "M" + guide + " " + high + "V" + low}));
  const head = document.createElement("p"), owns = new Set(rows.map(row => shown(row.own, axis)));
  const place = owns.size === 1 ? [...owns][0] : "about " + shown(rows[0].own, axis);
  head.textContent = axis.replaceAll("_", " ") + " " + place;
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
