// One view for each address: draw(place, parts, query) makes it, and is called again to refresh it.

import * as act from "./act.js";
import { get } from "./api.js";
import { chart, command, count, facts, faint, h, link, p, prose, query, replace, row, span, table, time, when } from "./dom.js";
import { latestOf } from "./trial.js";

const PAGE = 50;
const at = (operator) => "v1/operators/" + encodeURIComponent(operator);
const STATE = { pass: "good", warn: "warn", fail: "bad", delivered: "good", pending: "warn", dead: "bad", active: "good" };
const tone = (kind, ...text) => h("span", { class: kind }, text);
export const state = (text) => h("span", { class: "state " + (STATE[text] ?? "") }, text);

const asCommand = (...words) => faint("The same as a command: ", h("code", {}, command(...words)));
const operatorLink = ({ operator: name }) => link(name, "operator", name);
const sessionLink = ({ operator: name, sessionId: id }) => link(id, "session", name, id);
const h2 = (text) => h("h2", {}, text);

function part(place, name) {
  let found = place.querySelector(`:scope > [data-part="${name}"]`);
  if (!found) place.append((found = h("div", { "data-part": name })));
  return found;
}

const put = (place, name, ...children) => replace(part(place, name), ...children);

function heading(place, text, title) {
  put(place, "heading", h("h1", {}, text));
  document.title = `${title ?? text} · lmdaemon`;
}

const trouble = (one) => (one.keptBack ? 1e9 : 0) + (one.dead ? 1e6 : 0) + one.pending / 1e3;

function keptBack({ held, heldSince, breaker, breakerSince, lastFailure, notBefore, keptBack: why, notify }) {
  if (held) return tone("warn", "held since ", when(heldSince));
  if (why && breaker !== "closed") return tone("bad", `failing: ${lastFailure?.reason ?? ""}, since `, when(breakerSince));
  if (why) return tone("bad", "asks for no attempts until ", when(notBefore));
  return notify ? tone("good", "sending") : tone("faint", "not notified");
}

// -- overview

const ageOf = ({ oldestPendingSeconds: oldest }) => (oldest ? `, the oldest ${span(oldest)} old` : "");
const figuresOf = (one) => (one.dead === undefined ? "" : `${count(one.pending)} pending, ${count(one.dead)} dead${ageOf(one)}`);

const minutesOf = (figures, operator) => figures.spans.find((one) => one.stepSeconds === 60).series.find((one) => one.operator === operator);

let shownAt = 0;

async function overview(place, parts, asked) {
  heading(place, "Overview");
  for (const name of ["health", "back", "operators", "charts", "daemons"]) part(place, name);
  const health = await get("health"); // answers even if the store does not
  const checks = Object.entries(health.checks ?? {}).map(([name, [check]]) => [name, check]);
  const wrong = checks.filter(([, check]) => check.status !== "pass");
  put(place, "health",
    p("Health: ", state(health.status), tone("faint", wrong.length ? "" : `, all ${checks.length} checks`)),
    wrong.map(([name, check]) => h("div", { class: `panel ${check.status === "fail" ? "bad" : "warn"}-edge` },
      p(state(check.status), " ", h("strong", {}, name), ": ", name === "operators" && !check.notConfigured ? "some are kept back, see below" : prose([check.output, figuresOf(check)].filter(Boolean).join("; "))),
      p(link("What it means and what to do", "runbook", "health: " + name)))));
  const [operators, figures, daemons] = await Promise.all([get("v1/operators"), get("v1/figures"), get("v1/daemons")]);
  const items = operators.items.sort((one, two) => trouble(two) - trouble(one) || one.operator.localeCompare(two.operator));
  const back = items.filter((one) => one.keptBack);
  put(place, "back", back.length > 0 && h2(`Kept back: ${count(back.length)}`),
    back.slice(0, 8).map((one) => h("div", { class: `panel ${one.held ? "warn" : "bad"}-edge` },
      h("h3", {}, operatorLink(one)), p(prose(one.keptBack)),
      one.outlook && p("By itself: ", prose(one.outlook)),
      p(figuresOf(one)))),
    back.length > 8 && p(`and ${count(back.length - 8)} more in the table below`));
  const all = minutesOf(figures, null);
  put(place, "charts", h2("The last hour"),
    faint("One bar a minute, the newest at the right. Counted since the daemon's start."),
    h("div", { class: "tiles" }, chart("Ends", all.ends), chart("Delivered", all.delivered),
      chart("Failed attempts", all.failed, "", "bad"), chart("Touches", all.touches), chart("Lag of ends", all.lagMs, "ms")));
  listOperators(place, items, asked);
  const slowest = daemons.items.reduce((one, two) => (two.serviceLagMs > one.serviceLagMs ? two : one));
  const told = (one) => (one.self ? " (this one)" : "") + (one === slowest && one.serviceLagMs > 0 ? " (slowest clock)" : "");
  put(place, "daemons", h2("Daemons"),
    table("Daemons", ["Name", "Version", "Address", "Since", "Last heard", ["Operators", "number"], ["Behind", "number"]],
      daemons.items.map((one) => [[one.name, told(one)], one.version, one.address, when(one.since), time(one.lastHeardAt), count(one.operators.length), `${count(one.serviceLagMs)} ms`]), "None."));
}

