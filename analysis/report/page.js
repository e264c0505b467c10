"use strict";
// Draws the charts when they come into view, sorts and opens the table, and switches the theme.

const payload = JSON.parse(document.getElementById("payload").textContent);
const root = document.documentElement;
const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Theme: the system's until the reader chooses; what was chosen is kept where the browser allows it.
const themeButton = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");

function stored(value) {
  try {
    if (value) localStorage.setItem("theme", value);
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

function setTheme(theme) {
  root.dataset.theme = theme;
  themeButton.textContent = theme === "dark" ? "Light theme" : "Dark theme";
  document.querySelectorAll(".plot.drawn").forEach(draw);
}

themeButton.addEventListener("click", () => {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  stored(theme);
  setTheme(theme);
});
system.addEventListener("change", () => stored() || setTheme(system.matches ? "dark" : "light"));
setTheme(stored() || (system.matches ? "dark" : "light"));

// Charts
const CATEGORIES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#332288", "#88334a", "#56a0c8"],
  dark: ["#56b4e9", "#ff9d5c", "#2fd0a5", "#e39ac8", "#f0d048", "#a9a4ff", "#ff8fa3", "#9fdfff"],
};

const CROWDED = 20;

function config(width, rows, legend) {
  const dark = root.dataset.theme === "dark";
  const crowded = rows.length > CROWDED;
  const widest = Math.max(1, ...legend.map((value) => String(value).length)) * 7.5 + 45;
  const text = { labelColor: colour("muted"), titleColor: colour("muted"), titleFontWeight: 500, labelFontSize: 12, titleFontSize: 12.5 };
  const font = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  return {
    font,
    background: null,
    view: { stroke: null },
    mark: { aria: false },
    line: { strokeWidth: crowded ? 1 : 1.6, opacity: crowded ? 0.55 : 0.85 },
    point: { size: crowded ? 40 : 90 },
    axis: { ...text, gridColor: colour("line"), domainColor: colour("line"), tickColor: colour("line"), titlePadding: 10, labelOverlap: true, gridOpacity: 0.7 },
    axisX: { grid: false },
    legend: { ...text, orient: "bottom", columns: Math.max(1, Math.floor((width - 60) / Math.min(widest, 260))), labelLimit: 220, symbolStrokeWidth: 2.5, offset: 14, labelColor: colour("ink") },
    text: { fontSize: 12 },
    range: {
      category: CATEGORIES[root.dataset.theme],
      ordinal: { scheme: "viridis", extent: dark ? [0.3, 1] : [0, 0.82] },
      ramp: [colour("heat-low"), colour("heat-high")],
      heatmap: [colour("heat-low"), colour("heat-high")],
    },
  };
}

function records(columns) {
  const names = Object.keys(columns);
  return columns.cell_id.map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

const runs = payload.places.map((place) => new Map(records(place.runs).map((run) => [run.cell_id, run])));

function named(place, row) {
  const name = payload.places[place].names[row.cell_id];
  return { ...runs[place].get(row.cell_id), ...row, name, cell: name };
}

const ROWS = {
  front: (place) => payload.places[place].front.map((row) => ({ ...row, cell: row.name })),
  curves: (place, choice) => payload.places[place].curves.filter((row) => row.metric === choice.METRIC).map((row) => named(place, row)),
  density: (place) => payload.places[place].density.map((row) => named(place, row)),
  cosine: (place) => payload.places[place].cosine.map((row) => named(place, row)),
  effects: (place, choice) => payload.places[place].effects.filter((row) => row.metric === choice.METRIC),
  heat: (place) => [...runs[place].values()],
};

function filled(value, words, ordered) {
  if (typeof value === "string") return value.replace(/\$([A-Z_]+)/g, (whole, word) => words[word] ?? whole);
  if (Array.isArray(value)) return value.map((item) => filled(item, words, ordered));
  if (value === null || typeof value !== "object") return value;
  const made = Object.fromEntries(Object.entries(value).map(([key, item]) => [key, filled(item, words, ordered)]));
  if (ordered && value.field === "$COLOUR") made.type = "ordinal";
  return made;
}

function draw(plot) {
  const place = Number(plot.closest(".place").dataset.place);
  const choice = Object.fromEntries([...plot.closest("figure").querySelectorAll("select")].map((select) => [select.name, select.value]));
  const rows = ROWS[plot.dataset.chart](place, choice);
  const values = rows.map((row) => row[choice.COLOUR]).filter((value) => value !== null && value !== undefined);
  const words = {
    ...choice,
    METRIC_TITLE: payload.titles[choice.METRIC] ?? choice.METRIC,
    DESCRIPTION: plot.dataset.description,
    INK: colour("ink"), MUTED: colour("muted"), LINE: colour("accent"), PAGE: colour("page"),
    INK_LOW: colour("heat-ink-low"), INK_HIGH: colour("heat-ink-high"),
  };
  const numeric = values.length > 0 && values.every((value) => typeof value === "number");
  const spec = filled(payload.specs[plot.dataset.chart], words, numeric);
  spec.datasets = { rows };
  if (spec.height.step) spec.height = spec.height.step * new Set(rows.map((row) => String(row[choice.Y ?? "step"]))).size;
  plot.classList.remove("waiting");
  plot.classList.add("drawn");
  plot.replaceChildren();
  return vegaEmbed(plot, spec, { actions: false, renderer: "svg", logLevel: 1, config: config(plot.clientWidth, rows, values) });
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "400px" });
document.querySelectorAll(".plot").forEach((plot) => {
  plot.classList.add("waiting");
  seen.observe(plot);
});
document.querySelectorAll("figure select").forEach((select) => {
  select.addEventListener("change", () => select.closest("figure").querySelectorAll(".plot").forEach(draw));
});

// The others follow while nothing else is to do, so that a page that is printed has them all.
const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 200));
function drawNext() {
  const plot = document.querySelector(".place:not([hidden]) .plot.waiting");
  if (!plot) return;
  seen.unobserve(plot);
  draw(plot).finally(() => idle(drawNext));
}
addEventListener("load", () => idle(drawNext));

