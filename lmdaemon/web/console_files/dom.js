// Elements are made by calls, and texts are always text: nothing here reads markup.

export function h(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if ((value ?? false) === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  add(made, children);
  return made;
}

function add(to, children) {
  for (const child of children.flat(Infinity)) {
    if ((child ?? false) === false) continue;
    to.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

// Replaces the children. Focus goes to the new child with the data-key of the focused one.
export function replace(place, ...children) {
  const key = place.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  place.replaceChildren();
  add(place, children);
  if (key) place.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

export const p = (...text) => h("p", {}, text);

export const faint = (...text) => h("p", { class: "faint" }, text);

export const row = (...children) => h("div", { class: "row" }, children);

// A wall time in UTC, with the local time in its title; null shows a dash.
export function time(text) {
  if (!text) return "–";
  const at = new Date(text);
  const today = new Date().toISOString().slice(0, 10);
  const utc = at.toISOString();
  const shown = (utc.slice(0, 10) === today ? "" : utc.slice(0, 10) + " ") + utc.slice(11, 19) + "Z";
  return h("time", { datetime: text, title: `${utc}, here ${at.toLocaleString()}` }, shown);
}

// A text of the daemon, in which times are shown as everywhere.
export const prose = (text) => text.split(/(\d{4}-\d\d-\d\dT[\d:.]+Z)/).map((piece, at) => (at % 2 ? when(piece) : piece));

// A wall time, and how far from now it is.
export function when(text) {
  if (!text) return "–";
  const seconds = (new Date(text).getTime() - Date.now()) / 1000;
  return [time(text), h("span", { class: "faint" }, seconds < 0 ? ` (${span(-seconds)} ago)` : ` (in ${span(seconds)})`)];
}

// A length of time in its two largest units.
export function span(seconds) {
  if ((seconds ?? null) === null) return "–";
  const whole = Math.round(seconds);
  for (const [size, unit, next, small] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    const rest = Math.floor((whole % size) / next);
    if (whole >= size) return `${Math.floor(whole / size)} ${unit}` + (rest ? ` ${rest} ${small}` : "");
  }
  return `${whole} s`;
}

export const count = (number) => ((number ?? null) === null ? "–" : number.toLocaleString("en"));

export function link(text, ...path) {
  const href = "#/" + path.map((part) => (typeof part === "string" ? encodeURIComponent(part) : query(part))).join("/");
  return h("a", { href: href.replace("/?", "?"), "data-key": "link " + href }, text);
}

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => (value ?? "") !== "");
  return given.length ? "?" + new URLSearchParams(given).toString() : "";
}

// heads: texts, or [text, "number"]; rows: lists of cells.
export function table(label, heads, rows, empty) {
  if (!rows.length) return h("p", { class: "faint" }, empty);
  const [titles, kinds] = [0, 1].map((at) => heads.map((head) => [head].flat()[at]));
  return h("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0", "data-key": "table " + label },
    h("table", {},
      h("thead", {}, h("tr", {}, titles.map((title, at) => h("th", { scope: "col", class: kinds[at] }, title)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, at) => h("td", { class: kinds[at] }, cell)))))));
}

export function facts(...pairs) {
  return h("dl", {}, pairs.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value ?? "–")]));
}

// 60 bars as SVG; read aloud as a sentence.
export function chart(title, values, unit, kind = "") {
  const space = "http://www.w3.org/2000/svg";
  const most = Math.max(1, ...values);
  const svg = document.createElementNS(space, "svg");
  const total = values.reduce((sum, one) => sum + one, 0);
  const said = unit === "ms" ? `at most ${count(Math.max(...values))} ms` : `${count(total)} in the last hour`;
  const set = (element, attributes) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  set(svg, { class: "chart " + kind, viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img",
    "aria-label": `${title} by minute: ${said}, at most ${count(Math.max(...values))} in a minute` });
  svg.append(set(document.createElementNS(space, "line"), { x1: 0, x2: 300, y1: 59.5, y2: 59.5 }));
  values.forEach((value, at) => {
    if (!value) return;
    const tall = Math.max(1.5, (value / most) * 58);
    svg.append(set(document.createElementNS(space, "rect"), { x: at * 5 + 0.5, width: 4, y: 60 - tall, height: tall }));
  });
  return h("div", { class: "tile" }, h("h3", {}, title),
    h("div", {}, h("strong", {}, unit === "ms" ? count(Math.max(...values)) : count(total)),
      h("span", { class: "faint" }, unit === "ms" ? " ms at most" : " in all")), svg);
}

export const shell = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\\''") + "'");

// Options are arrays: a name, and a value if there is one. A text that begins with "-" is kept from being read as an option.
export function command(...words) {
  const [ids, rest] = [true, false].map((dash) => words.filter((word) => (word[0] === "-") === dash));
  const before = rest.flatMap((word) => (Array.isArray(word) && word[1]?.[0] === "-" ? word.join("=") : word));
  return ["lmdaemon", ...before, ...(ids.length ? ["--", ...ids] : [])].map(shell).join(" ");
}
