"""An operator inside the rig: its wallet over HTTP and HTTPS, and the name server that knows its name. `wallet.py
DIRECTORY`

Each notice becomes a line of DIRECTORY/received. While DIRECTORY/down exists, it answers 503; while DIRECTORY/slow
exists, it does not answer. It runs on the rig's own Python, so that it works without lmdaemon being installed.
"""

import contextlib
import http.server
import json
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

HERE = Path(sys.argv[1])
# The answer: the name has the address 127.0.0.1
A_RECORD = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x7f\x00\x00\x01"
lock = threading.Lock()


class Wallet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        notice = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        down = (HERE / "down").exists()
        with lock, (HERE / "received").open("a") as received:
            line = {"session": notice["sessionId"], "id": self.headers["webhook-id"], "down": down}
            received.write(json.dumps(line | {"port": self.server.server_address[1]}) + "\n")
        while (HERE / "slow").exists():
            time.sleep(0.02)
        body = b'{"error": 0, "description": "Success"}'
        self.send_response(503 if down else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def name_server() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        while True:
            query, client = server.recvfrom(512)
            end = query.index(b"\0", 12) + 5  # the end of the question: name, type, class
            is_a = query[end - 4 : end - 2] == b"\0\1"
            head = query[:2] + b"\x85\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0"
            server.sendto(head + query[12:end] + (A_RECORD if is_a else b""), client)


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:  # connections break off when a daemon is killed
        pass


plain = Server(("127.0.0.1", 9000), Wallet)
secure = Server(("127.0.0.1", 9443), Wallet)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain(HERE / "certificate.pem", HERE / "key.pem")
secure.socket = tls.wrap_socket(secure.socket, server_side=True)
for serve in (plain.serve_forever, secure.serve_forever, name_server):
    threading.Thread(target=serve, daemon=True).start()
(HERE / "ready").touch()
with contextlib.suppress(KeyboardInterrupt):
    threading.Event().wait()