function listOperators(place, items, asked) {
  const whole = part(place, "operators");
  if (!whole.firstChild) {
    whole.append(h2("Operators"), h("div", { class: "row" },
      h("label", {}, "Name has", h("input", { type: "search", id: "operator-name", value: asked.name ?? "" }))), h("div"));
    whole.querySelector("input").addEventListener("input", () => { shownAt = 0; whole.draw(); });
  }
  const input = whole.querySelector("input");
  whole.draw = () => {
    const found = items.filter((one) => one.operator.toLowerCase().includes(input.value.toLowerCase()));
    shownAt = Math.min(shownAt, Math.max(0, Math.floor((found.length - 1) / PAGE) * PAGE));
    const turn = (label, by, off) => h("button", { type: "button", disabled: off, "data-key": label, onclick: () => { shownAt += by; whole.draw(); } }, label);
    replace(whole.lastChild,
      table("Operators", ["Operator", ["Live", "number"], ["Pending", "number"], ["Dead", "number"], ["Oldest", "number"], "State"],
        found.slice(shownAt, shownAt + PAGE).map((one) => [operatorLink(one), count(one.live), count(one.pending),
          one.dead ? tone("bad", count(one.dead)) : "0", span(one.oldestPendingSeconds), keptBack(one)]),
        items.length ? "No operator has this in its name." : "No operator is configured."),
      found.length > PAGE && row(turn("Previous", -PAGE, shownAt === 0), turn("Next", PAGE, shownAt + PAGE >= found.length),
        h("span", {}, `${count(shownAt + 1)} to ${count(Math.min(found.length, shownAt + PAGE))} of ${count(found.length)}, those in trouble first`)));
  };
  whole.draw();
}

// -- operator

