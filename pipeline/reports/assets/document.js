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
function percent(p) {
  if (p < 0.00005) return "< 0.01 %";
  return (100 * p).toFixed(p >= 0.0995 ? 1 : 2) + " %";
}
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
  if (at.k !== undefined)
    part.append(make("p", "sub", "token |" + at.k + "| starts here, " + at.l.toFixed(2) + " nats"));
  for (const [name, p] of at.e) part.append(row(name, p, name === at.r ? "is" : ""));
  if (at.t > 0.00005) part.append(row("tail", at.t, "tail"));
  if (at.a !== undefined) {
    part.append(make("p", "sub", "the teacher's next token"));
    for (const [name, p, own] of at.a) part.append(row(name, p, own ? "token is" : "token"));
    if (at.y > 0.00005) part.append(row("tail", at.y, "token tail"));
    if (at.z !== undefined) part.append(row("end token", at.z, "token tail"));
  }
  const trust = make("p", "trust");
  panel.dataset.measures.split(" ").forEach((name, i) => {
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
