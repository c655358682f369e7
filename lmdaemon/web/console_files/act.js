// Actions. Each asks first, shows the command that does the same, and says what happened.

import { Gone, Problem, call } from "./api.js";
import { command, count, faint, h, replace, span } from "./dom.js";
import { check as begin, showNotice } from "./trial.js";

export const rights = { mayChange: true, name: null };
let refresh = () => {};

export function afterActions(then) {
  refresh = then;
}

export function say(text, wrong = false) {
  const line = h("p", { class: wrong ? "wrong" : "" }, text,
    h("button", { type: "button", onclick: () => line.remove() }, "Dismiss"));
  const place = document.getElementById("notices");
  place.append(line);
  for (const old of [...place.querySelectorAll("p:not([id])")].slice(0, -3)) old.remove();
}

export function said(error) {
  if (error instanceof Gone) return "The daemon does not answer. Perhaps it has done it: check before you try again.";
  return error instanceof Problem ? `Refused (${error.status} ${error.code}): ${error.message}` : String(error);
}

export function action(label, wanted, disabled = "") {
  const why = rights.mayChange ? disabled : "This token may only read.";
  return h("button", { type: "button", "data-key": "action " + label, disabled: Boolean(why), title: why || null,
    onclick: async () => {
      try {
        confirm({ label, ...await wanted() });
      } catch (error) {
        say(said(error), true);
      }
    } }, label);
}

// wanted: title, text, fields (elements), words of `command` (a function), label, run (returns what happened)
function confirm(wanted) {
  const dialog = document.getElementById("dialog");
  const line = h("code", {});
  const wrong = h("p", { class: "bad", role: "alert" });
  const same = () => wanted.lines?.() ?? command(...wanted.words());
  const tell = () => replace(line, same());
  const go = h("button", { class: "main" }, wanted.label);
  const form = h("form", { oninput: tell, onsubmit: async (event) => {
    event.preventDefault();
    go.disabled = true;
    replace(wrong);
    try {
      const happened = await wanted.run();
      dialog.close();
      say(happened);
      refresh();
    } catch (error) {
      replace(wrong, said(error));
      go.disabled = false;
    }
  } }, h("div", { class: "fields" }, wanted.fields), faint("The same as a command:"), h("pre", {}, line), wrong,
  h("div", { class: "row" }, go, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
    h("button", { type: "button", onclick: () => navigator.clipboard?.writeText(same()) }, "Copy")));
  replace(dialog, h("h2", { id: "dialog-title" }, wanted.title), h("p", {}, wanted.text), form);
  tell();
  dialog.showModal();
  (form.querySelector("input, select") ?? go).focus();
}

const post = (path, body) => call("POST", "v1/" + path, body);
const of = (operator, what, body) => post(`operators/${encodeURIComponent(operator)}/${what}`, body);
const input = (options) => h("input", { maxlength: 256, autocomplete: "off", ...options });
const label = (text, field) => h("label", {}, text, field);
const options = (pairs) => h("select", {}, pairs.map(([value, text]) => h("option", { value }, text)));
const given = (name, field) => (field.value ? { [name]: field.value } : {});
const option = (name, field) => (field?.value ? [[name, field.value]] : []);

const HOURS = { "30m": 0.5, "1h": 1, "2h": 2, "8h": 8, "1d": 24 };

export const hold = (operator) => action("Hold", () => {
  const note = input();
  const until = options([["", "until it is released"], ...Object.entries(HOURS).map(([value, hours]) => [value, "for " + span(hours * 3600)])]);
  return {
    title: `Stop sending to ${operator}?`,
    text: "Ends are still recorded; their deliveries wait, and do not age during the hold.",
    fields: [label("Why (for others who see the hold)", note), label("How long", until)],
    words: () => ["hold", operator, ...option("--note", note), ...option("--for", until)],
    run: async () => {
      const done = await of(operator, "hold", { ...given("note", note), ...(until.value && { forSeconds: HOURS[until.value] * 3600 }) });
      return done.changed ? `${operator} is ${done.keptBack}.` : `${operator} was held already.`;
    },
  };
});

export const release = ({ operator, pending, keptBack }) => action("Release", () => ({
  title: `Send to ${operator} at once?`,
  text: `Whatever keeps it back is over: a hold, its breaker, a Retry-After. ${count(pending)} pending deliveries are sent as fast as its concurrency allows. To try one first, probe it.`,
  words: () => ["release", operator],
  run: async () => ((await of(operator, "release")).changed ? `${operator} is released.` : `Nothing kept ${operator} back.`),
}), keptBack ? "" : "Nothing keeps it back.");

export const probe = ({ operator, pending }) => action("Probe", () => ({
  title: `Try one delivery to ${operator} now?`,
  text: "Its next delivery is sent once, whatever keeps the operator back. Success closes the breaker; a hold and a Retry-After stay.",
  words: () => ["probe", operator],
  run: async () => {
    const done = await of(operator, "probe");
    return `Probe of ${operator}: the delivery ${done.id} is ${done.state}` + (done.lastError && done.state !== "delivered" ? ` (${done.lastError}).` : ".");
  },
}), pending ? "" : "Nothing waits for it.");

