// The private API. Its addresses are relative, so that a proxy's path prefix is kept.

const KEY = "lmdaemon.token"; // in sessionStorage, which only this tab sees until it is closed

export class Problem extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

export class Gone extends Error {}

export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

function headers() {
  return token.get() ? { Authorization: "Bearer " + token.get() } : {};
}

async function ask(method, path, body, signal) {
  const options = { method, headers: headers(), cache: "no-store", credentials: "same-origin", redirect: "error", signal };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  try {
    return await fetch("../" + path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Gone("The daemon does not answer.");
  }
}

async function refuse(answer) {
  const found = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, found.code ?? "", found.detail ?? `HTTP ${answer.status}`);
}

export async function call(method, path, body, signal) {
  const answer = await ask(method, path, body, signal);
  if (!answer.ok && path !== "health") await refuse(answer);
  const found = answer.status === 204 ? null : await answer.json();
  if (path === "health" && found.code) throw new Problem(answer.status, found.code, found.detail);
  return found;
}

export const get = (path) => call("GET", path);

// Server-sent events; EventSource can send no token.
export async function open(method, path, signal) {
  const answer = await ask(method, path, undefined, signal);
  if (!answer.ok) await refuse(answer);
  return answer.body;
}

// Calls take(name, data) for each event until the stream ends or breaks off.
export async function read(body, take) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(event) ?? [];
      if (name) take(name, JSON.parse(data));
    }
  }
}
