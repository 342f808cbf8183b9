"use strict";
// A header's button sorts its table by that column: numbers by their first number, highest first; words by name.
const key = (cell) => {
  const number = cell.tagName === "TD" && cell.textContent.replaceAll(",", "").match(/^\W{0,2}?([-+]?\d+(\.\d+)?)/);
  return number ? Number(number[1]) : null;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.firstElementChild.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.some((row) => key(row.cells[column]) !== null);
      const first = numeric ? "descending" : "ascending";
      const order = header.ariaSort === first ? (numeric ? "ascending" : "descending") : first;
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((one, other) => {
        const [a, b] = [one.cells[column], other.cells[column]];
        if (!numeric) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
        const [x, y] = [key(a), key(b)];
        return x === null || y === null ? (x === null) - (y === null) : sign * (x - y); // without a number: last
      });
      table.tBodies[0].append(...rows);
      headers.forEach((one) => { one.ariaSort = one === header ? order : "none"; });
    });
  });
}
addEventListener("beforeprint", () => { // a closed part would be missing on paper
  for (const part of document.querySelectorAll("details")) part.open = true;
});
