// Loss curves: an arm's validation and training loss, mean and spread over its seeds.

// The fall at the start, and runs that diverge, would flatten all that matters, so the axis shows
// the losses from a fifth of the run on, up to what most arms stay below.
const lossRange = (arms, key) => {
  const end = Math.max(...arms.map((arm) => arm.validation[key].at(-1)));
  const late = arms.map((arm) => arm.validation.loss.filter((_, i) => arm.validation[key][i] >= end * 0.2));
  const lows = late.flat(),
    highs = late
      .filter((l) => l.length)
      .map((l) => Math.max(...l))
      .sort((a, b) => a - b);
  const high = highs[Math.floor((highs.length - 1) * 0.75)];
  const [y0] = padded([...lows, high], 0.06);
  return [
    [0, end],
    [y0, high + (high - y0) * 0.04],
  ];
};

const curves = (box) => {
  const key = box.dataset.x,
    quantity = QUANTITIES[key];
  const arms = data.arms.filter((arm) => arm.validation.loss.length);
  if (!arms.length) return;
  const [xs, ys] = lossRange(arms, key);
  const space = arms.length > 1 ? nameSpace(box, arms) : 0;
  const f = frame(box, xs, ys, quantity, { right: space || 14 });
  const id = `clip-${key}`;
  make(make(f.svg, "clipPath", { id }), "rect", {
    x: f.left,
    y: f.top - 4,
    width: f.width - f.left - f.right + 6,
    height: f.height - f.top - f.bottom + 4,
  });
  const line = (points) =>
    points.loss
      .map((loss, i) => `${i ? "L" : "M"}${f.x(points[key][i]).toFixed(1)} ${f.y(loss).toFixed(1)}`)
      .join("");
  for (const arm of arms) {
    const g = group(f, arm),
      v = arm.validation,
      clip = `url(#${id})`;
    if (v.spread?.length) {
      const edge = (sign) =>
        v.loss.map((loss, i) => `${f.x(v[key][i]).toFixed(1)} ${f.y(loss + sign * v.spread[i]).toFixed(1)}`);
      make(g, "path", {
        class: "band",
        d: `M${edge(1).join("L")}L${edge(-1).reverse().join("L")}Z`,
        fill: arm.color,
        "clip-path": clip,
      });
    }
    if (arm.training.loss.length)
      make(g, "path", { class: "training", d: line(arm.training), stroke: arm.color, "clip-path": clip });
    make(g, "path", {
      class: "validation",
      d: line(v),
      stroke: arm.color,
      "stroke-dasharray": DASHES[arm.line],
      "clip-path": clip,
    });
    const last = v.loss.length - 1,
      few = v.loss.length <= 24 && arms.length <= 6;
    v.loss.forEach((loss, i) => {
      if ((few || i === last) && f.y(loss) >= f.top - 4)
        make(g, "path", {
          class: "mark",
          d: outline(arm.mark, f.x(v[key][i]), f.y(loss), i === last ? 4 : 2.8),
          fill: arm.color,
        });
    });
  }
  const visible = (loss) => Math.max(f.top, f.y(loss));
  if (space)
    endNames(
      f,
      arms.map((arm) => ({
        arm,
        x: f.x(arm.validation[key].at(-1)),
        y: visible(arm.validation.loss.at(-1)),
      })),
    );
  pointer(f, arms, key, quantity);
};

// A line at the nearest evaluation, and what the arms closest to the pointer have there.
const MOST = 9;
const pointer = (f, arms, key, quantity) => {
  const cursor = make(f.svg, "line", {
    class: "cursor",
    y1: f.top,
    y2: f.height - f.bottom,
    visibility: "hidden",
  });
  f.box.onpointermove = (event) => {
    const box = f.box.getBoundingClientRect(),
      at = event.clientX - box.left,
      up = event.clientY - box.top;
    const near = arms.map((arm) => {
      const xs = arm.validation[key];
      let i = 0;
      for (let j = 1; j < xs.length; j++) if (Math.abs(f.x(xs[j]) - at) <= Math.abs(f.x(xs[i]) - at)) i = j;
      return {
        arm,
        value: xs[i],
        loss: arm.validation.loss[i],
        spread: arm.validation.spread?.[i],
        far: Math.abs(f.x(xs[i]) - at),
      };
    });
    const main = near.reduce((a, b) => (b.far < a.far ? b : a));
    const rows = near.filter((p) => p.far <= main.far + 24).sort((a, b) => a.loss - b.loss);
    const closest = rows.reduce((a, b) => (Math.abs(f.y(b.loss) - up) < Math.abs(f.y(a.loss) - up) ? b : a));
    const first = Math.max(0, Math.min(rows.indexOf(closest) - (MOST >> 1), rows.length - MOST));
    cursor.setAttribute("x1", f.x(main.value));
    cursor.setAttribute("x2", f.x(main.value));
    cursor.setAttribute("visibility", "visible");
    const shown = rows.slice(first, first + MOST).map((p) => {
      const spread = p.spread ? ` ± ${p.spread.toFixed(3)}` : "";
      return [
        `${p.arm.name}  ${p.loss.toFixed(3)}${spread}  (perplexity ${Math.exp(p.loss).toFixed(1)})`,
        p.arm,
        p === closest && rows.length > 1,
      ];
    });
    const hidden = rows.length - shown.length;
    const more = hidden ? [[`and ${hidden} more`]] : [];
    tip(f.box, f.x(main.value), f.top, [
      [quantity.text(main.value) + (key === "tokens" ? " tokens" : ""), null, true],
      ...shown,
      ...more,
    ]);
    light(Math.abs(f.y(closest.loss) - up) < 16 ? data.arms.indexOf(closest.arm) : null);
  };
  f.box.onpointerleave = () => {
    noTip(f.box);
    cursor.setAttribute("visibility", "hidden");
    light(null);
  };
};
