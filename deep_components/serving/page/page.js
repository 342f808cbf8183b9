"use strict";
const at = (id) => document.getElementById(id);
const COUNT = new Intl.NumberFormat("en");
const FIRST_ROWS = 200; // of the candidates; more on demand
const SERVED = "served", BEYOND = "beyond"; // beyond: through all stages, but not among the k best
let about = null, shown = null, users = [], marked = -1, asked = 0, limit = FIRST_ROWS;
let order = { key: null, sign: 1 };

// ---- small helpers: text is always set as text, never as markup ----
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const words = (value) => value === null || value === undefined ? "–"
  : typeof value === "object" ? JSON.stringify(value) : String(value);
const digits = (value) => value === undefined || value === null ? "–" : value.toPrecision(5);
const fail = (text) => { at("error").textContent = text; at("error").hidden = !text; };
// An id of more digits than a JavaScript number holds stays a text of all its digits.
const exact = (_, value, context) =>
  typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "") ? context.source : value;
const fetchJson = async (path, body) => {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body } : {};
  const response = await fetch(path, options).catch(() => { throw new Error("The server does not answer."); });
  const text = await response.text();
  if (response.ok) return JSON.parse(text, exact);
  throw new Error(response.headers.get("Content-Type") === "application/json" ? JSON.parse(text).error
    : `The server answered with status ${response.status}.`);
};

// ---- what is served ----
const start = async () => {
  try {
    about = await fetchJson("about");
  } catch (error) {
    at("facts").textContent = `${error.message} Trying again…`;
    setTimeout(start, 700);
    return;
  }
  const stages = about.stages.map((stage) => `${stage.name} ${COUNT.format(stage.keep)}`).join(" → ");
  at("facts").replaceChildren(
    make("b", COUNT.format(about.items)), " items → ", make("b", stages), ` · version ${about.version}`);
  at("k").value = Math.min(10, about.stages.at(-1).keep);
  at("user-hint").textContent = !about.user ? "This bundle's requests name no user; give a JSON request."
    : about.features ? `Type the beginning of a ${about.user} to search the feature store, or any ${about.user}.`
      : `A ${about.user}. There is no feature store, so the history is empty; a JSON request can bring one.`;
  at("json-hint").textContent = `Takes ${about.request_columns.join(", ")} and history: items, or objects with `
    + `${about.history_columns.join(", ")}; the latest last.`;
  at("json").value = JSON.stringify({ ...(about.user ? { [about.user]: null } : {}), history: [] }, null, 2);
  const likely = about.columns.filter((name) => /title|name|caption/i.test(name));
  for (const name of about.columns.filter((name) => name !== about.item)) {
    const box = make("input", null, { type: "checkbox", value: name });
    box.checked = likely.includes(name);
    const label = make("label");
    label.append(box, make("span", name));
    at("columns").append(label);
  }
  at("columns").hidden = at("columns").children.length < 2;
};

// ---- the search for a user: a combobox ----
const open = (isOpen) => {
  at("found").hidden = !isOpen;
  at("user").setAttribute("aria-expanded", String(isOpen));
  if (!isOpen) mark(-1);
};
const mark = (number) => {
  marked = number;
  [...at("found").children].forEach((entry, index) => entry.setAttribute("aria-selected", String(index === number)));
  if (number < 0) at("user").removeAttribute("aria-activedescendant");
  else {
    at("user").setAttribute("aria-activedescendant", `user-${number}`);
    at("found").children[number].scrollIntoView({ block: "nearest" });
  }
};
const search = async () => {
  if (!about?.features) return;
  const number = ++asked;
  const found = await fetchJson(`users?prefix=${encodeURIComponent(at("user").value.trim())}`).catch(() => ({ users: [] }));
  if (number !== asked) return; // a later letter's answer is on its way
  users = found.users;
  at("found").replaceChildren(...users.map((user, index) =>
    make("li", user, { role: "option", id: `user-${index}`, "aria-selected": "false" })));
  open(users.length > 0 && document.activeElement === at("user"));
};
const choose = (number) => {
  at("user").value = String(users[number]);
  open(false);
};
at("user").addEventListener("input", search);
at("user").addEventListener("focus", search);
at("user").addEventListener("blur", () => open(false));
at("user").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && at("found").hidden) search();
  else if (event.key === "ArrowDown" && users.length) mark((marked + 1) % users.length);
  else if (event.key === "ArrowUp" && users.length) mark((marked + users.length - (marked < 0 ? 0 : 1)) % users.length);
  else if (event.key === "Escape") open(false);
  else if (event.key === "Enter" && marked >= 0) choose(marked);
  else return;
  event.preventDefault();
});
at("found").addEventListener("mousedown", (event) => {
  event.preventDefault(); // the input keeps the focus
  const number = [...at("found").children].indexOf(event.target.closest("li"));
  if (number >= 0) choose(number);
});
for (const radio of document.getElementsByName("mode")) {
  radio.addEventListener("change", () => {
    at("by-user").hidden = radio.value !== "user";
    at("by-json").hidden = radio.value !== "json";
    fail("");
  });
}

