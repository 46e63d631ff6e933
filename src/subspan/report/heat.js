// Heatmaps of the recorder's numbers: a row for each layer, grouped by kind; a column for each step.
const VIRIDIS = [
  "440154",
  "482878",
  "3e4989",
  "31688e",
  "26828e",
  "1f9e89",
  "35b779",
  "6ece58",
  "b5de2b",
  "fde725",
].map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));

const colour = (share) => {
  const at = Math.max(0, Math.min(1, share)) * (VIRIDIS.length - 1),
    i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[i].map((a, k) => Math.round(a + (VIRIDIS[i + 1][k] - a) * (at - i))).join(",")})`;
};

const HEAT_GAP = 4,
  HEAT_BOTTOM = 34;

// Top and height of every row, and the middle of every kind.
const heatRows = (rows) => {
  const kinds = [...new Set(rows.map((row) => row.kind))];
  const height = Math.max(2, Math.min(13, (420 - HEAT_GAP * kinds.length) / rows.length));
  let top = 0;
  const placed = rows.map((row, i) => {
    if (i && row.kind !== rows[i - 1].kind) top += HEAT_GAP;
    const at = { ...row, top, height };
    top += height;
    return at;
  });
  const groups = kinds.map((kind) => {
    const own = placed.filter((row) => row.kind === kind);
    return {
      kind,
      middle: (own[0].top + own.at(-1).top + height) / 2,
      height: own.at(-1).top + height - own[0].top,
    };
  });
  return { placed, groups, height: top };
};

const heatmap = (figure, run) => {
  const measure = figure.dataset.measure,
    box = figure.querySelector(".map"),
    canvas = box.querySelector("canvas");
  const [low, high] = data.heat.domains[measure],
    factor = data.heat.factors[measure];
  const { placed, groups, height } = heatRows(run.rows);
  const style = getComputedStyle(document.body),
    ink = style.getPropertyValue("--soft");
  const label = Math.min(
    Math.max(...groups.map((g) => textWidth(g.kind, 11.5, 400))),
    box.clientWidth * 0.32,
  );
  const left = Math.ceil(label) + 8,
    width = box.clientWidth,
    scale = devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = (height + HEAT_BOTTOM) * scale;
  canvas.style.height = `${height + HEAT_BOTTOM}px`;
  const c = canvas.getContext("2d");
  c.scale(scale, scale);
  const first = run.steps[0],
    x = (step) => left + ((step - first) / (run.end - first || 1)) * (width - left - 1);
  c.fillStyle = style.getPropertyValue("--grid");
  for (const row of placed) c.fillRect(left, row.top, width - left, row.height);
  let cells = 0;
  const gap = placed[0].height >= 9 ? 1 : 0;
  placed.forEach((row, i) => {
    row.cells = [];
    run.steps.forEach((step, j) => {
      const value = run.values[measure][i * run.steps.length + j];
      if (value >= 0) row.cells.push({ step, value: value / factor });
    });
    row.cells.forEach((cell, j) => {
      cell.end = row.cells[j + 1]?.step ?? run.end;
      const from = x(cell.step),
        to = x(cell.end);
      c.fillStyle = colour((cell.value - low) / (high - low || 1));
      // Whole pixels: between two that share one, the ground would shine through.
      const [a, b, top, bottom] = [from, to, row.top, row.top + row.height].map(
        (v) => Math.round(v * scale) / scale,
      );
      c.fillRect(a, top, Math.max(1 / scale, b - a - (to - from >= 9 ? gap : 0)), bottom - top - gap);
      cells++;
    });
  });
  c.fillStyle = ink;
  c.font = `400 11.5px ${style.fontFamily}`;
  c.textAlign = "right";
  c.textBaseline = "middle";
  let free = -Infinity;
  for (const g of groups) {
    if (g.middle - free < 12) continue; // Kinds with few thin rows: their names would overlap.
    c.fillText(g.kind, left - 6, g.middle, label);
    free = g.middle;
  }
  c.textAlign = "center";
  const steps = ticks(first, run.end, Math.max(2, Math.floor((width - left) / 44)));
  for (const v of steps)
    if (x(v) < width - 8 || v === run.end) c.fillText(short(v), Math.min(x(v), width - 12), height + 11);
  c.fillText("optimizer step", (left + width) / 2, height + 27);
  canvas.dataset.cells = cells;
  canvas.setAttribute(
    "aria-label",
    `${figure.querySelector("b").textContent}, ${run.name}: ${run.notes[measure]}`,
  );
  figure.querySelector(".summary").textContent = run.notes[measure];
  const digits = measure === "effective_rank" ? 1 : 2;
  figure
    .querySelectorAll(".scale span")
    .forEach((end, i) => (end.textContent = [low, high][i].toFixed(digits - 1)));

  box.onpointermove = (event) => {
    const at = canvas.getBoundingClientRect(),
      across = event.clientX - at.left,
      down = event.clientY - at.top;
    const row = placed.find((r) => down >= r.top && down < r.top + r.height);
    const cell = row?.cells.findLast((k) => x(k.step) <= across);
    if (!cell || across < left) return noTip(box);
    const name = row.name.replace(/\.weight$/, "");
    tip(box, across, down + 12, [
      [name, null, true],
      [`${row.shape.join(" × ")}, rank ${row.rank}`],
      [`step ${cell.step}: ${cell.value.toFixed(digits)}`],
    ]);
  };
  box.onpointerleave = () => noTip(box);
};

const drawHeat = () => {
  const section = document.getElementById("heat");
  if (!section || !data.heat) return;
  const run = data.heat.runs[section.querySelector("select")?.selectedIndex ?? 0];
  section.querySelectorAll("figure").forEach((figure) => heatmap(figure, run));
};
