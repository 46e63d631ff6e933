// What every chart of the report shares: scales, axes, marks, labels that do not overlap, tooltips.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3"];

const make = (parent, name, attributes, text) => {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
};

const short = (value) => {
  for (const [unit, size] of [
    ["G", 1e9],
    ["M", 1e6],
    ["k", 1e3],
  ])
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)} ${unit}`;
  return `${+value.toPrecision(3)}`;
};

const clock = (v) =>
  v < 120
    ? `${+v.toPrecision(3)} s`
    : v < 7200
      ? `${+(v / 60).toPrecision(3)} min`
      : `${+(v / 3600).toPrecision(3)} h`;

// Quantity of an x axis: text of a value, title, and how ticks are spaced.
const QUANTITIES = {
  tokens: { text: short, title: "training tokens" },
  seconds: { text: clock, title: "time of training", sixties: true },
  bytes: { text: (v) => (v ? `${short(v)}B` : "0"), title: "optimizer state" },
  lr: {
    text: (v) => (v >= 0.0001 ? `${+v.toPrecision(3)}` : v.toExponential(0)),
    title: "peak learning rate",
    log: true,
  },
  loss: { text: (v) => `${+v.toFixed(4)}`, title: "validation loss" },
};

const ticks = (low, high, count, quantity) => {
  if (quantity?.log) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const m of [1, 2, 5]) all.push(m * 10 ** power);
    return all.filter((v) => v >= low * 0.999 && v <= high * 1.001);
  }
  const raw = (high - low) / Math.max(1, count);
  let step;
  if (quantity?.sixties && raw > 10)
    step = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400].find((s) => s >= raw);
  if (!step) {
    const power = 10 ** Math.floor(Math.log10(raw));
    step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  }
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
};

const padded = (values, share) => {
  const low = Math.min(...values),
    high = Math.max(...values);
  const extra = (high - low || Math.abs(high) * 0.02 || 1) * share;
  return [low - extra, high + extra];
};

// Axes, grid and scales of one chart, with the names of rows instead of a y scale where given.
const frame = (
  box,
  [x0, x1],
  [y0, y1],
  quantity,
  { right = 14, left = 46, top = 22, rows = false, marks = null } = {},
) => {
  box.replaceChildren();
  const width = box.clientWidth,
    height = box.clientHeight,
    bottom = 42;
  const svg = make(box, "svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    "aria-label": box.dataset.label,
  });
  const place = quantity.log ? (v) => Math.log(v / x0) / Math.log(x1 / x0) : (v) => (v - x0) / (x1 - x0);
  const x = (v) => left + place(v) * (width - left - right);
  const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
  const axes = make(svg, "g", { class: "axes", "aria-hidden": "true" });
  if (!rows) {
    for (const v of ticks(y0, y1, 5)) {
      make(axes, "line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) });
      make(axes, "text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, `${+v.toFixed(4)}`);
    }
    make(axes, "text", { x: 0, y: 11 }, "validation loss");
  }
  let last = -Infinity;
  for (const v of marks ?? ticks(x0, x1, Math.max(2, Math.floor((width - left - right) / 72)), quantity)) {
    if (rows) make(axes, "line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: height - bottom });
    else
      make(axes, "line", { class: "axis", x1: x(v), x2: x(v), y1: height - bottom, y2: height - bottom + 4 });
    if (x(v) - last < 40) continue;
    last = x(v);
    make(axes, "text", { x: x(v), y: height - bottom + 18, "text-anchor": "middle" }, quantity.text(v));
  }
  make(axes, "line", {
    class: "axis",
    x1: left,
    x2: width - right,
    y1: height - bottom,
    y2: height - bottom,
  });
  make(
    axes,
    "text",
    { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" },
    quantity.title,
  );
  return { box, svg, x, y, width, height, left, right, top, bottom };
};

// The outline of an arm's mark around a point.
const outline = (mark, x, y, r) => {
  const [a, b] = [x.toFixed(1), y.toFixed(1)];
  if (mark === 0)
    return `M${(x - r).toFixed(1)} ${b}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
  if (mark === 1)
    return `M${(x - r * 0.88).toFixed(1)} ${(y - r * 0.88).toFixed(1)}h${1.76 * r}v${1.76 * r}h${-1.76 * r}Z`;
  if (mark === 2) return `M${a} ${(y - r * 1.15).toFixed(1)}l${1.1 * r} ${2 * r}h${-2.2 * r}Z`;
  return `M${a} ${(y - r * 1.25).toFixed(1)}l${1.25 * r} ${1.25 * r}l${-1.25 * r} ${1.25 * r}l${-1.25 * r} ${-1.25 * r}Z`;
};