// ---- asking ----
const request = () => { // as JSON, in the user's own digits
  if (document.querySelector("[name=mode]:checked").value === "json") {
    try {
      JSON.parse(at("json").value);
      return at("json").value;
    } catch (error) {
      throw new Error(`The request is not JSON: ${error.message}`);
    }
  }
  if (!about.user) throw new Error("This bundle's requests name no user; give a JSON request.");
  const text = at("user").value.trim();
  if (!text) throw new Error(`Give a ${about.user}.`);
  return `{${JSON.stringify(about.user)}: ${about.user_is_number && /^-?(0|[1-9]\d*)$/.test(text) ? text : JSON.stringify(text)}}`;
};
at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  fail("");
  open(false);
  const columns = [...at("columns").querySelectorAll("input:checked")].map((box) => box.value);
  at("send").disabled = true;
  try {
    if (!about) throw new Error("The bundle is still being loaded.");
    const k = Number(at("k").value);
    const options = JSON.stringify({ k, filter_seen: at("seen").checked, explain: true, columns }).slice(1);
    const began = performance.now();
    const answer = await fetchJson("recommend", `{"requests": [${request()}], ${options}`);
    const took = Math.round(performance.now() - began);
    show(answer.results[0], columns, k);
    at("status").textContent = `${COUNT.format(shown.list.items.length)} of ${COUNT.format(shown.candidates.length)} `
      + `candidates in ${took} ms, by version ${answer.version}.`;
  } catch (error) {
    fail(error.message);
    at("status").textContent = "";
    at("results").hidden = true;
  } finally {
    at("send").disabled = false;
  }
});

// ---- showing ----
const show = (list, columns, k) => {
  const served = new Map(list.items.map((item, index) => [item, index]));
  const candidates = list.candidates.map((one) => ({
    ...one, place: one.left_at ?? (served.has(one.item) ? SERVED : BEYOND), position: served.get(one.item) }));
  shown = { list, columns, candidates, k };
  order = { key: null, sign: 1 };
  limit = FIRST_ROWS;
  at("text").value = "";
  at("results").hidden = false;
  showList();
  showFunnel();
  showStages();
  showCandidates();
};
const showList = () => {
  const { list, columns, k } = shown;
  const last = about.stages.at(-1).name;
  at("list-note").textContent = !list.items.length ? "Nothing is left for this user."
    : list.items.length < k ? `Fewer than ${k}: the last stage keeps ${about.stages.at(-1).keep}, or no more are left.` : "";
  at("list-scroll").hidden = !list.items.length;
  const head = make("tr");
  head.append(make("th", "#", { class: "number", scope: "col" }), make("th", about.item || "item", { scope: "col" }),
    ...columns.map((name) => make("th", name, { scope: "col" })), make("th", `score of ${last}`, { class: "number", scope: "col" }));
  const rows = list.items.map((item, index) => {
    const row = make("tr");
    row.append(make("td", index + 1, { class: "number" }), make("th", words(item), { scope: "row" }),
      ...columns.map((name) => make("td", words(list.columns[name][index]))),
      make("td", digits(list.scores?.[index]), { class: "number" }));
    return row;
  });
  fill(at("list"), head, rows);
};
const fill = (table, head, rows) => {
  const [top, body] = [make("thead"), make("tbody")];
  top.append(head);
  body.append(...rows);
  table.replaceChildren(top, body);
};
const label = (place) => place === SERVED ? "in the list" : place === BEYOND ? "beyond the list" : `left at ${place}`;
const countOf = (place) => shown.candidates.filter((one) => one.place === place).length;

