// Test notices and checks of an operator's endpoint. The last result is kept until the page is reloaded.

import { open, read } from "./api.js";
import { count, faint, h, p, replace } from "./dom.js";

const latest = new Map(); // by operator: the element with the result; a running check changes it
const VERDICT = { pass: "good", delivered: "good", warn: "warn", skipped: "faint" };
const verdict = (word) => h("span", { class: "state " + (VERDICT[word] ?? "bad") }, word);

export const latestOf = (operator) => latest.get(operator);

const message = (head, { headers, body }) => h("pre", {}, head + Object.entries(headers).map(([name, value]) => `\n${name}: ${value}`).join("") + "\n\n" + body);

const exchange = ({ request, answer, durationMs, cause, reason, detail }) => [
  message(`${request.method} ${request.url}`, request),
  answer ? message(`HTTP ${answer.status} (${count(durationMs)} ms)`, answer)
    : p(`No answer (${count(durationMs)} ms): ${cause ?? reason}${detail ? `, ${detail}` : ""}`)];

export function showNotice(operator, sent) {
  latest.set(operator, h("div", {}, h("h2", {}, "Test notice"),
    p(verdict(sent.verdict), `: ${sent.meaning}. In words: ${sent.explanation}. Secrets are masked (***).`), exchange(sent)));
}

export async function check(operator) {
  const leaving = new AbortController();
  const stream = await open("POST", `v1/operators/${encodeURIComponent(operator)}/check`, leaving.signal);
  const now = h("p", { "aria-live": "polite" });
  const stop = h("button", { type: "button", onclick: () => leaving.abort() }, "Stop");
  const wrong = h("div");
  const right = h("ul");
  latest.set(operator, h("div", {}, h("h2", {}, "Check of the endpoint"), now, stop, wrong, h("details", {}, h("summary", {}, "Passed and skipped"), right)));
  let ended = false;
  const take = (name, { done, total, check: id, result, counts, requests, stopped, byHand }) => {
    if (name === "check.report") {
      ended = true;
      replace(now, Object.entries(counts).map(([word, many]) => [verdict(word), ` ${many} `]), `in ${requests} requests.`, stopped ? ` Not everything was tried: ${stopped}.` : "");
      wrong.append(h("h3", {}, "Only people can check"), h("ul", {}, byHand.map((one) => h("li", {}, one))));
    } else if (!result) replace(now, `${done} of ${total}: ${id}`);
    else if (result.verdict === "pass" || result.verdict === "skipped") right.append(h("li", {}, verdict(result.verdict), ` ${result.id}: ${result.text}`));
    else wrong.append(h("details", { class: `panel ${VERDICT[result.verdict] ?? "bad"}-edge` },
      h("summary", {}, verdict(result.verdict), " ", h("strong", {}, result.id), `: ${result.text}`),
      p(result.title), p("Why: ", result.why), p("What to do: ", result.hint), result.evidence.map(exchange)));
  };
  read(stream, take).then(() => {
    stop.remove();
    if (!ended) replace(now, leaving.signal.aborted ? "Stopped." : "It broke off.");
  });
}