async function operator(place, [name]) {
  const [{ items }, figures] = await Promise.all([get("v1/operators"), get("v1/figures")]);
  const one = items.find((each) => each.operator === name);
  heading(place, name, name);
  if (!one) {
    put(place, "gate", p("No operator of this name is configured. Sessions and deliveries that it had are kept: "), link("its deliveries", "deliveries", { operator: name }));
    return;
  }
  put(place, "gate",
    h("div", { class: `panel ${one.keptBack ? (one.held ? "warn" : "bad") : "good"}-edge` },
      p(h("strong", {}, one.keptBack ? prose(one.keptBack) : (one.notify ? "Nothing keeps it back." : "Its ends are not sent: notify is false."))),
      one.outlook && p("By itself: ", prose(one.outlook)),
      one.keptBack && p("You could: ", one.held ? "see who held it and why, send a test notice, and release it when that is over. " : "tell the operator what is answered, send a test notice or probe it when they say it is mended, or hold it meanwhile. Nothing is lost while it waits. ",
        link("More in the runbook", "runbook", one.held ? "LmdaemonOperatorHeld" : "LmdaemonOperatorDown")),
      one.dead > 0 && p(`${count(one.dead)} were given up (dead). Retry them when the reason is mended, or discard what nobody wants. `, link("About dead deliveries", "runbook", "LmdaemonDeliveriesDead"))),
    row(act.hold(name), act.release(one), act.probe(one), act.sendTest(name), act.check(name), act.retryAll(one), act.discardAll(one)),
    act.rights.mayChange ? null : faint("This token may only read, so nothing can be changed here."),
    facts(["Live sessions", count(one.live)],
      ["Pending", [link(count(one.pending), "deliveries", { operator: name, state: "pending" }), ageOf(one)]],
      ["Dead", link(count(one.dead), "deliveries", { operator: name, state: "dead" })],
      ["Breaker", [one.breaker, one.breakerSince ? [" since ", when(one.breakerSince)] : ""]],
      ["Failed in a row", [count(one.failedAttempts), one.failingSince ? [", since ", when(one.failingSince)] : ""]],
      ["Last failure", one.lastFailure ? [when(one.lastFailure.at), " ", h("strong", {}, one.lastFailure.reason), one.lastFailure.detail ? ": " + one.lastFailure.detail : ""] : "none"],
      one.notBefore && ["Next attempt not before", when(one.notBefore)],
      one.endsWaitUntil && ["Ends for inactivity wait", ["at most until ", when(one.endsWaitUntil)]],
      one.held && ["Held", [when(one.heldSince), one.heldBy ? ` by ${one.heldBy}` : "", `: ${one.heldReason}`]],
      one.heldNote && ["Note", one.heldNote],
      one.heldUntil && ["Released by itself", when(one.heldUntil)],
      ["Dialect", one.dialect]));
  const series = minutesOf(figures, name);
  put(place, "charts", h2("The last hour"), series
    ? h("div", { class: "tiles" }, chart("Ends", series.ends), chart("Delivered", series.delivered), chart("Failed attempts", series.failed, "", "bad"))
    : faint("No figures: nothing has happened since the start, or it is not among the 100 busiest operators."));
  const trial = part(place, "trial");
  const came = latestOf(name);
  if (came && trial.firstChild !== came) replace(trial, came);
  const { items: latest } = await get("v1/deliveries" + query({ operator: name, limit: 100 }));
  const results = new Map();
  for (const { attempts, lastError } of latest) {
    const result = attempts ? lastError ?? "success" : "not tried";
    results.set(result, (results.get(result) ?? 0) + 1);
  }
  const most = [...results].sort((a, b) => b[1] - a[1]).map(([result, many]) => `${many} ${result}`);
  put(place, "latest", h2("Latest deliveries"), latest.length > 0 && faint(`Last results of the latest ${latest.length}: ${most.join(", ")}.`),
    deliveryTable(latest.slice(0, 10)), link("All of them", "deliveries", { operator: name }));
}

// -- sessions