const showFunnel = () => {
  const width = (count) => `${count ? Math.max(1, 100 * Math.log1p(count) / Math.log1p(about.items)) : 0}%`;
  const steps = about.stages.map((stage, index) => {
    const scored = shown.candidates.filter((one) => stage.name in one.scores);
    const kept = scored.filter((one) => one.left_at !== stage.name).length;
    return { name: stage.name, reached: index ? scored.length : about.items, kept };
  });
  steps.push({ name: "the list", reached: steps.at(-1).kept, kept: shown.list.items.length, place: BEYOND });
  at("funnel").replaceChildren(...steps.map(({ name, reached, kept, place = name }, index) => {
    // what the first stage dropped is the rest of the corpus, which no answer names
    const button = index ? make("button", null, { type: "button", "aria-pressed": "false", "data-place": place })
      : make("div", null, { class: "step" });
    const track = make("span", null, { class: "track", "aria-hidden": "true" });
    for (const [kind, count] of [["reached", reached], ["kept", kept]]) {
      const bar = make("span", null, { class: kind });
      bar.style.width = width(count);
      track.append(bar);
    }
    const counts = make("span", null, { class: "counts" });
    counts.append(`${COUNT.format(reached)} → `, make("b", COUNT.format(kept)));
    button.append(make("b", name), track, counts);
    if (index) button.addEventListener("click", () => pick(at("stage").value === place ? "" : place));
    const entry = make("li");
    entry.append(button);
    return entry;
  }));
};
const showStages = () => {
  const places = [SERVED, BEYOND, ...about.stages.slice(1).map((stage) => stage.name).reverse()];
  at("stage").replaceChildren(make("option", `all ${COUNT.format(shown.candidates.length)}`, { value: "" }),
    ...places.map((place) => make("option", `${label(place)}: ${COUNT.format(countOf(place))}`, { value: place })));
};
const pick = (place) => {
  at("stage").value = place;
  limit = FIRST_ROWS;
  showCandidates();
};

// ---- the candidates: filtered, sorted ----
const columnsOf = () => [
  { name: about.item || "item", value: (one) => one.item, head: true },
  ...shown.columns.map((name) => ({ name, value: (one) => one.columns[name] })),
  { name: "where", value: (one) => one.place, place: true },
  ...about.stages.map((stage) => ({ name: stage.name, value: (one) => one.ranks[stage.name], stage: stage.name })),
];
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
  : String(a).localeCompare(String(b), "en", { numeric: true });
const sorted = (rows, column) => !column ? rows : [...rows].sort((one, other) => {
  const [a, b] = [column.value(one) ?? null, column.value(other) ?? null];
  return a === null || b === null ? (a === null) - (b === null) : order.sign * compare(a, b); // without a value: last
});
const cellOf = (one, column) => {
  const value = column.value(one);
  if (column.head) return make("th", words(value), { scope: "row" });
  if (!column.stage && !column.place) return make("td", words(value));
  const cell = make("td", column.stage && value === undefined ? "–" : "", column.stage ? { class: "number" } : {});
  if (column.place) cell.append(make("span", label(value), { class: value === SERVED ? "tag served" : "tag" }));
  else if (value !== undefined) cell.append(make("b", `#${value}`), make("span", digits(one.scores[column.stage])));
  return cell;
};
const showCandidates = () => {
  const [place, text] = [at("stage").value, at("text").value.trim().toLowerCase()];
  const columns = columnsOf();
  const texts = (one) => [one.item, ...shown.columns.map((name) => one.columns[name])].map(words).join("\n").toLowerCase();
  const rows = sorted(shown.candidates.filter((one) => (!place || one.place === place) && (!text || texts(one).includes(text))),
    columns.find((column) => column.name === order.key));
  const head = make("tr");
  head.append(...columns.map((column) => {
    const cell = make("th", null, { scope: "col", ...(column.stage ? { class: "number" } : {}) });
    const button = make("button", column.name, { type: "button" });
    cell.setAttribute("aria-sort", column.name !== order.key ? "none" : order.sign > 0 ? "ascending" : "descending");
    button.addEventListener("click", () => {
      order = { key: column.name, sign: order.key === column.name ? -order.sign : 1 };
      showCandidates();
      [...at("candidates").querySelectorAll("thead button")].find((one) => one.textContent === column.name).focus();
    });
    cell.append(button);
    return cell;
  }));
  fill(at("candidates"), head, rows.slice(0, limit).map((one) => {
    const row = make("tr");
    row.append(...columns.map((column) => cellOf(one, column)));
    return row;
  }));
  at("count").textContent = `${COUNT.format(rows.length)} of ${COUNT.format(shown.candidates.length)}`;
  at("more").hidden = rows.length <= limit;
  at("more").textContent = `Show all ${COUNT.format(rows.length)}`;
  for (const button of at("funnel").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.place === place));
  }
};
at("stage").addEventListener("change", () => pick(at("stage").value));
at("text").addEventListener("input", showCandidates);
at("more").addEventListener("click", () => { limit = Infinity; showCandidates(); });
start();
