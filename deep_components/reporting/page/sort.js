"use strict";
// Sorts a table by the column whose header button is pressed: first the best first, then the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const status = table.parentElement.parentElement.querySelector("[role=status]");
  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    button.addEventListener("click", () => {
      const first = header.dataset.first || "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = header.getAttribute("aria-sort") === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [row, row.cells[column].dataset.value]);
      const isText = header.dataset.kind === "text";
      rows.sort(([, a], [, b]) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // without a value: last in both orders
        return sign * (isText ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b));
      });
      body.append(...rows.map(([row]) => row));
      headers.forEach((one) => one.setAttribute("aria-sort", one === header ? order : "none"));
      if (status) status.textContent = `Sorted by ${button.textContent.trim()}, ${order}`;
    });
  });
}
// A closed part would be missing on paper.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) {
    part.open = true;
    part.dataset.opened = "";
  }
});
addEventListener("afterprint", () => {
  for (const part of document.querySelectorAll("details[data-opened]")) {
    part.open = false;
    delete part.dataset.opened;
  }
});
