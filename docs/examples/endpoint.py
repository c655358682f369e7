"""An operator's whole SessionExpired endpoint (v4): python endpoint.py PORT TOKEN_FILE. Put a TLS proxy in front."""

import hmac
import json
import sqlite3
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, TOKEN_FILE = sys.argv[1:] if len(sys.argv) == 3 else sys.exit("usage: python endpoint.py PORT TOKEN_FILE")
TOKEN, PROVIDER = Path(TOKEN_FILE).read_bytes().strip(), "luckymonaco"
FIELDS = ("providerId", "sessionId", "externalPlayerId", "token")


def once(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)


def decide(body: bytes) -> tuple[int, str]:
    try:
        notice = json.loads(body, object_pairs_hook=once)
        provider, session, player, token = (notice[name] for name in FIELDS)
        if not all(isinstance(one, str) and one for one in (provider, session, player, token)):
            raise ValueError("a field is empty or no text")
    except (ValueError, KeyError, TypeError, RecursionError):
        return 7, "Bad parameters"
    if provider.lower() != PROVIDER or not hmac.compare_digest(token.encode(), TOKEN):
        return 7, "Bad provider or token"
    # A repeated notice finds the row and changes nothing, even at the same moment
    with sqlite3.connect("ended.sqlite3") as db:
        db.execute("CREATE TABLE IF NOT EXISTS ended (session TEXT PRIMARY KEY, player TEXT)")
        db.execute("INSERT INTO ended VALUES (?, ?) ON CONFLICT DO NOTHING", (session, player))
        known = db.execute("SELECT player FROM ended WHERE session = ?", (session,)).fetchone()
    return (0, "Success") if known == (player,) else (7, "Another player")


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout, wbufsize = "HTTP/1.1", 75, -1  # keep-alive; each answer is sent in one piece

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        wanted, body, until = min(length, 16385), b"", time.monotonic() + 10  # the whole body must come in 10 s
        while len(body) < wanted and time.monotonic() < until and (part := self.rfile.read1(wanted - len(body))):
            body += part
        self.close_connection |= length > 16384 or len(body) < length
        is_json = self.headers.get_content_type() == "application/json"
        status = 413 if length > 16384 else 408 if len(body) < length else 200 if is_json else 415
        code, text = decide(body) if status == 200 else (7, "Not taken")
        answer = json.dumps({"error": code, "description": text}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        self.send_error(405)


ThreadingHTTPServer.request_queue_size = 128  # how many connections may wait to be accepted, as after an outage
ThreadingHTTPServer(("127.0.0.1", int(PORT)), Handler).serve_forever()