async function sessions(place, parts, asked) {
  heading(place, "Sessions");
  const form = part(place, "form");
  if (!form.firstChild) {
    const id = h("input", { type: "search", name: "id", value: asked.id ?? "", autocomplete: "off", maxlength: 256 });
    form.append(h("form", { class: "row", role: "search", onsubmit: (event) => {
      event.preventDefault();
      location.hash = "#/sessions" + query({ id: id.value });
    } }, h("label", {}, "Id of a session or a player", id), h("button", { class: "main" }, "Find")));
  }
  if (!asked.id) {
    put(place, "found", faint("Sessions of all operators, also of those that have left the configuration."));
    return;
  }
  const pages = await Promise.all([get("v1/sessions" + query({ sessionId: asked.id, limit: PAGE })), get("v1/sessions" + query({ playerId: asked.id, limit: PAGE, after: asked.after }))]);
  const found = new Map();
  for (const one of pages.flatMap((page) => page.items)) found.set(JSON.stringify([one.operator, one.sessionId]), one);
  put(place, "found",
    table("Sessions", ["Session", "Operator", "Player", "State", "Opened", "Last seen", "Ended"],
      [...found.values()].map((one) => [sessionLink(one), operatorLink(one), one.playerId,
        [state(one.state), one.reason ? ` (${one.reason})` : ""], time(one.openedAt), time(one.lastSeenAt), time(one.endedAt)]), "No session and no player has this id."),
    pages[1].next && link("More of this player", "sessions", { id: asked.id, after: pages[1].next }),
    asCommand("find", asked.id));
}

async function session(place, [name, id]) {
  heading(place, id, "Session " + id);
  if (id === "." || id === "..") {
    put(place, "facts", p("A browser cannot ask for a session of this name. In a terminal:"), h("pre", {}, command("sessions", "show", name, id)));
    return;
  }
  const one = await get(`${at(name)}/sessions/${encodeURIComponent(id)}`);
  put(place, "facts",
    facts(["State", [state(one.state), one.reason ? `, ${one.reason}` : ""]], ["Operator", operatorLink(one)],
      ["Player", link(one.playerId, "sessions", { id: one.playerId })], ["Idle time", span(one.idleTimeoutSeconds)],
      one.expiresAt && ["Expires, if nothing is heard", when(one.expiresAt)], ["Attributes", h("code", {}, JSON.stringify(one.attributes))]),
    row(act.close(one)));
  const steps = [[one.openedAt, "Opened"], [one.lastSeenAt, "Last seen"]];
  if (one.endedAt) steps.push([one.endedAt, ["Ended: ", h("strong", {}, one.reason)]]);
  for (const each of one.deliveries) {
    const to = [link(each.sink, "delivery", each.id), ` (${count(each.attempts)} ${each.attempts === 1 ? "attempt" : "attempts"})`];
    const why = each.state !== "delivered" && each.lastError ? `: ${each.lastError}` : "";
    const then = each.settledAt ? "" : each.nextAttemptAt ? ", tried again then" : ", not tried as things are";
    steps.push([each.settledAt ?? each.nextAttemptAt, [state(each.state), " to ", to, why, then]]);
  }
  steps.sort((a, b) => (a[0] ?? "9").localeCompare(b[0] ?? "9"));
  put(place, "timeline", h2("What happened"), h("ol", { class: "timeline" }, steps.map(([moment, text]) => h("li", {}, when(moment), " ", text))),
    asCommand("sessions", "show", name, id));
}

// -- deliveries

function deliveryTable(items, box) {
  const heads = ["Delivery", "State", "Last answer", ["Attempts", "number"], "Next attempt", "Created", "Session", "Operator", "Sink"];
  return table("Deliveries", box ? ["Select", ...heads] : heads,
    items.map((one) => {
      const id = link(one.id.slice(0, 14) + "…", "delivery", one.id);
      id.title = one.id;
      const answer = [one.lastStatus, one.lastCode === null ? null : `error ${one.lastCode}`, one.lastError].filter((each) => each !== null).join(", ");
      const cells = [tone("id", id), [state(one.state), one.discarded ? ", discarded" : ""], answer,
        count(one.attempts), time(one.nextAttemptAt), time(one.createdAt), sessionLink(one), operatorLink(one), one.sink];
      return box ? [box(one), ...cells] : cells;
    }), "No deliveries.");
}

let chosen = { ids: new Set() }; // ids ticked in the list of one operator and sink