const group = (f, arm) => make(f.svg, "g", { "data-arm": data.arms.indexOf(arm) });

// A sample of an arm's line and mark, beside its name wherever that stands.
const swatch = (place) => {
  const arm = data.arms[place.dataset.arm ?? place.closest("[data-arm]").dataset.arm];
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({
    viewBox: "0 0 26 12",
    width: 26,
    height: 12,
    "aria-hidden": "true",
  }))
    svg.setAttribute(key, value);
  make(svg, "line", {
    x1: 1,
    x2: 25,
    y1: 6,
    y2: 6,
    stroke: arm.color,
    "stroke-width": 2.2,
    "stroke-dasharray": DASHES[arm.line],
  });
  make(svg, "path", { d: outline(arm.mark, 13, 6, 4), fill: arm.color });
  place.replaceChildren(svg);
};

const textWidth = (() => {
  const context = document.createElement("canvas").getContext("2d");
  const font = getComputedStyle(document.body).fontFamily;
  return (text, size = 12.5, weight = 600) => {
    context.font = `${weight} ${size}px ${font}`;
    return context.measureText(text).width;
  };
})();

// Space for names at the right of a chart; none where they would take too much of it.
const GAP = 15;
const nameSpace = (box, arms) => {
  const widest = Math.max(...arms.map((arm) => textWidth(arm.name)));
  const fits = arms.length * GAP <= box.clientHeight - 70 && widest + 26 <= box.clientWidth * 0.3;
  return fits ? widest + 26 : 0;
};

// Names beside the last points, moved apart so that none hides another, with a line to the point.
const endNames = (f, ends) => {
  ends.sort((a, b) => a.y - b.y);
  for (const end of ends) end.at = end.y;
  for (let i = 1; i < ends.length; i++) ends[i].at = Math.max(ends[i].at, ends[i - 1].at + GAP);
  let limit = f.height - f.bottom + 2;
  for (const end of [...ends].reverse()) {
    end.at = Math.min(end.at, limit);
    limit = end.at - GAP;
  }
  for (const end of ends) {
    const g = group(f, end.arm),
      x = f.width - f.right;
    make(g, "path", {
      class: "leader",
      d: `M${end.x + 5} ${end.y}L${x + 10} ${end.at}h3`,
      stroke: end.arm.color,
    });
    make(g, "text", { class: "name", x: x + 16, y: end.at + 4, fill: end.arm.color }, end.arm.name);
  }
};

// Names beside points anywhere: where one fits at no side, the legend and the tooltip tell it.
const pointNames = (f, points) => {
  const taken = points.map((p) => [p.x - 8, p.y - 8, p.x + 8, p.y + 8]);
  const free = ([a, b, c, d]) =>
    a >= 0 &&
    c <= f.width &&
    b >= 0 &&
    d <= f.height - f.bottom &&
    !taken.some(([e, g, h, i]) => a < h && c > e && b < i && d > g);
  for (const p of points) {
    const width = textWidth(p.arm.name);
    const sides = [
      ["start", 12, 4],
      ["end", -12, 4],
      ["middle", 0, -13],
      ["middle", 0, 21],
    ];
    for (const [anchor, dx, dy] of sides) {
      const x = p.x + dx,
        left = anchor === "start" ? x : anchor === "end" ? x - width : x - width / 2;
      const space = [left, p.y + dy - 11, left + width, p.y + dy + 3];
      if (!free(space)) continue;
      taken.push(space);
      make(
        group(f, p.arm),
        "text",
        { class: "name", x, y: p.y + dy, "text-anchor": anchor, fill: p.arm.color },
        p.arm.name,
      );
      break;
    }
  }
};

// A tooltip of rows [text, arm or nothing, bold].
const tip = (box, x, y, rows) => {
  box.querySelector(".tip")?.remove();
  const node = document.createElement("div");
  node.className = "tip";
  for (const [text, arm, bold] of rows) {
    const row = document.createElement("div");
    if (arm) {
      const key = row.appendChild(document.createElement("span"));
      key.className = "key";
      key.dataset.arm = data.arms.indexOf(arm);
      swatch(key);
    }
    row.appendChild(document.createElement(bold ? "b" : "span")).textContent = text;
    node.appendChild(row);
  }
  box.appendChild(node);
  const left = x + 16 + node.offsetWidth > box.clientWidth ? x - 16 - node.offsetWidth : x + 16;
  node.style.left = `${Math.max(0, Math.min(left, box.clientWidth - node.offsetWidth))}px`;
  node.style.top = `${Math.max(0, Math.min(y, box.clientHeight - node.offsetHeight))}px`;
};
const noTip = (box) => box.querySelector(".tip")?.remove();
