/**
 * A game server's side of the session API, as in game_server.py, with a client that is generated from the daemon's own
 * description of it:
 *
 *     npm install openapi-fetch
 *     npm install --save-dev typescript@5 openapi-typescript
 *     curl -o openapi.json http://127.0.0.1:8081/openapi.json
 *     npx openapi-typescript openapi.json -o lmdaemon.d.ts
 *
 * `ask` is the part that survives a restart, a full disk and a cut network; `heartbeat` is the part that survives a
 * restore and a mistake in the daemon's configuration.
 */
import createClient, { type Client } from "openapi-fetch";
import type { components, paths } from "./lmdaemon.js";

type Opening = components["schemas"]["Opening"];
type Answered<T> = { data?: T; error?: unknown; response: Response };
type Sleep = (seconds: number) => Promise<void>;

const MANY = 10_000; // sessions in one call
const FIRST_WAIT_S = 0.5;
export const LONGEST_WAIT_S = 10;
const ANSWER_WITHIN_MS = 30_000;
// Nothing was stored, or it is not known what was. Every call can be repeated.
const TRY_AGAIN = new Set([408, 500, 502, 503, 504]);

/** The daemon refuses the call, and would refuse it again at once. `code` says why. */
export class Refused extends Error {
  readonly code: string;

  constructor(problem: unknown, status: number) {
    // A problem document (RFC 9457). A proxy between may answer with something else
    const { code, detail } = (problem ?? {}) as Partial<components["schemas"]["Problem"]>;
    super(detail ?? `status ${status}`);
    this.code = code ?? "";
  }
}

/**
 * The sessions that are being played at one operator. `ended(sessionId)` is called for a session that has ended by
 * itself. Stop its game then; a player who goes on playing needs a session with a new id.
 */
export class Sessions {
  readonly playing = new Map<string, Opening>(); // what each session was opened with, to open it again after a restore
  private readonly client: Client<paths>;
  private readonly idleS: number;
  private readonly sleep: Sleep;

  constructor(
    baseUrl: string,
    private readonly operator: string,
    private readonly ended: (sessionId: string) => void,
    options: { apiToken?: string; idleS?: number; sleep?: Sleep } = {},
  ) {
    this.idleS = options.idleS ?? 900;
    this.sleep = options.sleep ?? ((seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000)));
    this.client = createClient<paths>({
      baseUrl: new URL(baseUrl).href,
      headers: options.apiToken ? { Authorization: `Bearer ${options.apiToken}` } : {},
      fetch: (request) => fetch(request, { redirect: "manual", signal: AbortSignal.timeout(ANSWER_WITHIN_MS) }),
    });
  }

  /**
   * Opens a session. Throws Refused: with the codes `ended` and `differs`, choose a new id; any other code is an error
   * in your program.
   */
  async open(sessionId: string, playerId: string, token: string): Promise<void> {
    const opening = { playerId, token, idleTimeoutSeconds: this.idleS };
    const params = { path: { operator: this.operator, sessionId } };
    await this.ask(() =>
      this.client.PUT("/v1/operators/{operator}/sessions/{sessionId}", { params, body: opening }),
    );
    this.playing.set(sessionId, opening);
  }

  /** Closes a session whose game was closed. Throws Refused, but not for a session that is unknown. */
  async close(sessionId: string): Promise<void> {
    const params = { path: { operator: this.operator, sessionId } };
    try {
      await this.ask(() => this.client.POST("/v1/operators/{operator}/sessions/{sessionId}/close", { params }));
    } catch (error) {
      if (!(error instanceof Refused && error.code === "unknown-session")) throw error;
    }
    this.playing.delete(sessionId);
  }

  /**
   * Keeps the sessions alive: a heartbeat every third of the idle time or a little sooner, so that two in a row may be
   * lost; sooner after one that was refused.
   */
  async run(): Promise<never> {
    const thirdS = this.idleS / 3;
    for (let waitS = thirdS; ; ) {
      await this.sleep(waitS * between(0.8, 1));
      waitS = (await this.heartbeat()) ? thirdS : Math.min(thirdS, LONGEST_WAIT_S);
    }
  }

  /**
   * Touches all sessions, 10,000 in a call. Returns false if a call was refused. That is logged and ends nothing: an
   * operator taken out of the daemon's file by mistake, or a changed token, may soon be right again.
   */
  async heartbeat(): Promise<boolean> {
    let accepted = true;
    const all = [...this.playing.keys()];
    for (let first = 0; first < all.length; first += MANY) {
      const some = all.slice(first, first + MANY);
      try {
        await this.touch(some);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        console.error(`the heartbeat of ${some.length} sessions was refused: ${error.message}`); // tell somebody
        accepted = false;
      }
    }
    return accepted;
  }

  /**
   * Touches sessions in one call. Those that the daemon does not know, because it was restored, are opened again.
   * Throws Refused.
   */
  private async touch(sessionIds: string[]): Promise<void> {
    const params = { path: { operator: this.operator } };
    const { ended, unknown } = await this.ask(() =>
      this.client.POST("/v1/operators/{operator}/sessions/touch", { params, body: { sessionIds } }),
    );
    const gone = [...ended];
    const lost = unknown.flatMap((sessionId) => {
      const opening = this.playing.get(sessionId);
      return opening ? [{ sessionId, ...opening }] : [];
    });
    if (lost.length) {
      const again = await this.ask(() =>
        this.client.POST("/v1/operators/{operator}/sessions", { params, body: { sessions: lost } }),
      );
      gone.push(...again.ended, ...again.differs);
    }
    for (const sessionId of gone) if (this.playing.delete(sessionId)) this.ended(sessionId);
  }

  /** Repeats a call until it is answered. While the daemon is away, no session gets older. Throws Refused. */
  private async ask<T>(call: () => Promise<Answered<T>>): Promise<T> {
    for (let waitS = FIRST_WAIT_S; ; waitS = Math.min(waitS * 2, LONGEST_WAIT_S)) {
      // No answer: the daemon restarts, or the network is cut.
      const { data, error, response } = await call().catch((): Partial<Answered<T>> => ({}));
      if (response?.ok) return data as T;
      if (response && !TRY_AGAIN.has(response.status)) throw new Refused(error, response.status);
      const told = response?.headers.get("Retry-After") ?? "";
      await this.sleep(/^\d+$/.test(told) ? Number(told) : waitS * between(0.5, 1));
    }
  }
}

function between(low: number, high: number): number {
  return low + Math.random() * (high - low);
}
