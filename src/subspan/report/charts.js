// Loss against memory, against learning rate, and over seeds.

// Shows a tooltip at a mark, by pointer or keyboard.
const explain = (f, node, x, y, arm, rows) => {
  const show = () => {
    tip(f.box, x, y, rows);
    light(data.arms.indexOf(arm));
  };
  const hide = () => {
    noTip(f.box);
    light(null);
  };
  node.setAttribute("tabindex", "0");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", rows.map(([text]) => text).join(", "));
  node.onpointerenter = node.onfocus = show;
  node.onpointerleave = node.onblur = hide;
};

const memory = (box) => {
  const arms = data.arms.filter((arm) => arm.bytes !== null && arm.loss !== null);
  if (!arms.length) return;
  const ends = arms.flatMap((arm) => [arm.loss - (arm.spread ?? 0), arm.loss + (arm.spread ?? 0)]);
  const most = Math.max(...arms.map((arm) => arm.bytes)) || 1;
  const widest = Math.max(...arms.map((arm) => textWidth(arm.name)));
  const f = frame(box, [0, most * 1.03], padded(ends, 0.2), QUANTITIES.bytes, {
    right: Math.min(widest + 20, box.clientWidth * 0.22),
  });
  const points = arms.map((arm) => ({ arm, x: f.x(arm.bytes), y: f.y(arm.loss) }));
  for (const p of points) {
    const g = group(f, p.arm),
      { arm } = p;
    if (arm.spread)
      make(g, "line", {
        class: "error",
        x1: p.x,
        x2: p.x,
        y1: f.y(arm.loss - arm.spread),
        y2: f.y(arm.loss + arm.spread),
        stroke: arm.color,
      });
    const node = make(g, "path", { class: "mark", d: outline(arm.mark, p.x, p.y, 6.5), fill: arm.color });
    const spread = arm.spread ? ` ± ${arm.spread.toFixed(3)}` : "";
    explain(f, node, p.x, p.y, arm, [
      [arm.name, arm, true],
      [`validation loss ${arm.loss.toFixed(3)}${spread}`],
      [`optimizer state ${QUANTITIES.bytes.text(arm.bytes)}`],
    ]);
  }
  pointNames(f, points);
};

// Finished trials are joined by a line; pruned ones are hollow, failed ones crosses. What has no loss
// on the scale stands above it, side by side.
const sensitivity = (box) => {
  const trials = data.trials;
  if (!trials.length) return;
  const rates = trials.map((t) => t.lr),
    done = trials.filter((t) => t.state === "finished" && t.loss !== null);
  const losses = (done.length ? done : trials.filter((t) => t.loss !== null)).map((t) => t.loss);
  const low = Math.min(...rates),
    high = Math.max(...rates),
    [y0, y1] = padded(losses.length ? losses : [0, 1], 0.12);
  const widen = low === high ? 2 : (high / low) ** 0.06;
  const distinct = [...new Set(rates)].sort((a, b) => a - b);
  const off = (t) => t.loss === null || t.loss > y1 || t.state === "failed";
  const f = frame(box, [low / widen, high * widen], [y0, y1], QUANTITIES.lr, {
    top: trials.some(off) ? 50 : 22,
    marks: distinct.length <= 9 ? distinct : null, // A grid's own values, where it is one.
  });
  for (const line of new Set(trials.map((t) => `${t.arm}|${t.rest}`))) {
    const part = trials.filter((t) => `${t.arm}|${t.rest}` === line);
    const arm = data.arms[part[0].arm],
      g = group(f, arm);
    const joined = part.filter((t) => t.state === "finished" && t.loss !== null).sort((a, b) => a.lr - b.lr);
    const d = joined
      .map((t, i) => `${i ? "L" : "M"}${f.x(t.lr).toFixed(1)} ${f.y(t.loss).toFixed(1)}`)
      .join("");
    if (joined.length > 1)
      make(g, "path", { class: "validation", d, stroke: arm.color, "stroke-dasharray": DASHES[arm.line] });
    for (const t of part) {
      const beside = off(t) ? trials.filter((o) => off(o) && o.lr === t.lr) : [t];
      const x = f.x(t.lr) + 13 * (beside.indexOf(t) - (beside.length - 1) / 2),
        y = off(t) ? f.top - 20 : f.y(t.loss);
      if (t.chosen && t.state === "finished")
        make(g, "circle", { class: "chosen", cx: x, cy: y, r: 10, stroke: arm.color });
      const failed = t.state === "failed" || t.state === "unreadable",
        r = 5;
      const d = failed
        ? `M${x - r} ${y - r}l${2 * r} ${2 * r}M${x - r} ${y + r}l${2 * r} ${-2 * r}`
        : outline(arm.mark, x, y, r);
      const kind = failed ? "failed" : t.state === "finished" ? "mark" : "pruned";
      const node = make(g, "path", {
        class: `trial ${kind}`,
        d,
        stroke: arm.color,
        fill: kind === "mark" ? arm.color : "var(--card)",
      });
      const loss =
        t.loss === null
          ? "no loss"
          : `${t.state === "finished" ? "validation loss" : "last validation loss"} ${t.loss.toFixed(3)}`;
      const words =
        {
          finished: t.chosen ? "chosen" : "",
          stopped: "pruned",
          failed: "failed",
          running: "running",
          waiting: "waiting",
        }[t.state] ?? t.state;
      const rows = [
        [arm.name, arm, true],
        [`learning rate ${t.lr}${t.rest ? `, ${t.rest}` : ""}`],
        [loss],
        ...(words ? [[`${words}${t.reason ? `: ${t.reason}` : ""}`]] : []),
      ];
      explain(f, node, x, y, arm, rows);
    }
  }
};

