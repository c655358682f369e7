"""lmdaemon inside a rig: installs it, calls it over HTTP, reads its journal, and restores it after a test."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import wait_for
from rig import Rig

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = "/usr/src/lmdaemon"
CONFIG = "/etc/lmdaemon/config.toml"
DATABASE = "/var/lib/lmdaemon/lmdaemon.sqlite3"
UNIT = "lmdaemon.service"
PUBLIC, PRIVATE = "http://127.0.0.1:8080", "http://127.0.0.1:8081"
PLUGINS = "/usr/local/lib/lmdaemon"
WALLET = "/run/wallet"
WITHIN_S = 60.0  # for what takes a second on a machine that does nothing else

TOML = """
[sessions]
restart_grace = "0s"
[delivery]
timeout = "60s"
schedule = ["500ms", "500ms", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s"]

[operators.acme]
provider_id = "luckymonaco"
notify = true
url = "http://127.0.0.1:9000/V4/SessionExpired"
allow_private_network = true

[operators.secure]
provider_id = "luckymonaco"
endpoint = "/secure"
notify = true
url = "https://wallet.example:9443/V4/SessionExpired"
ca_file = "wallet.pem"
allow_private_network = true

[operators.hooked]
provider_id = "luckymonaco"
endpoint = "/hooked"

[plugins.hook]
use = "hook:Hook"
operators = ["hooked"]
timeout = "20s"
"""
# A plug-in that is slow to start, or at the next end blocks the loop or runs a shell, if a file asks for that.
HOOK = """
import asyncio, pathlib, subprocess, time

ASKED = pathlib.Path("/run/lmdaemon")

class Hook:
    def __init__(self, options): pass
    async def start(self):
        if (ASKED / "slow-start").exists():
            await asyncio.sleep(float((ASKED / "slow-start").read_text()))
    async def session_ended(self, event):
        if (ASKED / "block").exists():
            (ASKED / "block").unlink()
            blocks_the_loop()
        if (ASKED / "shell").exists():
            (ASKED / "shell").unlink()
            try:
                subprocess.run(["/bin/sh", "-c", "true"])
            except OSError as error:
                (ASKED / "refused").write_text(type(error).__name__)

def blocks_the_loop():
    time.sleep(600)
"""


class Service:
    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._cursor = ""

    # -- installing

    def install(self) -> None:
        rig = self.rig
        rig.copy(REPOSITORY, SOURCE)
        rig.run("make", "-C", SOURCE, "install", network=True, timeout=900)
        self._start_wallet()
        rig.write(f"{PLUGINS}/hook.py", HOOK)
        rig.write(CONFIG, TOML)
        rig.run("systemctl", "enable", "--now", UNIT)
        self.wait_until_serving()

    def _start_wallet(self) -> None:
        rig = self.rig
        rig.write(f"{WALLET}/wallet.py", Path(__file__).with_name("wallet.py").read_text())
        certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "90"]
        certificate += ["-subj", "/CN=wallet.example", "-addext", "subjectAltName=DNS:wallet.example"]
        rig.run(*certificate, "-keyout", f"{WALLET}/key.pem", "-out", f"{WALLET}/certificate.pem")
        rig.write("/etc/lmdaemon/wallet.pem", rig.path(f"{WALLET}/certificate.pem").read_text())
        rig.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")
        rig.run("systemd-run", "--quiet", "--unit=wallet", "python3", f"{WALLET}/wallet.py", WALLET)
        wait_for(rig.path(f"{WALLET}/ready").exists, WITHIN_S)

    def restore(self) -> None:
        """Restores the state after the installation: a test's files, drop-ins and flags are removed, both units run,
        and the journal counts as read.
        """
        rig = self.rig
        for flag in ("down", "slow"):
            rig.path(f"{WALLET}/{flag}").unlink(missing_ok=True)
        for flag in ("block", "slow-start", "shell", "refused"):
            rig.path(f"/run/lmdaemon/{flag}").unlink(missing_ok=True)
        dropped = [
            one for place in ("run", "etc") for one in rig.path(f"/{place}/systemd/system").glob("lmdaemon.*.d/*")
        ]
        for drop_in in dropped:
            drop_in.unlink()
        changed = rig.path(CONFIG).read_text() != TOML
        if changed:
            rig.write(CONFIG, TOML)
        if dropped:
            rig.run("systemctl", "daemon-reload")
        if dropped or changed or not self.active:
            for words in (("restart", "lmdaemon.socket"), ("start", UNIT)):
                done = rig.run("systemctl", *words, check=False)
                assert not done.returncode, rig.run("journalctl", "--no-pager", "--lines=40").stdout
        self.wait_until_serving()
        self._cursor = rig.run("journalctl", "-n0", "--show-cursor").stdout.partition("cursor: ")[2].strip()

    # -- systemd

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.rig.run("systemctl", *arguments, check=check).stdout.strip()

    def show(self, name: str, unit: str = UNIT) -> str:
        return self.systemctl("show", "--property", name, "--value", unit)

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    @property
    def active(self) -> bool:
        return self.systemctl("is-active", UNIT, "lmdaemon.socket", check=False).split() == ["active", "active"]

    def drop_in(self, text: str, unit: str = UNIT, name: str = "test.conf") -> None:
        """Writes a drop-in that stays until the next test. It has no effect before the unit is restarted."""
        self.rig.write(f"/run/systemd/system/{unit}.d/{name}", text)
        self.systemctl("daemon-reload")

    def configure(self, old: str, new: str) -> None:
        """Changes the configuration file. The daemon does not read it yet."""
        text = self.rig.path(CONFIG).read_text()
        assert text.count(old) == 1
        self.rig.write(CONFIG, text.replace(old, new))

    def journal(self) -> list[dict[str, Any]]:
        """The unit's entries in the journal since the test began."""
        since = [f"--after-cursor={self._cursor}"] if self._cursor else []
        said = self.rig.run("journalctl", "--unit", UNIT, "--output=json", *since).stdout
        return [json.loads(line) for line in said.splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The daemon's events of this name since the test began, each with its PRIORITY."""
        found = []
        for entry in self.journal():
            message = entry["MESSAGE"]
            if isinstance(message, str) and message.startswith("{"):
                event = json.loads(message)
                if event["event"] == name:
                    found.append(event | {"PRIORITY": entry["PRIORITY"]})
        return found

    def event(self, name: str) -> dict[str, Any]:
        """Waits for an event of this name. Returns the first one."""
        found: dict[str, Any] = wait_for(lambda: self.events(name), WITHIN_S, lambda: f"no {name}: {self.said()}")[0]
        return found

    def said(self) -> str:
        return "\n".join(str(entry["MESSAGE"]) for entry in self.journal())

    def says(self, text: str) -> None:
        """Waits until the text is in the journal. journald may be behind the processes that write to it."""
        wait_for(lambda: text in self.said(), WITHIN_S, lambda: f"no {text!r}: {self.said()}")

    # -- the daemon

    def call(self, method: str, url: str, body: object = None, *options: str) -> tuple[int, Any]:
        """Makes a request. Returns status and JSON document; the status is 0 if there was no answer."""
        command = [
            "curl",
            "--silent",
            "--max-time",
            "60",
            "--request",
            method,
            "--write-out",
            "\n%{http_code}",
            *options,
        ]
        if body is not None:
            command += ["--header", "Content-Type: application/json", "--data-binary", json.dumps(body)]
        text, _, status = self.rig.run(*command, url, check=False).stdout.rpartition("\n")
        return int(status), json.loads(text) if text.startswith(("{", "[")) else None

    @property
    def serves(self) -> bool:
        return all(self.call("GET", f"{side}/health")[0] == 200 for side in (PUBLIC, PRIVATE))

    def wait_until_serving(self) -> None:
        wait_for(lambda: self.active and self.serves, WITHIN_S, lambda: f"does not serve: {self.said()}")

    def restart(self) -> None:
        self.systemctl("restart", UNIT)
        self.wait_until_serving()

    @contextmanager
    def restarts_by_itself(self) -> Iterator[None]:
        """Waits, at the end of the context, until another process serves."""
        before = self.pid
        yield
        wait_for(lambda: self.pid not in (0, before), WITHIN_S, self.said)
        self.wait_until_serving()

    def open(self, session: str, operator: str = "acme", idle_s: int = 3600) -> None:
        body = {"playerId": "p-1", "token": "tok-5", "idleTimeoutSeconds": idle_s}
        status, problem = self.call("PUT", f"{PRIVATE}/v1/operators/{operator}/sessions/{session}", body)
        assert status == 201, problem

    def close(self, session: str, operator: str = "acme") -> None:
        assert self.call("POST", f"{PRIVATE}/v1/operators/{operator}/sessions/{session}/close")[0] == 200

    def session(self, session: str, operator: str = "acme") -> dict[str, Any]:
        status, found = self.call("GET", f"{PRIVATE}/v1/operators/{operator}/sessions/{session}")
        assert status == 200, found
        return dict(found)

    def delivered(self, session: str, operator: str = "acme") -> dict[str, Any]:
        """Waits until the session's only delivery is delivered, and returns it."""

        def settled() -> Any:
            (delivery,) = self.session(session, operator)["deliveries"] or [{"state": None}]
            return delivery if delivery["state"] == "delivered" else None

        found: dict[str, Any] = wait_for(settled, WITHIN_S, lambda: f"not delivered: {self.session(session, operator)}")
        return found

    def received(self, session: str) -> list[dict[str, Any]]:
        """The notices of a session that the wallet has received."""
        path = self.rig.path(f"{WALLET}/received")
        lines = path.read_text().splitlines() if path.exists() else []
        return [notice for notice in map(json.loads, lines) if notice["session"] == session]

    def wallet(self, *, down: bool = False, slow: bool = False) -> None:
        for flag, set_ in (("down", down), ("slow", slow)):
            path = self.rig.path(f"{WALLET}/{flag}")
            path.touch() if set_ else path.unlink(missing_ok=True)
