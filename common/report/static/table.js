// Tables with data-sortable: a click on a heading sorts, a second one turns the order; empty cells stay last.
"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button")?.addEventListener("click", () => {
      const isText = heading.classList.contains("text");
      const first = isText ? "ascending" : "descending";
      const turned = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? turned : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => (isText ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b));
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
      });
      body.append(...rows);
    });
  });
}
// a link to a case opens its section
const open = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", open);
open();