// A row for each arm: mean with a bar of one standard deviation, and a small mark for each seed.
const seeds = (box) => {
  const arms = data.arms.filter((arm) => arm.seeds.length).sort((a, b) => a.loss - b.loss);
  if (!arms.length) return;
  box.style.height = `${arms.length * 30 + 60}px`;
  const values = arms.flatMap((arm) => [
    ...arm.seeds.map((s) => s[1]),
    arm.loss - (arm.spread ?? 0),
    arm.loss + (arm.spread ?? 0),
  ]);
  const left = Math.min(Math.max(...arms.map((arm) => textWidth(arm.name))) + 16, box.clientWidth * 0.4);
  const f = frame(box, padded(values, 0.06), [0, arms.length], QUANTITIES.loss, { left, top: 6, rows: true });
  arms.forEach((arm, row) => {
    const g = group(f, arm),
      y = f.y(arms.length - row - 0.5),
      x = f.x(arm.loss);
    const name = make(
      g,
      "text",
      { class: "name", x: left - 12, y: y + 4, "text-anchor": "end", fill: arm.color },
      arm.name,
    );
    for (let n = arm.name.length; n > 3 && name.getComputedTextLength() > left - 12; n--)
      name.textContent = `${arm.name.slice(0, n - 1)}…`;
    if (arm.spread !== null)
      make(g, "line", {
        class: "spread",
        x1: f.x(arm.loss - arm.spread),
        x2: f.x(arm.loss + arm.spread),
        y1: y,
        y2: y,
        stroke: arm.color,
      });
    for (const [seed, loss] of arm.seeds) {
      const dot = make(g, "circle", { class: "seed", cx: f.x(loss), cy: y, r: 4, stroke: arm.color });
      explain(f, dot, f.x(loss), y, arm, [
        [`${arm.name}, seed ${seed}`, arm, true],
        [`validation loss ${loss.toFixed(4)}`],
      ]);
    }
    const mean = make(g, "line", { class: "mean", x1: x, x2: x, y1: y - 9, y2: y + 9, stroke: arm.color });
    explain(f, mean, x, y, arm, [
      [arm.name, arm, true],
      [
        `mean ${arm.loss.toFixed(4)}${arm.spread === null ? "" : ` ± ${arm.spread.toFixed(4)}`} over ${arm.seeds.length} seeds`,
      ],
    ]);
  });
};

const CHARTS = { tokens: curves, seconds: curves, bytes: memory, lr: sensitivity, loss: seeds };