async function deliveries(place, parts, asked) {
  heading(place, "Deliveries");
  const form = part(place, "form");
  if (!form.firstChild) {
    const name = h("input", { type: "search", value: asked.operator ?? "", autocomplete: "off" });
    const sink = h("input", { value: asked.sink ?? "", placeholder: "http", autocomplete: "off" });
    const which = h("select", {}, ["", "pending", "dead", "delivered"].map((one) => h("option", { value: one, selected: one === (asked.state ?? "") }, one || "any")));
    form.append(h("form", { class: "row", role: "search", onsubmit: (event) => {
      event.preventDefault();
      location.hash = "#/deliveries" + query({ operator: name.value, sink: sink.value, state: which.value });
    } }, h("label", {}, "Operator", name), h("label", {}, "Sink", sink), h("label", {}, "State", which), h("button", { class: "main" }, "Show")));
  }
  const page = await get("v1/deliveries" + query({ operator: asked.operator, sink: asked.sink, state: asked.state, after: asked.after, limit: PAGE }));
  const list = part(place, "list");
  const filter = query({ operator: asked.operator, sink: asked.sink });
  if (chosen.filter !== filter) chosen = { filter, ids: new Set() };
  const { ids } = chosen;
  for (const one of page.items) if (one.state !== "dead") ids.delete(one.id);
  const buttons = [act.retrySome(ids), act.discardSome(ids)];
  const told = h("span");
  const tell = () => {
    for (const button of buttons) button.disabled = !act.rights.mayChange || !ids.size;
    replace(told, ids.size ? `${count(ids.size)} selected, on all pages` : "Dead ones can be selected.");
  };
  const box = (one) => one.state === "dead" && h("input", { type: "checkbox", value: one.id, checked: ids.has(one.id), "data-key": "box " + one.id, "aria-label": "Select " + one.id });
  const boxes = () => [...list.querySelectorAll("tbody input")];
  const all = h("button", { type: "button", "data-key": "all", onclick: () => {
    const every = boxes().every((one) => one.checked);
    for (const one of boxes()) one.checked = !every;
    list.onchange();
  } }, "Select all on this page, or none");
  const dead = page.items.some((one) => one.state === "dead");
  replace(list, (dead || ids.size > 0) && row(buttons, dead && all, told), deliveryTable(page.items, dead && box),
    row(asked.after && link("First page", "deliveries", { ...asked, after: "" }), page.next && link("Next page", "deliveries", { ...asked, after: page.next })));
  list.onchange = () => {
    for (const one of boxes()) ids[one.checked ? "add" : "delete"](one.value);
    tell();
  };
  tell();
}

async function delivery(place, [id]) {
  const one = await get("v1/deliveries/" + encodeURIComponent(id));
  heading(place, id, "Delivery " + id);
  put(place, "facts",
    facts(["State", state(one.state)], one.discarded && ["Discarded", [when(one.discarded.at), one.discarded.by ? ` by ${one.discarded.by}` : "", `: ${one.discarded.note}`]],
      ["Operator", operatorLink(one)], ["Session", sessionLink(one)],
      ["Sink", one.sink], ["Created", when(one.createdAt)], one.state === "pending" && ["Next attempt", one.nextAttemptAt ? when(one.nextAttemptAt) : "none as things are"],
      one.settledAt && ["Settled", when(one.settledAt)], ["Attempts", count(one.attempts)], one.attemptSince && ["Under way", ["since ", when(one.attemptSince)]], one.bodySha256 && ["SHA-256 of the body", h("code", {}, one.bodySha256)]),
    one.state === "dead" && row(act.retrySome(new Set([id]), "Retry"), act.discardSome(new Set([id]), "Discard", one.discarded ? "It is discarded." : "")));
  put(place, "attempts", h2("Attempts, the oldest first"),
    table("Attempts", ["Time", ["Took", "number"], ["Status", "number"], ["Code", "number"], ["Reason", "wide"], ["Answer", "wide"], ["Sent to", "wide"]],
      one.history.map((each) => [time(each.at), each.durationMs === null ? "not known" : `${count(each.durationMs)} ms`, each.status ?? "–", each.code ?? "–",
        each.error ? [tone("bad", each.error), each.detail ? ": " + each.detail : ""] : tone("good", "success"), each.answer ? h("code", {}, each.answer) : "–", [each.url, each.address ? ` (${each.address})` : ""]]), "Not tried yet."));
  const kept = one.request?.body === null ? "After the delivery the body is no longer kept; its SHA-256 stands above." : "Secrets are masked (***); a signature is made anew for each attempt.";
  put(place, "request", h2("Request"),
    one.request ? [h("pre", {}, one.request.curl), faint(kept)] : faint("Nothing is sent by HTTP: it is for a plug-in, or its operator has no URL, or a fact that must be sent is not known."),
    asCommand("deliveries", "show", id));
}

