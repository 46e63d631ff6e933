"use strict";
// Draws the charts of the report from the JSON in #data at the width the page has, and sorts the table.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const make = (parent, name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  };
  const short = (value) => {
    for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]])
      if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)} ${unit}`;
    return `${+value.toPrecision(3)}`;
  };
  const units = {
    tokens: { text: short, title: "training tokens" },
    seconds: { text: (v) => `${+v.toPrecision(3)} s`, title: "seconds of training" },
    bytes: { text: (v) => (v ? `${short(v)}B` : "0"), title: "bytes of optimizer state" },
  };
  const ticks = (low, high, count) => {
    const raw = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  };
  const pad = (low, high, share) => {
    const extra = (high - low || Math.abs(high) * 0.1 || 1) * share;
    return [low - extra, high + extra];
  };

  // Axes, grid and scales of one chart; returns what the marks need.
  const frame = (box, [x0, x1], [y0, y1], unit, right) => {
    box.replaceChildren();
    const width = box.clientWidth, height = box.clientHeight;
    const left = 40, top = 20, bottom = 40;
    const svg = make(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": box.dataset.label });
    const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
    const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
    for (const v of ticks(y0, y1, 5)) {
      make(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) });
      make(svg, "text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, +v.toFixed(4));
    }
    for (const v of ticks(x0, x1, Math.max(2, Math.floor((width - left - right) / 62)))) {
      make(svg, "text", { x: x(v), y: height - bottom + 18, "text-anchor": "middle" }, unit.text(v));
      make(svg, "line", { class: "axis", x1: x(v), x2: x(v), y1: height - bottom, y2: height - bottom + 4 });
    }
    make(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
    make(svg, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, unit.title);
    make(svg, "text", { x: 0, y: 10 }, "validation loss");
    return { svg, x, y, width, height, left, right, top, bottom };
  };

  // Names beside the last points, moved apart so that none hides another.
  const names = (f, ends) => {
    ends.sort((a, b) => a.y - b.y);
    for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + 15);
    const over = ends.length ? ends[ends.length - 1].y - (f.height - f.bottom - 2) : 0;
    for (const end of ends) {
      const node = make(f.svg, "text", { class: "name", x: end.x + 8, y: end.y + 4 - Math.max(0, over) }, end.name);
      node.style.fill = end.color;
    }
  };
  const nameWidth = (series) => 18 + 7.4 * Math.max(...series.map((s) => s.name.length));

  const tip = (box, f, x, y, rows) => {
    box.querySelector(".tip")?.remove();
    const node = document.createElement("div");
    node.className = "tip";
    for (const [text, color, bold] of rows) {
      const row = document.createElement("div");
      if (color) row.appendChild(document.createElement("i")).style.background = color;
      row.appendChild(document.createElement(bold ? "b" : "span")).textContent = text;
      node.appendChild(row);
    }
    box.appendChild(node);
    node.style.left = `${Math.max(0, Math.min(x + 14, f.width - node.offsetWidth))}px`;
    node.style.top = `${Math.max(0, Math.min(y, f.height - node.offsetHeight))}px`;
  };

  const curves = (box) => {
    const key = box.dataset.x, series = data.series.filter((s) => s.validation.length);
    if (!series.length) return;
    const all = series.flatMap((s) => s.validation);
    const end = Math.max(...all.map((p) => p[key]));
    // The fall at the start would flatten everything after it, so the axis begins where it is over.
    const late = all.filter((p) => p[key] >= end * 0.15);
    const losses = late.map((p) => p.loss);
    const right = nameWidth(series);
    const f = frame(box, [0, end], pad(Math.min(...losses), Math.max(...losses), 0.06), units[key], right);
    const clip = `clip-${key}`;
    const region = make(make(f.svg, "clipPath", { id: clip }), "rect", { x: f.left, y: f.top - 4, width: f.width - f.left - right + 1, height: f.height - f.top - f.bottom + 4 });
    region.setAttribute("pointer-events", "none");
    const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${f.x(p[key]).toFixed(1)} ${f.y(p.loss).toFixed(1)}`).join("");
    for (const s of series) {
      make(f.svg, "path", { d: path(s.training), fill: "none", stroke: s.color, "stroke-width": 1, opacity: 0.28, "clip-path": `url(#${clip})` });
      make(f.svg, "path", { d: path(s.validation), fill: "none", stroke: s.color, "stroke-width": 2.2, "stroke-linejoin": "round", "clip-path": `url(#${clip})` });
    }
    for (const s of series)
      for (const p of s.validation.length > 40 ? s.validation.slice(-1) : s.validation)
        if (f.y(p.loss) >= f.top - 4) make(f.svg, "circle", { cx: f.x(p[key]), cy: f.y(p.loss), r: 2.6, fill: s.color });
    names(f, series.map((s) => {
      const last = s.validation[s.validation.length - 1];
      return { name: s.name, color: s.color, x: f.width - right, y: f.y(last.loss) };
    }));
    const cursor = make(f.svg, "line", { class: "axis", y1: f.top, y2: f.height - f.bottom, visibility: "hidden" });
    box.onpointermove = (event) => {
      const at = event.clientX - box.getBoundingClientRect().left;
      const nearest = (s) => s.validation.reduce((a, b) => (Math.abs(f.x(b[key]) - at) < Math.abs(f.x(a[key]) - at) ? b : a));
      const main = series.map(nearest).reduce((a, b) => (Math.abs(f.x(b[key]) - at) < Math.abs(f.x(a[key]) - at) ? b : a));
      const x = f.x(main[key]);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
      const rows = series.map((s) => [s, nearest(s)]).sort((a, b) => a[1].loss - b[1].loss);
      tip(box, f, x, f.top, [[units[key].text(main[key]) + (key === "tokens" ? " tokens" : ""), null, true],
        ...rows.map(([s, p]) => [`${s.name}  ${p.loss.toFixed(3)}  (perplexity ${Math.exp(p.loss).toFixed(1)})`, s.color])]);
    };
    box.onpointerleave = () => { box.querySelector(".tip")?.remove(); cursor.setAttribute("visibility", "hidden"); };
  };

  const scatter = (box) => {
    const series = data.series.filter((s) => s.bytes !== null);
    if (!series.length) return;
    const losses = series.map((s) => s.loss);
    const f = frame(box, [0, Math.max(...series.map((s) => s.bytes)) * 1.02], pad(Math.min(...losses), Math.max(...losses), 0.25), units.bytes, nameWidth(series));
    for (const s of series) {
      const dot = make(f.svg, "circle", { cx: f.x(s.bytes), cy: f.y(s.loss), r: 6.5, fill: s.color });
      dot.onpointerenter = () => tip(box, f, f.x(s.bytes), f.y(s.loss), [[s.name, s.color, true], [`validation loss ${s.loss.toFixed(3)}`], [`optimizer state ${units.bytes.text(s.bytes)}`]]);
      dot.onpointerleave = () => box.querySelector(".tip")?.remove();
    }
    names(f, series.map((s) => ({ name: s.name, color: s.color, x: f.x(s.bytes) + 2, y: f.y(s.loss) })));
  };

  const draw = () => {
    document.querySelectorAll(".chart").forEach((box) => (box.dataset.x === "bytes" ? scatter : curves)(box));
  };
  let width = document.body.clientWidth;
  draw();
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw(); }
  }).observe(document.body);

  const table = document.getElementById("results");
  table?.querySelectorAll("th button").forEach((button) => {
    button.onclick = () => {
      const head = button.parentElement, column = head.cellIndex;
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column]?.dataset.value ?? "";
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    };
  });
})();
