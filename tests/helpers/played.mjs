// Runs the compiled game server of docs/examples/game_server.ts. It reads each call as a JSON line, and writes each
// answer as one. Instead of waiting, it writes how long it would wait, and goes on when the next line comes.
import { createInterface } from "node:readline";
import { LONGEST_WAIT_S, Refused, Sessions } from "./game_server.js";

const [base, operator, idleS, apiToken] = process.argv.slice(2);
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const say = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const ended = [];
const sleep = async (seconds) => {
  say({ wait: seconds });
  await lines.next();
};
const sessions = new Sessions(base, operator, (id) => ended.push(id), { idleS: Number(idleS), apiToken, sleep });

say({ longestWait: LONGEST_WAIT_S });
for (let line = await lines.next(); !line.done; line = await lines.next()) {
  const [call, ...words] = JSON.parse(line.value);
  let refused = null;
  try {
    await sessions[call](...words);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    refused = error.code;
  }
  say({ refused, ended, playing: [...sessions.playing.keys()] });
}