const ONCE = "The operator's code may act on it. It is sent even if deliveries are kept back, and changes nothing here.";

export const sendTest = (operator) => action("Send test notice", () => {
  const [session, player] = [input({ placeholder: "made up" }), input({ placeholder: "made up" })];
  return {
    title: `Send a test notice to ${operator}?`, text: ONCE, fields: [label("Session", session), label("Player", player)],
    words: () => ["send", operator, ["--yes"], ...option("--session", session), ...option("--player", player)],
    run: async () => {
      const done = await of(operator, "send", { ...given("sessionId", session), ...given("playerId", player) });
      showNotice(operator, done);
      return `Test notice to ${operator}: ${done.meaning}.`;
    },
  };
});

export const check = (operator) => action("Check endpoint", () => ({
  title: `Run the checks against ${operator}?`, label: "Check",
  text: `At most 120 notices, 5 a second, with ids that begin with "lmcheck": half a minute or more. ${ONCE} Closing this tab ends it.`,
  words: () => ["check", operator],
  run: async () => {
    await begin(operator);
    return `${operator} is being checked.`;
  },
}));

// Dead deliveries of an operator: they are counted first.
const dead = (name, { operator, dead: many }, wanted) => action(name, async () => {
  const { dryRun: found } = await of(operator, "deliveries/retry", { dryRun: true });
  const reasons = Object.entries(found.reasons);
  const which = options([["", `all (${count(found.found)})`], ...reasons.map(([reason, some]) => [reason, `only ${reason} (${count(some)})`])]);
  const told = reasons.map(([reason, some]) => `${count(some)} ${reason}`).join(", ") || "none";
  return wanted(operator, { ...found, told }, which);
}, many ? "" : "None is dead.");

const are = (n, of = "") => count(n) + (n === 1 ? ` delivery${of} is` : ` deliveries${of} are`);

export const retryAll = (one) => dead("Retry all dead", one, (operator, found, which) => ({
  title: `Retry the dead deliveries of ${operator}?`, label: "Retry",
  text: `There are ${count(found.found)}, of which ${count(found.canBeSent)} can be sent: ${found.told}. They become due again, at most ten a second, which takes ${span(found.seconds)}. What has been sent cannot be called back.`,
  fields: label("Which", which),
  words: () => ["deliveries", "retry", ["--operator", operator], ...option("--reason", which)],
  run: async () => `${are((await of(operator, "deliveries/retry", given("reason", which))).retried, " of " + operator)} due again.`,
}));

const why = () => input({ required: true });
const STAY = "They are kept with this note and no longer count as dead; a retry takes that back.";

export const discardAll = (one) => dead("Discard all dead", one, (operator, found, which) => {
  const note = why();
  return {
    title: `Discard the dead deliveries of ${operator}?`, label: "Discard",
    text: `There are ${count(found.found)}: ${found.told}. ${operator} is never told of these ends. ${STAY}`,
    fields: [label("Which", which), label("Why", note)],
    words: () => ["deliveries", "discard", ["--operator", operator], ...option("--reason", which), ...option("--note", note)],
    run: async () => `${are((await of(operator, "deliveries/discard", { note: note.value, ...given("reason", which) })).discarded, " of " + operator)} discarded.`,
  };
});

// Changes dead deliveries one by one; in the set `ids` stay those that were refused.
const some = (ids, what, name, off, told, text, note) => action(name, () => ({
  title: `${name.split(" ")[0]} ${count(ids.size)} dead ${ids.size === 1 ? "delivery" : "deliveries"}?`, label: `${name.split(" ")[0]} ${count(ids.size)}`,
  text, fields: note && label("Why", note),
  lines: () => [...ids].slice(0, 5).map((id) => command("deliveries", what, id, ...option("--note", note))).concat(ids.size > 5 ? "…" : []).join("\n"),
  run: async () => {
    const [refused, before] = [[], ids.size];
    for (const id of [...ids]) {
      try {
        await post(`deliveries/${id}/${what}`, note && { note: note.value });
        ids.delete(id);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        refused.push(`${id}: ${error.message}`);
      }
    }
    return `${are(before - refused.length)} ${told}.` + (refused.length ? ` ${count(refused.length)} refused, such as ${refused[0]}.` : "");
  },
}), off);

export const retrySome = (ids, name = "Retry selected") => some(ids, "retry", name, "", "due again", "They become due again. What has been sent cannot be called back.");

export const discardSome = (ids, name = "Discard selected", off = "") => some(ids, "discard", name, off, "discarded", "The operator is never told of these ends. " + STAY, why());

export const close = ({ operator, sessionId, state }) => action("Close session", () => ({
  title: "Close this session?",
  text: `It ends now with the reason "closed", and ${operator} is told. This cannot be undone.`,
  words: () => ["sessions", "close", operator, sessionId],
  run: async () => `The session has ended: ${(await of(operator, `sessions/${encodeURIComponent(sessionId)}/close`)).reason}.`,
}), state === "active" ? "" : "It has ended.");
