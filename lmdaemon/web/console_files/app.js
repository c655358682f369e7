// The page as a whole: who is asked, which view is shown, and when it is refreshed.

import { afterActions, rights, say } from "./act.js";
import { Gone, Problem, get, open, read, token } from "./api.js";
import { count, h, replace, time } from "./dom.js";
import { STILL, VIEWS, note } from "./views.js";

const AGAIN_MS = 2000; // until a daemon that did not answer is asked again
const REFRESH_MS = 10000; // of a view without events
const SILENT_MS = 10000; // figures come every second: a stream that says nothing for so long is dead
const NAV = { overview: "Overview", sessions: "Sessions", deliveries: "Deliveries", events: "Events", runbook: "Runbook" };
const UNDER = { operator: "overview", session: "sessions", delivery: "deliveries" };
const main = document.getElementById("main");
let place = h("div");
let shown = "";
let busy = false;
let wanted = false;
let goneSince = null;
let signedOut = false;
let heard = false;

function route() {
  const [path, search] = (location.hash.slice(2) || "overview").split("?");
  const decode = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
  const [name, ...parts] = path.split("/").map(decode);
  return { name: VIEWS[name] ? name : "overview", parts, asked: Object.fromEntries(new URLSearchParams(search ?? "")) };
}

function notice(id, ...text) {
  document.getElementById(id)?.remove();
  if (text.length) document.getElementById("notices").prepend(h("p", { id, class: "wrong" }, text));
}

function lost() {
  if (goneSince) return;
  goneSince = new Date().toISOString();
  notice("gone", "The daemon has not answered since ", time(goneSince), ". What is shown is from before; it is asked again every two seconds.");
}

function found() {
  if (goneSince) say("The daemon answers again.");
  goneSince = null;
  notice("gone");
}

// Draws the view of the address. A call during another makes it draw once more after.
async function draw() {
  if (signedOut) return;
  if (busy) return void (wanted = true);
  busy = true;
  const { name, parts, asked } = route();
  const isNew = shown !== location.hash;
  if (isNew) {
    shown = location.hash;
    place = h("div", {}, h("p", { class: "faint", "data-part": "loading" }, "Loading …"));
    replace(main, place);
    for (const one of document.querySelectorAll("#nav a")) {
      if (one.dataset.name === (UNDER[name] ?? name)) one.setAttribute("aria-current", "page");
      else one.removeAttribute("aria-current");
    }
  }
  const into = place;
  try {
    await VIEWS[name](into, parts, asked);
    into.querySelector('[data-part="loading"]')?.remove();
    into.querySelector('[data-part="failed"]')?.remove();
    found();
  } catch (error) {
    failed(into, error);
  }
  busy = false;
  if (wanted || shown !== location.hash) {
    wanted = false;
    draw();
  }
}

function failed(into, error) {
  if (error instanceof Problem && error.status === 401) return signIn("The daemon does not know this token.");
  if (error instanceof Gone) lost();
  into.querySelector('[data-part="loading"]')?.remove();
  into.querySelector('[data-part="failed"]')?.remove();
  const text = error instanceof Problem ? `${error.message} (${error.status} ${error.code})` : error.message;
  into.prepend(h("p", { class: "panel bad-edge", "data-part": "failed", role: "alert" }, text));
}

let soon = null;
function refreshSoon() {
  soon ??= setTimeout(() => {
    soon = null;
    refresh();
  }, 1000);
}

function refresh() {
  if (!document.hidden && !STILL.has(route().name)) draw();
}

// Reads events while the page is open, also after the daemon was away.
async function hear() {
  while (!signedOut) {
    const silence = new AbortController();
    let timer = setTimeout(() => silence.abort(), SILENT_MS);
    try {
      await read(await open("GET", "v1/events", silence.signal), (name, data) => {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENT_MS);
        notice("deaf");
        found();
        if (name === "figures") {
          if (data.snapshot && heard) refresh(); // the stream broke: events are missing
          heard = true;
          document.getElementById("now").textContent = `${count(data.live)} live, ${count(data.pending)} pending, ${count(data.dead)} dead`;
        } else refreshSoon();
        note(name, data);
      });
    } catch (error) {
      if (error instanceof Problem && error.status === 401) return signIn("The daemon does not know this token.");
      if (error instanceof Problem) notice("deaf", `No live events: ${error.message}. The page is refreshed every ten seconds.`);
      else lost();
    }
    clearTimeout(timer);
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

function signIn(why) {
  signedOut = true;
  replace(document.getElementById("nav"));
  replace(document.getElementById("who"));
  const input = h("input", { type: "password", autocomplete: "off", required: true, id: "token" });
  replace(main, h("h1", {}, "API token"), why && h("p", { class: "bad", role: "alert" }, why),
    h("p", {}, "A token of the daemon's ", h("code", {}, "[api] token_file"), ", or one of ", h("code", {}, "read_token_file"), ", with which nothing can be changed. It is kept until this tab is closed."),
    h("form", { class: "row", onsubmit: (event) => {
      event.preventDefault();
      token.set(input.value.trim());
      location.reload();
    } }, h("label", {}, "Token", input), h("button", { class: "main" }, "Go on")));
  token.set("");
  document.title = "Token · lmdaemon";
  input.focus();
}

async function start() {
  try {
    Object.assign(rights, await get("v1/token"));
  } catch (error) {
    if (error instanceof Problem && error.status === 401) return signIn(token.get() ? "The daemon does not know this token." : "");
    replace(main, h("p", { class: "panel bad-edge", role: "alert" }, error.message, error instanceof Gone ? " It is asked again every two seconds." : ` (${error.status} ${error.code})`));
    if (error instanceof Gone) setTimeout(start, AGAIN_MS);
    return;
  }
  replace(document.getElementById("nav"), Object.entries(NAV).map(([name, text]) => h("a", { href: "#/" + name, "data-name": name }, text)));
  replace(document.getElementById("who"), h("span", { id: "now", class: "faint" }), " ",
    h("span", {}, rights.name ?? "", rights.mayChange ? "" : " (may only read)"), " ",
    token.get() && h("button", { type: "button", onclick: () => { token.set(""); location.reload(); } }, "Forget token"));
  afterActions(refresh);
  addEventListener("hashchange", () => { draw(); main.focus(); });
  document.addEventListener("visibilitychange", refresh);
  setInterval(refresh, REFRESH_MS);
  shown = null;
  draw();
  hear();
}

start();
