"use strict";
// Tables sort by a click on a heading, the grid by its menus, a picture opens with its request. Nothing is fetched.
const number = (cell) => (cell.dataset.value === undefined || cell.dataset.value === "" ? null : Number(cell.dataset.value));
const compare = (a, b) => (a === null) - (b === null) || (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = head.classList.contains("number");
      const value = (row) => (numeric ? number(row.cells[column]) : row.cells[column].textContent.trim());
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return compare(x, y);
        return (numeric === down ? -1 : 1) * compare(x, y);
      });
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
  });
}

const grid = document.getElementById("grid");
const sorter = document.getElementById("sort");
const sizes = document.getElementById("size");
function value(row, key) {
  if (key === "order") return Number(row.dataset.order);
  const read = (cell, name) => (cell === null || cell.dataset[name] === undefined || cell.dataset[name] === "" ? null : Number(cell.dataset[name]));
  if (key === "spread") {
    const cells = [...row.cells].slice(1).filter((cell) => cell.dataset.variant !== "none");
    const of = (name) => cells.map((cell) => read(cell, name)).filter((score) => score !== null);
    const range = (scores) => (scores.length ? Math.max(...scores) - Math.min(...scores) : 0);
    return -(1000 * range(of("presence")) + range(of("clipscore")));
  }
  const [name, variant] = [key.slice(0, key.indexOf("/")), key.slice(key.indexOf("/") + 1)];
  return read([...row.cells].find((cell) => cell.dataset.variant === variant) ?? null, name);
}
function arrange() {
  const rows = [...grid.tBodies[0].rows];
  rows.sort((a, b) => compare(value(a, sorter.value), value(b, sorter.value)) || a.dataset.order - b.dataset.order);
  grid.tBodies[0].append(...rows);
  for (const row of rows) row.hidden = Boolean(sizes && sizes.value && row.dataset.size !== sizes.value);
}
sorter.addEventListener("change", arrange);
if (sizes) sizes.addEventListener("change", arrange);

const inside = JSON.parse(document.getElementById("inside").textContent);
const detail = document.getElementById("detail");
document.addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (!tile) return;
  const entry = inside[tile.dataset.id];
  const image = tile.querySelector("img");
  detail.querySelector("img").src = image.src;
  detail.querySelector("img").alt = image.alt;
  detail.querySelector("h3").textContent = image.alt;
  const link = detail.querySelector(".file a");
  link.textContent = entry.picture;
  link.href = entry.picture;
  detail.querySelector(".scores").textContent = JSON.stringify(entry.scores, null, 1);
  detail.querySelector(".request").textContent = entry.request === null ? "not known: the picture came with the manifest" : JSON.stringify(entry.request, null, 1);
  detail.showModal();
});