// -- events

const KEPT = 500;
const seen = [];
let paused = false;

export function note(name, data) {
  if (name === "figures" || paused) return;
  seen.unshift({ at: new Date().toISOString(), name, data });
  seen.length = Math.min(seen.length, KEPT);
  drawEvents();
}

let drawing = null;

function drawEvents() {
  const place = document.querySelector('[data-part="tail"]');
  if (!place || drawing) return;
  drawing = setTimeout(() => {
    drawing = null;
    const wanted = (document.getElementById("event-filter")?.value ?? "").toLowerCase();
    const rows = seen.filter(({ name, data }) => (name + JSON.stringify(data)).toLowerCase().includes(wanted)).slice(0, 100);
    replace(place, table("Events", ["Time", "Event", ["What", "wide"], "Operator"], rows.map(({ at: moment, name, data }) => [time(moment), tone("id", name), what(name, data), operatorLink(data)]),
      "Nothing yet. What happens from now on is shown here."));
  }, 200);
}

function what(name, data) {
  if (name === "session.ended") return [sessionLink(data), `: ${data.reason}`];
  if (name === "operator.changed") return data.held ? `held: ${data.heldReason}` : `breaker ${data.breaker}, ${count(data.pending)} pending`;
  return [sessionLink(data), " ", link(data.id, "delivery", data.id), ": ", state(data.state), data.error ? ` (${data.error})` : "", data.dueAt ? [", again at ", time(data.dueAt)] : ""];
}

async function events(place) {
  heading(place, "Events");
  const form = part(place, "form");
  if (!form.firstChild) {
    const pause = h("button", { type: "button", "aria-pressed": String(paused), onclick: () => {
      paused = !paused;
      pause.setAttribute("aria-pressed", String(paused));
      pause.textContent = paused ? "Continue" : "Pause";
    } }, paused ? "Continue" : "Pause");
    form.append(row(h("label", {}, "Has the text", h("input", { type: "search", id: "event-filter", oninput: drawEvents })), pause),
      faint(`What happened while this page was open, the newest first: at most ${KEPT} kept, 100 shown. In a terminal: `, h("code", {}, "lmdaemon events")));
  }
  part(place, "tail");
  drawEvents();
}

// -- runbook

let book = null;

async function runbook(place, [name]) {
  book ??= await (await fetch("runbook.json")).json();
  heading(place, name ?? "Runbook");
  const linked = (text) => text.split(/(Lmdaemon[A-Z]\w+|`[^`]*`|\*\*[^*]*\*\*)/).map((piece) => {
    if (book[piece]) return link(piece, "runbook", piece);
    if (piece.startsWith("`")) return h("code", {}, piece.slice(1, -1));
    return piece.startsWith("**") ? h("strong", {}, piece.slice(2, -2) + ": ") : piece;
  });
  put(place, "text", name
    ? [book[name] ? book[name].map((line) => p(linked(line))) : p("There is no entry of this name."), p(link("All entries", "runbook"))]
    : h("ul", {}, Object.keys(book).map((one) => h("li", {}, link(one, "runbook", one)))));
}

export const VIEWS = { overview, operator, sessions, session, deliveries, delivery, events, runbook };
export const STILL = new Set(["runbook", "events"]); // never refreshed
