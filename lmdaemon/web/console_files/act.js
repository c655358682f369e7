// Actions: each asks first, shows the same as a command, and says what happened.

import { Gone, Problem, call } from "./api.js";
import { command, count, h, replace, span } from "./dom.js";

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
  if (error instanceof Gone) return "The daemon does not answer. It is not known whether it did it: look before trying again.";
  return error instanceof Problem ? `Refused (${error.status} ${error.code}): ${error.message}` : String(error);
}

export function action(label, wanted, { disabled = "" } = {}) {
  const why = rights.mayChange ? disabled : "This token may only read.";
  return h("button", { type: "button", "data-key": "action " + label, disabled: Boolean(why), title: why || null,
    onclick: async () => {
      try {
        confirm(await wanted());
      } catch (error) {
        say(said(error), true);
      }
    } }, label);
}

// wanted: title, text, fields (elements), command (a function), label, run (a function that returns what happened)
function confirm(wanted) {
  const dialog = document.getElementById("dialog");
  const line = h("code", {});
  const wrong = h("p", { class: "bad", role: "alert" });
  const tell = () => replace(line, wanted.command());
  const go = h("button", { type: "button", class: "main" }, wanted.label);
  go.addEventListener("click", async () => {
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
  });
  const copy = h("button", { type: "button", onclick: () => navigator.clipboard?.writeText(wanted.command()) }, "Copy");
  replace(dialog, h("h2", { id: "dialog-title" }, wanted.title), h("p", {}, wanted.text),
    h("div", { class: "fields", oninput: tell }, wanted.fields ?? []),
    h("p", { class: "faint" }, "The same as a command:"), h("pre", {}, line), wrong,
    h("div", { class: "row" }, go, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), copy));
  tell();
  dialog.showModal();
  (wanted.fields?.length ? dialog.querySelector("input, select") : go).focus();
}

const at = (operator) => "v1/operators/" + encodeURIComponent(operator);

export const hold = (operator) => action("Hold", () => {
  const note = h("input", { maxlength: 256, autocomplete: "off" });
  const until = h("select", {}, [["", "until it is released"], ["1800", "for 30 minutes"], ["3600", "for 1 hour"],
    ["7200", "for 2 hours"], ["28800", "for 8 hours"], ["86400", "for 1 day"]].map(([value, text]) => h("option", { value }, text)));
  const length = { 1800: "30m", 3600: "1h", 7200: "2h", 28800: "8h", 86400: "1d" };
  return {
    title: `Stop sending to ${operator}?`, label: "Hold",
    text: "Ends are still recorded, and their deliveries wait. The time held does not count as their age.",
    fields: [h("label", {}, "Why (for whoever finds it held)", note), h("label", {}, "How long", until)],
    command: () => command("hold", operator, ...(note.value ? ["--note", note.value] : []), ...(until.value ? ["--for", length[until.value]] : [])),
    run: async () => {
      const body = { ...(note.value && { note: note.value }), ...(until.value && { forSeconds: Number(until.value) }) };
      const done = await call("POST", at(operator) + "/hold", body);
      return done.changed ? `${operator} is ${done.keptBack}.` : `${operator} was held already.`;
    },
  };
});

export const release = (operator) => action("Release", () => ({
  title: `Send to ${operator.operator} at once?`, label: "Release",
  text: `Whatever keeps it back is over: a hold, its breaker, a Retry-After. ${count(operator.pending)} pending deliveries are sent as fast as its concurrency allows. To try one first, probe it.`,
  command: () => command("release", operator.operator),
  run: async () => {
    const done = await call("POST", at(operator.operator) + "/release");
    return done.changed ? `${operator.operator} is released.` : `Nothing kept ${operator.operator} back.`;
  },
}), { disabled: operator.keptBack ? "" : "Nothing keeps it back." });

export const probe = (operator) => action("Probe", () => ({
  title: `Try one delivery to ${operator.operator} now?`, label: "Probe",
  text: "Its next delivery is sent once, whatever keeps the operator back. Success closes the breaker; a hold and a Retry-After stay.",
  command: () => command("probe", operator.operator),
  run: async () => {
    const done = await call("POST", at(operator.operator) + "/probe");
    return `Probe of ${operator.operator}: the delivery ${done.id} is ${done.state}` + (done.lastError && done.state !== "delivered" ? ` (${done.lastError}).` : ".");
  },
}), { disabled: operator.pending ? "" : "Nothing waits for it." });

export const retryAll = (operator) => action("Retry all dead", async () => {
  const name = operator.operator;
  const { dryRun: found } = await call("POST", at(name) + "/deliveries/retry", { dryRun: true });
  const reasons = Object.entries(found.reasons);
  const which = h("select", {}, h("option", { value: "" }, `all (${count(found.found)})`),
    reasons.map(([reason, many]) => h("option", { value: reason }, `only ${reason} (${count(many)})`)));
  return {
    title: `Retry the dead deliveries of ${name}?`, label: "Retry",
    text: `There are ${count(found.found)}, of which ${count(found.canBeSent)} can be sent: ${reasons.map(([reason, many]) => `${count(many)} ${reason}`).join(", ") || "none"}. They become due again, at most ten a second, which takes ${span(found.seconds)}. What has been sent cannot be called back.`,
    fields: [h("label", {}, "Which", which)],
    command: () => command("deliveries", "retry", "--operator", name, ...(which.value ? ["--reason", which.value] : [])),
    run: async () => {
      const done = await call("POST", at(name) + "/deliveries/retry", which.value ? { reason: which.value } : {});
      return `${count(done.retried)} deliveries of ${name} are due again.`;
    },
  };
}, { disabled: operator.dead ? "" : "None is dead." });

export const retrySome = (selected) => action("Retry selected", () => retryThese(selected()));

const retryThese = (ids) => ({
  title: `Retry ${count(ids.length)} dead deliveries?`, label: `Retry ${count(ids.length)}`,
  text: "They become due again. What has been sent cannot be called back.",
  command: () => ids.map((id) => command("deliveries", "retry", id)).join("\n"),
  run: async () => {
    let done = 0;
    const refused = [];
    for (const id of ids) {
      try {
        await call("POST", `v1/deliveries/${id}/retry`);
        done += 1;
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        refused.push(`${id}: ${error.message}`);
      }
    }
    return `${count(done)} deliveries are due again.` + (refused.length ? ` Refused: ${refused.join("; ")}` : "");
  },
});

export const retryOne = (delivery) => action("Retry", () => ({
  title: "Retry this dead delivery?", label: "Retry", text: `It becomes due again, for ${delivery.operator}.`,
  command: () => command("deliveries", "retry", delivery.id),
  run: async () => `${delivery.id} is ${(await call("POST", `v1/deliveries/${delivery.id}/retry`)).state} again.`,
}), { disabled: delivery.state === "dead" ? "" : `Only a dead delivery can be retried; this one is ${delivery.state}.` });

export const close = (session) => action("Close session", () => ({
  title: "Close this session?", label: "Close session",
  text: `It ends now with the reason "closed", and ${session.operator} is told. This cannot be undone.`,
  command: () => command("sessions", "close", session.operator, session.sessionId),
  run: async () => {
    const done = await call("POST", `${at(session.operator)}/sessions/${encodeURIComponent(session.sessionId)}/close`);
    return `The session has ended: ${done.reason}.`;
  },
}), { disabled: session.state === "active" ? "" : "It has ended." });
