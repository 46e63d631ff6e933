// Highlighting, drawing at the width the page has, and sorting.
let pinned = null;

// Fades all arms but one; null goes back to the arm that a click has pinned, if any.
const light = (arm) => {
  const on = arm ?? pinned;
  document.querySelectorAll("main [data-arm]").forEach((node) => {
    node.classList.toggle("off", on !== null && +node.dataset.arm !== on);
    node.classList.toggle("on", +node.dataset.arm === on);
  });
};

document.querySelectorAll(".legend button").forEach((button) => {
  const arm = +button.dataset.arm;
  button.onpointerenter = button.onfocus = () => light(arm);
  button.onpointerleave = button.onblur = () => light(null);
  button.onclick = () => {
    pinned = pinned === arm ? null : arm;
    document
      .querySelectorAll(".legend button")
      .forEach((other) => other.setAttribute("aria-pressed", +other.dataset.arm === pinned));
    light(null);
  };
});
document.querySelectorAll("tbody tr[data-arm]").forEach((row) => {
  row.onpointerenter = () => light(+row.dataset.arm);
  row.onpointerleave = () => light(null);
});

const draw = () => {
  document.querySelectorAll(".chart").forEach((box) => CHARTS[box.dataset.x](box));
  drawHeat();
  light(null);
};

document.querySelectorAll(".key").forEach(swatch);
let drawn = document.body.clientWidth;
draw();
new ResizeObserver(() => {
  if (document.body.clientWidth !== drawn) {
    drawn = document.body.clientWidth;
    draw();
  }
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.querySelector("#heat select")?.addEventListener("change", drawHeat);

document.querySelectorAll("table.sortable").forEach((table) => {
  table.querySelectorAll("th button").forEach((button) => {
    button.onclick = () => {
      const head = button.parentElement,
        column = head.cellIndex;
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column]?.dataset.value ?? "";
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = value(a),
          y = value(b);
        if (x === "" || y === "") return (x === "") - (y === ""); // What has no value is last.
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    };
  });
});