const chooser = document.getElementById("place");
chooser?.addEventListener("change", () => {
  document.querySelectorAll(".place").forEach((place) => { place.hidden = place.dataset.place !== chooser.value; });
  idle(drawNext);
});

// Table
const MANY = 200;

function detail(place, cell, baseline) {
  const { same, cells } = payload.places[place].config;
  const list = (options) => element("dl", {}, ...Object.entries(options).map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  const parts = [];
  const commands = payload.places[place].commands[cell].map((i) => payload.commands[i]);
  const unmade = baseline ? "Somebody else's transcoder, on the same held-out rows" : "No sweep in this folder names this cell";
  parts.push(element("h3", { textContent: commands.length ? "Made by" : unmade }));
  commands.forEach((command) => parts.push(element("pre", {}, element("code", { textContent: command }))));
  if (Object.keys(cells[cell]).length) parts.push(element("h3", { textContent: "Its own" }), list(cells[cell]));
  parts.push(element("h3", { textContent: "Shared by all runs here" }), list(same));
  return element("div", {}, ...parts);
}

function toggle(button) {
  const row = button.closest("tr");
  const open = button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", String(open));
  if (!open) return row.nextElementSibling.remove();
  const place = Number(row.closest(".place").dataset.place);
  const cell = element("td", { colSpan: row.children.length }, detail(place, row.dataset.cell, row.classList.contains("baseline")));
  row.after(element("tr", { className: "detail" }, cell));
}

function key(row, column) {
  const value = row.children[column].dataset.value;
  if (value === "") return null;
  return Number.isNaN(Number(value)) ? value : Number(value);
}

function compare(a, b) {
  if (a === null || b === null) return 0;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

function sort(heading) {
  const table = heading.closest("table");
  const headings = [...heading.parentElement.children];
  const column = headings.indexOf(heading);
  const down = heading.getAttribute("aria-sort") === "ascending";
  headings.forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].filter((row) => row.dataset.cell).map((row) => ({ row, key: key(row, column), open: row.nextElementSibling?.className === "detail" ? row.nextElementSibling : null }));
  rows.sort((a, b) => (a.key === null) - (b.key === null) || (down ? compare(b.key, a.key) : compare(a.key, b.key)));
  body.replaceChildren(...rows.flatMap(({ row, open }) => (open ? [row, open] : [row])));
  show(table);
}

// A word is an option with its value (top_k=32), a value, or the beginning of one, such as of a cell's id.
function has(row, names, word) {
  const [name, value] = word.split("=");
  const is = (field, text) => field.textContent.toLowerCase() === text || field.dataset.value.toLowerCase() === text;
  if (value !== undefined) {
    const field = row.children[names.indexOf(name)];
    return field !== undefined && (is(field, value) || (value !== "" && Number(value) === Number(field.dataset.value || NaN)));
  }
  return [...row.children].some((field) => is(field, word) || field.dataset.value.toLowerCase().startsWith(word));
}

// Rows that match the filter, the first of them where there are many; a button shows the rest.
function show(table, all = table.dataset.all === "yes") {
  const section = table.closest("section");
  const words = section.querySelector(".filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const count = section.querySelector(".count");
  const rows = [...table.tBodies[0].rows].filter((row) => row.dataset.cell);
  const names = [...table.tHead.rows[0].cells].map((heading) => heading.dataset.name);
  const found = rows.filter((row) => words.every((word) => has(row, names, word)));
  const shown = new Set(all ? found : found.slice(0, MANY));
  rows.forEach((row) => {
    row.hidden = !shown.has(row);
    if (row.nextElementSibling?.className === "detail") row.nextElementSibling.hidden = row.hidden;
  });
  const number = (n) => n.toLocaleString("en");
  count.textContent = `${number(shown.size)} of ${number(rows.length)} runs `;
  if (shown.size < found.length && words.length) count.append(`(${number(found.length)} match) `);
  if (shown.size < found.length) {
    const rest = element("button", { type: "button", textContent: "show all" });
    rest.addEventListener("click", () => { table.dataset.all = "yes"; show(table); });
    count.append(rest);
  }
}

document.querySelectorAll("table.cells").forEach((table) => {
  table.tHead.addEventListener("click", (event) => event.target.closest("button") && sort(event.target.closest("th")));
  table.tBodies[0].addEventListener("click", (event) => event.target.closest(".more") && toggle(event.target.closest(".more")));
  table.closest("section").querySelector(".filter").addEventListener("input", () => show(table));
  show(table);
});
