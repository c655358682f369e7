"""The command line: the real command as a process, with a real daemon process, a real operator and a real database."""

import asyncio
import base64
import contextlib
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
from aiohttp import web
from commands import (
    API_TOKEN,
    COMMAND,
    HASH_KEY,
    PLAYER_TOKEN,
    ROOT,
    SIGNING_SECRET,
    UNREACHABLE,
    Running,
    configure,
    daemon,
    environment,
    forgo_privileges,
    free_port,
    open_many,
    poll,
    run,
    secret_file,
    text_and_json,
)
from faults import leads_inside
from processes import process
from standardwebhooks import Webhook
from support import scripted_operator

from lmdaemon import __version__
from lmdaemon.commands import admin
from lmdaemon.commands.cli import parser
from lmdaemon.store.sqlite.file import MIGRATIONS


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One daemon for all tests that do not harm it. The operator `gone` refuses connections; `many` is for long
    lists.
    """
    directory = tmp_path_factory.mktemp("lm")
    configure(
        directory,
        f"[operators.gone]\n{UNREACHABLE}\n[operators.other]\n{UNREACHABLE}\n"
        '[operators.many]\nprovider_id = "luckymonaco"\nendpoint = ""\n',
    )
    with daemon(directory) as running:
        yield running.started()
        running.process.terminate()
        assert running.ended() == 0


# -- the command line itself


def test_version_is_printed(tmp_path: Path) -> None:
    text, document = text_and_json("version", cwd=tmp_path)
    assert text.stdout == f"lmdaemon {__version__}\n"
    assert document == {"version": __version__}
    assert run("--version", cwd=tmp_path).stdout == text.stdout


@pytest.mark.parametrize("words", ["version", "--help", "sessions", "no-such-command"])
def test_without_a_configuration_only_the_command_line_is_imported(tmp_path: Path, words: str) -> None:
    script = f"""
import sys
from lmdaemon.commands.cli import main
try:
    main({words.split()!r})
except SystemExit:
    pass
print(sorted(name for name in sys.modules if name.startswith("lmdaemon.")), "asyncio" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30
    )
    ours = [
        *("lmdaemon.commands", "lmdaemon.commands.arguments", "lmdaemon.commands.cli", "lmdaemon.commands.shared"),
        *("lmdaemon.model", "lmdaemon.version"),
    ]
    assert done.stdout.splitlines()[-1] == f"{ours} False", done.stderr


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="this machine makes no cores")
def test_a_crash_leaves_no_core_that_has_tokens_in_it(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    code = (
        "import resource; from lmdaemon.commands.cli import main; "
        "before = resource.getrlimit(resource.RLIMIT_CORE)[0]; main(['version']); "
        "print(before, resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (hard, hard)),
    )
    assert done.stdout == f"lmdaemon {__version__}\n{hard} (0, 0)\n"


def test_every_command_has_the_function_that_runs_it() -> None:
    """Each command's parser takes its arguments from that function, and each argument has a help text."""
    script = """
from lmdaemon.commands import cli
cli.parser(whole=True)
for run, _ in cli.COMMANDS.values():
    for names, options in cli.loaded(run).arguments:
        assert options.get("help") or options.get("choices"), names
print(len(cli.COMMANDS))
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    assert int(done.stdout) > 10


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("serve now", "unrecognized arguments: now"),
        ("sessions", "required: VERB"),
        ("sessions list acme --limit 0", "must be a positive number (got '0')"),
        ("deliveries retry msg_1 --operator acme", "either the ID of a delivery or --operator"),
        ("deliveries retry msg_1 --since 2026-01-31T03:00:00Z", "only with --operator"),
        ("deliveries discard --operator acme", "required: --note"),
        ("deliveries discard msg_1 --note x --dry-run", "only with --operator"),
        ("deliveries retry msg_1 --follow", "--follow goes with --operator"),
        ("deliveries retry --operator acme --since soon", "--since: must be a time such as"),
        ("sessions open acme s1 --player p1 --token-file player-token --token-env X", "must not both be given"),
        ("sessions open acme s1 --player p1 --token-file absent", "--token-file: absent cannot be read: No such file"),
        ("sessions open acme s1 --player p1 --token-env UNSET", "--token-env: the token must not be empty"),
        ("send nobody", "has no operator 'nobody'; known are acme"),
        ("send acme", "send: operator 'acme' has no url; give it one, or --url"),
        (
            "send --url ftp://u:password@host/?query",
            "(got 'ftp://host/')",
        ),
        ("send --url http://h/ä?s3cret", "--url: must have percent-escapes for what is not ASCII in path and query"),
        (
            "send --url https://u:12/s3cret@h/",
            "--url: must have %2F, %3F, %23, %40, %5B and %5D for /?#@[]",
        ),
        ("send --url http://h --dialect v9", "--dialect: must be one of v4, v4.01"),
        ("send --url http://h --dialect pragmatic", "dialect pragmatic must send 'hash', which is not known here"),
        ("send --url http://h --timeout 3", 'must be a duration such as "250ms"'),
        ("send --url http://h --token-file config.toml", "--token-file: the token must not contain control characters"),
    ],
)
def test_bad_usage_is_explained_and_exits_2(tmp_path: Path, words: str, complaint: str) -> None:
    configure(tmp_path)
    done = run(*words.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        ("sessions show acme {}", "ID"),
        ("sessions show {} s1", "OPERATOR"),
        ("sessions open acme s1 --player {}", "--player"),
        ("sessions open acme s1 --player p1 --token-env {}", "--token-env"),
        ("sessions touch acme s1 {}", "ID"),
        ("sessions close acme {}", "ID"),
        ("sessions list acme --player {}", "--player"),
        ("sessions export --operator {}", "--operator"),
        ("sessions export --since {}", "--since"),
        ("deliveries list --sink {}", "--sink"),
        ("deliveries show {}", "ID"),
        ("deliveries retry --operator acme --since {}", "--since"),
        ("hold {}", "OPERATOR"),
        ("send --url {}", "--url"),
        ("send --session {}", "--session"),
        ("send --dialect {}", "--dialect"),
        ("send --timeout {}", "--timeout"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_bad_usage(tmp_path: Path, words: str, argument: str) -> None:
    odd = os.fsdecode(b"http://u:s3cret@h/\xff" if argument == "--url" else b"b\xff")
    done = run(*(word.format(odd) for word in words.split()), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    shown = "'http://h/\\udcff'" if argument == "--url" else "'b\\udcff'"
    assert done.stderr.splitlines()[-1].endswith(f"error: argument {argument}: must be UTF-8 (got {shown})")


@pytest.mark.parametrize("command", [["sessions", "open", "acme", "s1", "--player", "p1"], ["send", "acme"]])
def test_a_token_on_the_command_line_is_refused_without_repeating_it(tmp_path: Path, command: list[str]) -> None:
    done = run(*command, "--token", PLAYER_TOKEN, cwd=tmp_path)
    assert done.returncode == 2
    assert "--token-file or --token-env" in done.stderr


# -- the configuration file


def test_the_file_is_looked_for_in_the_documented_places(tmp_path: Path) -> None:
    for name in ("named", "variable"):
        (tmp_path / name).mkdir()
        configure(tmp_path / name)
    named, variable = tmp_path / "named" / "config.toml", tmp_path / "variable" / "config.toml"
    here = configure(tmp_path)
    env = {"LMDAEMON_CONFIG": str(variable)}
    assert run("--config", named, "check-config", cwd=tmp_path, **env).stdout == f"{named}: valid\n"
    assert run("check-config", "--config", named, cwd=tmp_path, **env).stdout == f"{named}: valid\n"
    assert run("check-config", cwd=tmp_path, **env).stdout == f"{variable}: valid\n"
    assert run("check-config", cwd=tmp_path).stdout == f"{here.name}: valid\n"


@pytest.mark.skipif(Path("/etc/lmdaemon/config.toml").exists(), reason="this machine has a configuration")
@pytest.mark.parametrize("command", ["serve", "status"])
def test_no_configuration_file_at_all_exits_2(tmp_path: Path, command: str) -> None:
    done = run(command, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "no configuration file: looked for ./config.toml, /etc/lmdaemon/config.toml; name one with --config\n"
    )


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_every_error_of_the_file_is_printed_and_exits_2(tmp_path: Path, command: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[srever]\n[sessions]\nidle_timeout = 5\n[operators.acme]\nnotify = "yes"\n')
    done = run(*command.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [
        ["config.toml", "srever"],
        ["config.toml", "sessions.idle_timeout"],
        ["config.toml", "operators.acme.provider_id"],
        ["config.toml", "operators.acme.notify"],
    ]
    assert list(tmp_path.iterdir()) == [file]


PLUGIN = """
import asyncio, atexit, logging, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

print("imported")
Path("imported").touch()

class Hook:
    def __init__(self, options):
        Path("made").touch()
        asyncio.get_running_loop()  # as a client session needs one
        self.options = options

    async def start(self):
        Path("started").touch()
        await self.misbehave()

    async def misbehave(self):
        pass

    async def session_ended(self, event):
        pass

async def hang():
    await asyncio.sleep(60)

class Hangs(Hook):
    misbehave = staticmethod(hang)

class Waits(Hook):
    async def misbehave(self):
        while not Path("go on").exists():
            await asyncio.sleep(0.01)

class Blocks(Hook):
    async def misbehave(self):
        time.sleep(600)

class Fails(Hook):
    async def misbehave(self):
        raise ValueError("no")

class Leaks(Hook):
    async def misbehave(self):
        asyncio.get_running_loop().call_soon(int, "quoted-request-bytes")
        logging.getLogger("aiohttp.server").error("quoted-request-bytes")

class Stubborn(Hook):
    async def misbehave(self):
        self.task = asyncio.create_task(self.never_end())

    async def never_end(self):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

class Prints(Stubborn):
    async def misbehave(self):
        print("not flushed")
        await super().misbehave()

class Pool(Hook):
    async def misbehave(self):
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)  # the pool of asyncio.to_thread

class OwnPool(Hook):
    async def misbehave(self):
        self.pool = ThreadPoolExecutor()
        asyncio.get_running_loop().run_in_executor(self.pool, time.sleep, 600)

class Thread(Hook):
    async def misbehave(self):
        threading.Thread(target=time.sleep, args=(600,)).start()

class Generator(Hook):
    async def misbehave(self):
        self.generator = self.endless()
        await anext(self.generator)

    async def endless(self):
        try:
            yield
        finally:
            await asyncio.sleep(600)

class AtExit(Hook):
    async def misbehave(self):
        atexit.register(time.sleep, 600)

class Exits(Hook):
    error = SystemExit

    async def misbehave(self):
        self.task = asyncio.create_task(self.exit())
        asyncio.get_running_loop().call_soon(self.exit_now)

    async def session_ended(self, event):
        self.task = asyncio.create_task(self.exit())

    async def exit(self):
        await asyncio.sleep(0)
        self.exit_now()

    def exit_now(self):
        raise self.error(3)

class Interrupts(Exits):
    error = KeyboardInterrupt

class ExitsAtItsEnd(Exits):
    async def misbehave(self):
        self.tasks = [asyncio.create_task(self.exit_when_cancelled()) for _ in range(2)]
        self.generator = self.endless()
        await anext(self.generator)

    async def exit_when_cancelled(self):
        try:
            await asyncio.sleep(600)
        finally:
            self.exit_now()

    async def endless(self):
        try:
            yield
        finally:
            self.exit_now()

class ExitsAgain(Exits):
    async def misbehave(self):
        asyncio.get_running_loop().call_soon(self.exit_now)

    def exit_now(self):
        asyncio.get_running_loop().call_later(0.05, self.exit_now)
        raise SystemExit(7)

class StopsTheLoop(Exits):
    def exit_now(self):
        asyncio.get_running_loop().stop()

class Sabotages(Hook):
    async def misbehave(self):
        import lmdaemon.sweeper

        async def broken(self):
            raise RuntimeError("a bug in a loop")

        lmdaemon.sweeper.Sweeper.run = broken
"""


def configure_plugin(directory: Path, use: str) -> Path:
    (directory / "hooks_of_the_tests.py").write_text(PLUGIN)
    return configure(directory, f'[plugins.mine]\nuse = "hooks_of_the_tests:{use}"\n')


def test_check_config_imports_plugins_without_making_them(tmp_path: Path) -> None:
    configure_plugin(tmp_path, "Hook")
    text, document = text_and_json("check-config", cwd=tmp_path)
    assert text.stdout == "config.toml: valid\n"
    assert document == {"file": "config.toml", "valid": True, "errors": [], "warnings": []}
    assert (tmp_path / "imported").exists()
    assert not (tmp_path / "made").exists()


def test_check_config_warns_of_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    configure(tmp_path, '[database]\npath = "none/x.sqlite3"\n')
    text = run("check-config", cwd=tmp_path)
    document = json.loads(run("check-config", "--json", cwd=tmp_path).stdout)
    warning = f"database.path: the directory {tmp_path}/none does not exist"
    assert (text.stdout, text.stderr) == ("config.toml: valid\n", f"config.toml: warning: {warning}\n")
    assert (document["valid"], document["warnings"]) == (True, [warning])
    (tmp_path / "none").mkdir()
    assert run("check-config", cwd=tmp_path).stderr == ""


def test_check_config_reports_a_plugin_that_cannot_be_loaded(tmp_path: Path) -> None:
    configure_plugin(tmp_path, "Absent")
    done = run("check-config", cwd=tmp_path)
    assert done.returncode == 2
    assert "config.toml: plugins.mine.use: cannot be imported: AttributeError" in done.stderr
    done = run("check-config", "--json", cwd=tmp_path)
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["valid"] is False
    assert len(document["errors"]) == 1


def test_check_config_reports_a_plugin_that_raises_keyboard_interrupt(tmp_path: Path) -> None:
    (tmp_path / "interrupting.py").write_text("raise KeyboardInterrupt")
    configure(tmp_path, '[plugins.mine]\nuse = "interrupting:Hook"\n')
    for command in ("check-config", "serve"):
        done = run(command, cwd=tmp_path)
        assert done.returncode == 2
        assert (
            "config.toml: plugins.mine.use: cannot be imported: KeyboardInterrupt at interrupting.py:1" in done.stderr
        )


def test_ctrl_c_ends_check_config_while_a_plugin_is_imported(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nfrom pathlib import Path\nPath('begun').touch()\ntime.sleep(600)")
    configure(tmp_path, '[plugins.mine]\nuse = "slow:Hook"\n')
    with daemon(tmp_path, "check-config") as running:
        poll(lambda: (tmp_path / "begun").exists())
        running.process.send_signal(signal.SIGINT)
        assert running.ended() == 1
        assert running.log.read_text() == ""


def test_check_config_needs_no_secrets_but_says_what_it_could_not_check(tmp_path: Path) -> None:
    configure(tmp_path, 'signing_secret_file = "handed-over"\n')
    secret_file(tmp_path / "handed-over", SIGNING_SECRET).chmod(0)
    done = run("check-config", cwd=tmp_path, before=forgo_privileges)
    assert (done.returncode, done.stdout) == (0, "config.toml: valid\n")
    assert done.stderr.startswith("config.toml: warning: operators.acme.signing_secret_file: unchecked: cannot be read")


# -- serve


@pytest.fixture
def without_uvloop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for PYTHONPATH that makes uvloop look as if it were not installed."""
    directory = tmp_path_factory.mktemp("no-uvloop")
    (directory / "uvloop.py").write_text("raise ImportError('not installed')\n")
    return f"{directory}{os.pathsep}{ROOT}"


@pytest.mark.parametrize(
    ("number", "uvloop"),
    [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGTERM, False)],
    ids=["SIGTERM", "SIGINT", "without uvloop"],
)
def test_a_signal_stops_the_daemon_with_exit_0(
    tmp_path: Path, without_uvloop: str, number: signal.Signals, uvloop: bool
) -> None:
    file = configure(tmp_path)
    # without a command, the command is `serve`
    with daemon(tmp_path, "--config", str(file), **({} if uvloop else {"PYTHONPATH": without_uvloop})) as running:
        running.started().process.send_signal(number)
        assert running.ended() == 0
        assert running.events("daemon.stopped")


def as_a_shell_starts_it_in_the_background() -> None:
    """As `lmdaemon serve &` in a script: without job control, a shell makes SIGINT ignored (POSIX, 2.9.3 Asynchronous
    Lists).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("before", [None, as_a_shell_starts_it_in_the_background], ids=["", "in the background"])
@pytest.mark.parametrize("use", ["Hangs", "Blocks", "Stubborn"])
def test_sigterm_while_a_plugin_still_starts_exits_0(
    tmp_path: Path, without_uvloop: str, use: str, before: Callable[[], None] | None, loop: str
) -> None:
    configure_plugin(tmp_path, use)
    env = {"PYTHONPATH": without_uvloop} if loop == "asyncio" else {}
    with daemon(tmp_path, before=before, **env) as running:
        poll(lambda: (tmp_path / "started").exists())
        running.process.terminate()
        assert running.ended() == 0
        assert "Traceback" not in running.log.read_text()
        assert not running.events("daemon.serving") or use == "Stubborn"


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, as_a_shell_starts_it_in_the_background], ids=["", "in the background"])
@pytest.mark.parametrize("where", ["lmdaemon.commands.serve", "lmdaemon.config", "lmdaemon.store.sqlite.file"])
def test_sigterm_during_imports_or_the_opening_exits_0(
    tmp_path: Path, where: str, before: Callable[[], None] | None
) -> None:
    """Importing a module, or the first migration, never ends."""
    configure(tmp_path)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(f"""
import sys, time
from pathlib import Path

class Late:
    def find_spec(self, name, path=None, target=None):
        if name == {where!r} and name != "lmdaemon.store.sqlite.file":
            Path("begun").touch()
            time.sleep(600)
        if name == "lmdaemon.daemon":
            import lmdaemon.store.sqlite.file as file
            migrate = file.migrate

            def for_ever(connection, *arguments):
                Path("begun").touch()
                connection.execute("WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i FROM n) SELECT max(i) FROM n")

            file.migrate = for_ever

sys.meta_path.insert(0, Late())
""")
    with daemon(tmp_path, before=before, PYTHONPATH=f"{tmp_path / 'late'}{os.pathsep}{ROOT}") as running:
        poll(lambda: (tmp_path / "begun").exists())
        running.process.terminate()
        assert running.ended() == 0
        assert running.log.read_text() == ""


def test_sighup_while_a_plugin_still_starts_is_a_reload_after_the_start(tmp_path: Path) -> None:
    configure_plugin(tmp_path, "Waits")
    with daemon(tmp_path) as running:
        poll(lambda: (tmp_path / "started").exists())
        running.process.send_signal(signal.SIGHUP)
        (tmp_path / "go on").touch()
        running.started("config.reloaded").process.terminate()
        assert running.ended() == 0


def test_a_plugin_may_change_the_current_directory(tmp_path: Path) -> None:
    """The files of a daemon with a relative path to its configuration are still the same."""
    configure_plugin(tmp_path, "Hook")
    with (tmp_path / "hooks_of_the_tests.py").open("a") as module:
        module.write("import os\nos.chdir('/')\n")
    with daemon(tmp_path, "--config", "config.toml", "serve") as running:
        running.started().open("acme", "s-1")
        running.process.send_signal(signal.SIGHUP)
        poll(lambda: running.events("config.reloaded") or running.events("config.reload_failed"))
        assert running.events("config.reloaded")
        checked = running("status", "--json")
        assert json.loads(checked.stdout)["health"]["status"] == "pass"
        running.process.terminate()
        assert running.ended() == 0
    assert (tmp_path / "lmdaemon.sqlite3").exists()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize(
    ("use", "hooks", "threads"),
    [
        ("Stubborn", 1, 0),
        ("Pool", 0, 1),
        ("OwnPool", 0, 1),
        ("Thread", 0, 1),
        ("Generator", 0, 0),
        ("AtExit", 0, 0),
    ],
)
def test_what_a_plugin_leaves_running_lets_the_daemon_end(
    tmp_path: Path, without_uvloop: str, use: str, hooks: int, threads: int, loop: str
) -> None:
    configure_plugin(tmp_path, use)
    env = {"PYTHONPATH": without_uvloop if loop == "asyncio" else str(ROOT)}
    with daemon(tmp_path, **env) as running:
        running.started().process.terminate()
        assert running.ended() == 0
        (left,) = running.events("daemon.abandoned_hooks")
        assert (left["count"], left["threads"]) == (hooks, threads)
        assert running.events("daemon.stopped")


def test_a_plugin_that_hangs_and_a_full_disk_let_the_daemon_end(tmp_path: Path) -> None:
    configure_plugin(tmp_path, "Prints")

    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    with daemon(tmp_path, before=full) as running:
        running.started().process.terminate()
        assert running.ended() == 0


def test_a_relative_config_in_a_directory_that_was_deleted_is_a_finding(tmp_path: Path) -> None:
    (gone := tmp_path / "gone").mkdir()
    serve = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m lmdaemon --config config.toml serve"
    done = subprocess.run(["sh", "-c", serve], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "")
    assert "config.toml: cannot be read: No such file or directory" in done.stderr


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("use", ["Exits", "ExitsAgain", "Interrupts", "ExitsAtItsEnd", "StopsTheLoop"])
def test_a_plugins_own_tasks_cannot_end_the_daemon(tmp_path: Path, without_uvloop: str, use: str, loop: str) -> None:
    """A SystemExit or KeyboardInterrupt ends a run of the event loop, and so does `loop.stop()`."""
    configure_plugin(tmp_path, use)
    env = {"PYTHONPATH": without_uvloop} if loop == "asyncio" else {}
    with daemon(tmp_path, **env) as running:
        running.started().open("acme", "s-1")
        running.api("POST", "operators/acme/sessions/s-1/close")
        poll(lambda: running.events("delivery.delivered"))
        running.process.terminate()
        assert running.ended() == 0
        assert running.events("daemon.stopped")
        kind = {"Interrupts": "KeyboardInterrupt", "StopsTheLoop": None}.get(use, "SystemExit")
        errors = {(event["error"], event["where"].partition(":")[0]) for event in running.events("loop.error")}
        assert errors == ({(kind, "hooks_of_the_tests.py")} if kind else set())


def test_a_plugin_that_fails_to_start_exits_2(tmp_path: Path) -> None:
    configure_plugin(tmp_path, "Fails")
    done = run("serve", cwd=tmp_path)
    assert done.returncode == 2
    assert "config.toml: plugins.mine: start() failed: ValueError" in done.stderr


def test_a_loop_that_dies_ends_the_daemon_loudly(tmp_path: Path) -> None:
    configure_plugin(tmp_path, "Sabotages")
    with daemon(tmp_path) as running:
        assert running.ended() == 1
        (crash,) = running.events("daemon.crashed")
        assert crash["traceback"].endswith("RuntimeError")


def test_what_libraries_log_reaches_the_output_as_type_and_place_only(tmp_path: Path) -> None:
    configure_plugin(tmp_path, "Leaks")
    with daemon(tmp_path) as running:
        running.started("loop.error").started()
        assert [event["error"] for event in running.events("loop.error")] == ["ValueError"]
        assert "quoted-request-bytes" not in running.log.read_text()


@pytest.mark.parametrize("side", ["server", "api"])
def test_a_port_that_is_taken_is_named_and_exits_1(tmp_path: Path, side: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        configure(tmp_path, **{side: address})
        done = run("serve", cwd=tmp_path)
    assert done.returncode == 1
    failure = json.loads(done.stderr.splitlines()[-1])
    assert failure["event"] == "daemon.failed"
    assert failure["reason"] == f"cannot listen on {address}: Address already in use"


def test_a_database_of_another_daemon_is_named_and_exits_1(lm: Running, tmp_path: Path) -> None:
    configure(tmp_path, f'[database]\npath = "{lm.directory / "lmdaemon.sqlite3"}"\n')
    done = run("serve", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stderr)["reason"] == f"{lm.directory / 'lmdaemon.sqlite3'}: is in use by another lmdaemon"


def newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as sql:
        sql.execute("CREATE TABLE future (x)")
        sql.execute("PRAGMA application_id = 0x4C4D6461")
        sql.execute("PRAGMA user_version = 999")


def foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as sql:
        sql.execute("CREATE TABLE recipe (x)")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"\0garbage\xff" * 1000), "file is not a database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xee" * 4080), "file is not a database"),
        (newer, f"was written by a newer lmdaemon (schema 999; this one knows {len(MIGRATIONS)})"),
        (foreign, "is a database of another program"),
    ],
    ids=["garbage", "damaged", "newer", "foreign"],
)
def test_a_file_that_is_no_database_of_ours_is_named_and_left_untouched(
    tmp_path: Path, make: Callable[[Path], Any], reason: str
) -> None:
    configure(tmp_path)
    path = tmp_path / "lmdaemon.sqlite3"
    make(path)
    before = path.read_bytes()
    done = run("serve", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert reason in json.loads(line)["reason"]
    assert "lmdaemon.sqlite3: " in json.loads(line)["reason"]
    assert path.read_bytes() == before


def test_everything_works_in_a_directory_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"d\xff\xfe")
    directory.mkdir()
    file = configure(directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        with daemon(directory, "--config", str(file), "serve", NOTIFY_SOCKET=str(tmp_path / "notify")) as running:
            running.started()
            assert b"Opening" in manager.recv(4096)
            assert running.events("daemon.serving")[0]["live"] == 0
            running.open("acme", "s-1")
            running.api("POST", "operators/acme/sessions/s-1/close")
            copy, export = (os.fsdecode(name) for name in (b"copy\xff", b"export\xff"))
            assert running("backup", copy).stdout.startswith("copy\\udcff: ")
            assert json.loads(running("backup", "--force", "--json", copy).stdout)["file"] == copy
            assert running("sessions", "export", "--output", export).returncode == 0
            assert running("sessions", "show", "acme", "s-1", "--config", file).returncode == 0
            good = file.read_text()
            file.write_text("[srever]\n")
            running.process.send_signal(signal.SIGHUP)
            poll(lambda: running.events("config.reload_failed"))
            file.write_text(good)
            health = json.loads(running("status", "--json").stdout)["health"]
            assert "srever" in json.dumps(health)
            running.process.terminate()
            assert running.ended() == 0
    restored = run("restore", copy, cwd=directory)
    assert (restored.returncode, restored.stderr) == (0, "")
    assert "d\\udcff\\udcfe/lmdaemon.sqlite3: restored from copy\\udcff" in restored.stdout
    assert {copy, export} <= {found.name for found in directory.iterdir()}


# -- finding the daemon


def test_a_daemon_that_does_not_run_is_not_reachable_and_exits_1(tmp_path: Path) -> None:
    for address in (f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/api.sock"):
        configure(tmp_path, api=address)
        done = run("status", "--json", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"lmdaemon: daemon not reachable at {address}: is it running? (")


def ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.parametrize("listen", ["unix:{tmp_path}/api.sock", "0.0.0.0:{port}", "[::]:{port}"])
def test_the_daemon_is_found_wherever_it_listens(tmp_path: Path, listen: str) -> None:
    if "::" in listen and not ipv6():
        pytest.skip("this machine has no IPv6")
    configure(tmp_path, api=listen.format(tmp_path=tmp_path, port=free_port()))
    with daemon(tmp_path) as running:
        running.started()
        assert running("status").stdout.startswith("status: pass")


def test_a_wrong_api_token_is_one_clear_line(lm: Running, tmp_path: Path) -> None:
    text = (lm.directory / "config.toml").read_text().replace('"api-token"', '"handed-over"')
    (tmp_path / "config.toml").write_text(text)
    secret_file(tmp_path / "handed-over", API_TOKEN).chmod(0)
    done = run("sessions", "list", "acme", cwd=tmp_path, before=forgo_privileges)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "401 Unauthorized: a valid bearer token is required; api.token_file: unchecked: cannot be read" in line


async def test_something_else_at_the_address_is_recognised(tmp_path: Path) -> None:
    async with scripted_operator(web.Response(text="<h1>It works!</h1>", content_type="text/html")) as somebody:
        address = somebody.url.split("/")[2]
        configure(tmp_path, api=address)
        done = await asyncio.to_thread(run, "status", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"lmdaemon: what answers at {address} is no lmdaemon (status 200, text/html)\n"


# -- status, hold, release


def test_status_shows_every_check_and_one_line_for_each_operator(lm: Running) -> None:
    lm.open("acme", "for-status")
    text, document = text_and_json("status", cwd=lm.directory)
    lines = text.stdout.splitlines()
    for check in ("store", "sweeper", "dispatcher", "deliveries", "operators", "config"):
        assert [line for line in lines if line.split()[:1] == [check]]
    assert [line.split()[0] for line in lines[-5:]] == ["operator", "acme", "gone", "other", "many"]
    acme = next(operator for operator in document["operators"] if operator["operator"] == "acme")
    assert acme["live"] > 0
    assert document["health"]["status"] in ("pass", "warn")


@pytest.mark.parametrize(
    ("typo", "told"),
    [
        ("[operators.acme]\nprovider = 5\n", "operators.acme.provider: is no key of this table (did you mean"),
        ("[operators.acme\n", "not valid TOML: "),
    ],
)
def test_commands_work_beside_a_file_that_is_broken_elsewhere(
    lm: Running, tmp_path: Path, typo: str, told: str
) -> None:
    """A person who repairs the file must be able to look at the daemon meanwhile. The warning goes to stderr only."""
    broken = tmp_path / "config.toml"
    broken.write_text((lm.directory / "config.toml").read_text().replace("[operators.acme]\n", typo))
    secret_file(tmp_path / "api-token", API_TOKEN)
    done = run("--config", broken, "status", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["operators"]
    assert done.stderr.startswith(f"{broken}: warning: {told}")
    assert run("--config", broken, "check-config", cwd=tmp_path).returncode == 2


def test_the_daemon_is_found_by_another_file_while_its_own_is_broken(lm: Running, tmp_path: Path) -> None:
    sound = (lm.directory / "config.toml").read_text()
    secret_file(tmp_path / "api-token", API_TOKEN)
    broken, other = tmp_path / "config.toml", tmp_path / "other.toml"
    broken.write_text(sound.replace("[api]", "[api"))
    for command in ("status", "config", "hold acme", "size --sessions 9 --heartbeat 9s"):
        done = run(*command.split(), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        first, last = done.stderr.splitlines()
        assert first.startswith("config.toml: not valid TOML: ")
        assert last.startswith("lmdaemon: until it is mended, name another file beside it, with the [api] and ")
        assert last.endswith(": --config FILE")
    other.write_text("[api]" + sound.partition("[api]")[2].partition("[operators")[0])
    assert run("--config", other, "status", cwd=tmp_path).returncode == 0


def test_a_changed_address_is_named_as_a_reason_why_nobody_listens(tmp_path: Path) -> None:
    configure(tmp_path)
    done = run("status", cwd=tmp_path)
    assert "if api.listen was changed since its start, name a file with the earlier one (--config FILE)" in done.stderr


def test_a_file_with_many_errors_is_told_in_four_lines(lm: Running, tmp_path: Path) -> None:
    broken = tmp_path / "config.toml"
    broken.write_text((lm.directory / "config.toml").read_text() + "[log]\n" + "".join(f"k{i} = 1\n" for i in range(9)))
    secret_file(tmp_path / "api-token", API_TOKEN)
    done = run("--config", broken, "status", cwd=tmp_path)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 4
    assert done.stderr.endswith("warning: 6 more; lmdaemon check-config prints them\n")


# -- config


def test_config_shows_what_is_in_force_and_what_a_reload_would_change(tmp_path: Path) -> None:
    """Shown are the settings of the running daemon, even if its file is broken by now. Without a running daemon, they
    are those of the file.
    """
    file = configure(tmp_path)
    with daemon(tmp_path) as running:
        running.started()
        text, document = text_and_json("config", cwd=tmp_path)
        assert 'sessions.idle_timeout = "30m"' in text.stdout.splitlines()
        assert text.stdout.endswith("A reload would change nothing.\n")
        assert document["source"] == "daemon"
        assert document["settings"]["api.token_file"] == '"api-token"'
        sound = file.read_text()
        file.write_text(sound + '[sessions]\nidle_timeout = "20m"\n[database]\npath = "other"\n')
        text, document = text_and_json("config", cwd=tmp_path)
        assert text.stdout.splitlines()[-3:] == [
            "A reload would change:",
            '  database.path: "lmdaemon.sqlite3" → "other" (needs a restart)',
            '  sessions.idle_timeout: "30m" → "20m"',
        ]
        assert document["settings"]["sessions.idle_timeout"] == '"30m"'
        assert [change["needsRestart"] for change in document["changes"]] == [True, False]
        file.write_text(sound + "[sesions]\n")
        done = run("config", cwd=tmp_path)
        assert done.stdout.splitlines()[-2:] == [
            "A reload would be refused and change nothing:",
            "  config.toml: sesions: is no table of this file (did you mean 'sessions'?)",
        ]
        file.write_text(sound)
    done = run("config", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert "daemon not reachable" in done.stderr
    assert json.loads(done.stdout)["source"] == "file"


def test_hold_and_release_are_shown_and_a_held_operator_is_a_warning_only(lm: Running) -> None:
    held = lm("hold", "many")
    assert held.returncode == 0
    assert ["held", "yes"] in [line.split() for line in held.stdout.splitlines()]
    text, document = text_and_json("status", cwd=lm.directory)
    assert text.stdout.startswith("status: warn")
    assert document["health"]["checks"]["operators"][0]["held"] == ["many"]
    assert lm("status", "--check").returncode == 3
    released = lm("release", "many", "--json")
    assert json.loads(released.stdout)["held"] is False


def test_status_of_one_operator_shows_no_other(lm: Running) -> None:
    text, document = text_and_json("status", "--operator", "many", cwd=lm.directory)
    assert [one["operator"] for one in document["operators"]] == ["many"]
    assert "\nmany " in text.stdout
    assert "\nother " not in text.stdout
    done = lm("status", "--operator", "manny")
    said = "lmdaemon: no operator of this name is configured (got 'manny') (did you mean 'many'?)\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_hold_has_a_note_and_an_end_and_says_when_nothing_changes(lm: Running) -> None:
    held = lm("hold", "many", "--note", "they move", "--for", "2h", "--json")
    assert (held.returncode, json.loads(held.stdout)["heldNote"]) == (0, "they move")
    assert "many: held since " in lm("status").stdout
    again = lm("hold", "many")
    assert (again.returncode, "many was held already" in again.stderr) == (0, True)
    assert lm("release", "many").returncode == 0
    assert "many was not kept back" in lm("release", "many").stderr
    nothing = lm("probe", "many")
    assert (nothing.returncode, "409" in nothing.stderr) == (1, True)


@pytest.mark.parametrize("end", ["2", "0s", "soon", "31d"])
def test_a_hold_for_a_time_that_is_none_is_refused(lm: Running, end: str) -> None:
    refused = lm("hold", "many", "--for", end)
    assert refused.returncode in (1, 2)
    assert refused.stderr
    assert json.loads(lm("release", "many", "--json").stdout)["changed"] is False


async def test_status_of_a_daemon_that_fails_exits_1_and_shows_what_it_can(tmp_path: Path) -> None:
    health = {"status": "fail", "checks": {"store": [{"status": "fail", "output": "disk I/O error"}]}}
    problem = {"title": "Service Unavailable", "status": 503, "detail": "reading failed: disk I/O error"}
    answers = [
        web.json_response(health, status=503, content_type="application/health+json"),
        web.json_response(problem, status=503, content_type="application/problem+json"),
    ]
    async with scripted_operator(*answers) as failing:
        configure(tmp_path, api=failing.url.split("/")[2])
        done = await asyncio.to_thread(run, "status", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("status: fail")
    said = [line.strip() for line in done.stdout.splitlines()[1:4]]
    assert said[:2] == ["store  fail", "disk I/O error"]
    assert said[2].startswith("by hand: make room on its disk, or mend it")
    assert done.stderr == "lmdaemon: 503 Service Unavailable: reading failed: disk I/O error\n"


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("warn", 3), ("fail", 4), ("new", 1)])
async def test_a_checked_status_exits_by_health(tmp_path: Path, status: str, code: int) -> None:
    answers = [
        web.json_response({"status": status}, content_type="application/health+json"),
        web.json_response({"items": []}),  # the answer to the question for operators
        web.json_response({"items": []}),  # the answer to the question for daemons
    ]
    async with scripted_operator(*answers) as daemon:
        configure(tmp_path, api=daemon.url.split("/")[2])
        done = await asyncio.to_thread(run, "status", "--check", cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout.startswith(f"status: {status}")


def test_a_checked_status_of_no_daemon_exits_1(tmp_path: Path) -> None:
    configure(tmp_path)
    assert run("status", "--check", cwd=tmp_path).returncode == 1


# -- sessions


def test_a_session_from_open_to_close(lm: Running) -> None:
    words = ("sessions", "open", "acme", "whole life", "--player", "p1", "--token-env", "T")
    session = json.loads(lm(*words, "--idle-timeout", "90", "--json", T=PLAYER_TOKEN).stdout)
    assert (session["state"], session["playerId"], session["idleTimeoutSeconds"]) == ("active", "p1", 90)
    shown, document = text_and_json("sessions", "show", "acme", "whole life", cwd=lm.directory)
    assert (session.pop("changed"), session.pop("ignored")) == (True, [])
    # Computed from another reading of the clocks: ±1 ms
    assert document == session | {"deliveries": [], "expiresAt": document["expiresAt"]}
    assert ["sessionId", "whole", "life"] in [line.split() for line in shown.stdout.splitlines()]
    assert lm("sessions", "touch", "acme", "whole life").stdout == "touched: 1\n"
    closed = lm("sessions", "close", "acme", "whole life")
    assert ["reason", "closed"] in [line.split() for line in closed.stdout.splitlines()]
    reopened = lm(*words[:-2], "--token-file", "player-token")
    assert reopened.returncode == 1
    assert reopened.stderr.startswith("lmdaemon: 409 Conflict: the session has ended (closed, 20")


@pytest.mark.parametrize("session", ["a/b%2F", "...", "touch", "?x=y#z naïve 会话"])
def test_any_session_id_can_be_named(lm: Running, session: str) -> None:
    lm.open("acme", session)
    assert json.loads(lm("sessions", "close", "acme", session, "--json").stdout)["sessionId"] == session


def test_an_id_that_a_url_would_resolve_is_named_as_it_is(lm: Running) -> None:
    refused = lm("sessions", "open", "acme", "..", "--player", "p", "--token-env", "TOKEN", TOKEN="t")
    assert refused.returncode == 1
    assert "sessionId: must not be . or .." in refused.stderr
    assert "no session has this id" in lm("sessions", "show", "acme", "..").stderr


def test_touching_what_is_not_there_says_so_and_exits_1(lm: Running) -> None:
    lm.open("acme", "touchable")
    lm.open("acme", "over")
    lm.api("POST", "operators/acme/sessions/over/close")
    done = lm("sessions", "touch", "acme", "touchable", "over", "unheard-of")
    assert (done.returncode, done.stdout) == (1, "touched: 1\nunknown: unheard-of\nended: over\n")
    done = lm("sessions", "touch", "acme", "unheard-of", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"touched": 0, "unknown": ["unheard-of"], "ended": []})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("sessions list nobody --json", "404 Not Found: no operator of this name is configured (got 'nobody')"),
        ("sessions open acme s1 --player p1", "400 Bad Request: token: is required: dialect v4 must send it"),
        ("deliveries show msg_1_x --json", "404 Not Found: no delivery has this id"),
    ],
)
def test_a_refusal_of_the_daemon_is_one_line_and_exits_1(lm: Running, words: str, problem: str) -> None:
    done = lm(*words.split())
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lmdaemon: {problem}")


@pytest.mark.parametrize(
    "words",
    [
        ["find", ""],
        ["sessions", "list", ""],
        ["sessions", "list", "acme", "--player", ""],
        ["sessions", "show", "acme", ""],
        ["sessions", "export", "--operator", ""],
        ["sessions", "export", "--player", ""],
        ["sessions", "export", "--session", ""],
        ["deliveries", "list", "--operator", ""],
        ["deliveries", "list", "--sink", ""],
        ["deliveries", "show", ""],
        ["deliveries", "retry", ""],
        ["deliveries", "retry", "--operator", "acme", "--reason", ""],
        ["deliveries", "discard", "--operator", "acme", "--note", ""],
        ["hold", "acme", "--note", ""],
        ["release", ""],
    ],
    ids=" ".join,
)
def test_an_empty_argument_is_refused_and_never_means_all(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An empty argument may come from a variable in a script that is not set."""
    with pytest.raises(SystemExit) as refused:
        parser().parse_args(words)
    assert refused.value.code == 2
    assert "must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["deliveries list", "sessions export"])
def test_an_operator_that_is_not_configured_is_told_of_an_empty_result(lm: Running, command: str) -> None:
    """The name may be misspelt. It is no error, because the rows of an operator stay when it has left the file."""
    done = lm(*command.split(), "--operator", "acmee")
    assert done.returncode == 0
    said = "lmdaemon: no operator of this name is configured (got 'acmee') (did you mean 'acme'?)\n"
    assert done.stderr == said


@pytest.mark.parametrize("option", ["", "ended-"])
def test_a_period_that_ends_before_it_begins_is_refused(lm: Running, option: str) -> None:
    words = ["--operator", "acme", f"--{option}since", "1h ago", f"--{option}until", "2h ago"]
    for command in (["retry", "--dry-run"], ["discard", "--note", "x"]):
        done = lm("deliveries", *command, *words)
        assert done.returncode == 2
        assert f"--{option}since: must not be later than --{option}until" in done.stderr


def test_a_note_that_cannot_be_shown_is_refused_with_the_rule(lm: Running) -> None:
    for note in ("x" * 257, "two\nlines"):
        done = lm("hold", "other", "--note", note)
        assert done.returncode == 1
        assert "note: must be a string of 1 to 256 characters, none of them a control character" in done.stderr


def test_lists_are_of_a_period_where_asked(lm: Running) -> None:
    """Sessions are selected by the time of their opening, deliveries by the end of their session."""
    for session in ("of-period-1", "of-period-2"):
        lm.open("other", session)
        lm.api("POST", f"operators/other/sessions/{session}/close")
    for words in ("sessions list other", "deliveries list --operator other"):

        def shown(*options: str, words: str = words) -> list[str]:
            done = lm(*words.split(), *options, "--json")
            assert done.returncode == 0
            return [one["sessionId"] for one in json.loads(done.stdout)]

        both = ["of-period-2", "of-period-1"]
        assert shown("--since", "1h ago")[:2] == shown("--until", "tomorrow")[:2] == both
        assert shown("--since", "1h ago", "--limit", "1") == both[:1]
        assert shown("--until", "1h ago") == shown("--since", "2d ago", "--until", "1d ago") == []


async def test_lists_are_cut_where_asked_and_whole_with_all(lm: Running) -> None:
    ids = [f"many-{number}" for number in range(1030)]  # more than one page of the API
    await open_many(lm, "many", ids)
    few = lm("sessions", "list", "many", "--limit", "3", "--player", "p1", "--state", "active")
    assert [line.split()[1:3] for line in few.stdout.splitlines()[1:]] == [["p1", "active"]] * 3
    assert few.stderr == "lmdaemon: 3 shown, there are more: --limit N or --all\n"
    text, document = await asyncio.to_thread(text_and_json, "sessions", "list", "many", "--all", cwd=lm.directory)
    assert {session["sessionId"] for session in document} == set(ids)
    assert len(text.stdout.splitlines()) == 1 + len(ids)
    assert text.stderr == ""
    default = lm("sessions", "list", "many", "--json")
    assert [session["sessionId"] for session in json.loads(default.stdout)] == [
        session["sessionId"] for session in document[:100]
    ]
    assert json.loads(lm("sessions", "list", "many", "--state", "ended", "--json").stdout) == []


@pytest.mark.parametrize("words", ["version", "sessions list many --all --json"])
def test_a_reader_that_goes_away_is_no_crash(lm: Running, words: str) -> None:
    with subprocess.Popen(
        [*COMMAND, *words.split()],
        cwd=lm.directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(20) == 1


# -- deliveries


def dead_delivery(lm: Running, session: str) -> dict[str, Any]:
    """Ends a session whose operator refuses every connection, and waits until its delivery is dead."""
    lm.open("gone", session)
    lm.api("POST", f"operators/gone/sessions/{session}/close")

    def delivery() -> dict[str, Any]:
        (found,) = lm.api("GET", f"operators/gone/sessions/{session}")["deliveries"]
        return dict(found)

    poll(lambda: delivery()["state"] == "dead")
    return delivery()


def test_a_dead_delivery_is_listed_shown_and_made_due_again(lm: Running) -> None:
    dead = dead_delivery(lm, "undeliverable")
    arguments = ("--operator", "gone", "--sink", "http", "--state", "dead")
    text, document = text_and_json("deliveries", "list", *arguments, cwd=lm.directory)
    assert dead["id"] in text.stdout
    assert dead in document
    text, document = text_and_json("deliveries", "show", dead["id"], cwd=lm.directory)
    assert "history:\nat " in text.stdout
    assert [attempt["error"] for attempt in document["history"]] == ["connect"] * 2
    lm.api("POST", "operators/gone/hold")
    again = lm("deliveries", "retry", dead["id"], "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["state"] == "pending"
    refused = lm("deliveries", "retry", dead["id"])
    assert refused.returncode == 1
    assert refused.stderr == "lmdaemon: 409 Conflict: the delivery is pending, not dead\n"
    lm.api("POST", "operators/gone/release")


def test_all_dead_deliveries_of_an_operator_are_made_due_again(lm: Running) -> None:
    dead = dead_delivery(lm, "also-undeliverable")
    lm.api("POST", "operators/gone/hold")
    later = lm("deliveries", "retry", "--operator", "gone", "--since", "2999-01-01T00:00:00Z", "--json")
    assert later.returncode == 1
    assert "since: must not lie ahead (got '2999-01-01T00:00:00.000Z')" in later.stderr
    done = lm("deliveries", "retry", "--operator", "gone")
    assert done.returncode == 0
    assert int(done.stdout.split()[1]) >= 1
    assert lm.api("GET", f"deliveries/{dead['id']}")["state"] == "pending"
    lm.api("POST", "operators/gone/release")


def test_dead_deliveries_that_nobody_wants_are_discarded(lm: Running) -> None:
    """A dry run shows what would be discarded. Discarded deliveries are shown as such, and `/health` does not count
    them any more.
    """
    dead = dead_delivery(lm, "unwanted")
    of_it = ("--operator", "gone", "--ended-since", dead["createdAt"], "--reason", "connect")

    def counted(state: str = "dead") -> int:
        return int(next(one[state] for one in lm.api("GET", "operators")["items"] if one["operator"] == "gone"))

    poll(lambda: counted("pending") == 0)  # deliveries that other tests have retried are dead again
    before = counted()
    text, document = text_and_json("deliveries", "retry", *of_it, "--dry-run", cwd=lm.directory)
    found = {"found": 1, "canBeSent": 1, "oldestSettledAt": dead["settledAt"], "reasons": {"connect": 1}}
    assert document == found | {"seconds": 0.1}
    assert "1 connect" in text.stdout
    note = ("--note", "they went bankrupt")
    assert json.loads(lm("deliveries", "discard", *of_it, *note, "--dry-run", "--json").stdout)["found"] == 1
    assert counted() == before
    assert json.loads(lm("deliveries", "discard", *of_it, *note, "--json").stdout) == {"discarded": 1}
    assert counted() == before - 1
    assert lm.events("delivery.discarded_by_hand")[-1]["count"] == 1
    assert "discarded (they went bankrupt)" in lm("deliveries", "show", dead["id"]).stdout
    assert "discarded (they went" in lm("sessions", "show", "gone", "unwanted").stdout
    assert "discarded (they went" in lm("deliveries", "list", "--operator", "gone", "--state", "dead").stdout
    again = json.loads(lm("deliveries", "discard", dead["id"], "--note", "again", "--json").stdout)
    assert (again["state"], again["discarded"]["note"]) == ("dead", "they went bankrupt")


def test_a_retry_that_is_followed_ends_when_all_are_due(lm: Running) -> None:
    dead = dead_delivery(lm, "followed")
    lm.api("POST", "operators/gone/hold")
    done = lm("deliveries", "retry", "--operator", "gone", "--follow", "--ended-since", dead["createdAt"], "--json")
    assert json.loads(done.stdout) == {"retried": 1}
    assert lm.events("delivery.retried_by_hand")[-1]["count"] == 1  # the step that found no more is not logged
    assert lm.api("GET", f"deliveries/{dead['id']}")["state"] == "pending"
    lm.api("POST", "operators/gone/release")


# -- send


async def hang(request: web.Request) -> web.Response:
    await asyncio.sleep(30)
    raise AssertionError("nobody waits for this long")


@pytest.mark.parametrize(
    ("answer", "code", "verdict"),
    [
        ({"error": 0, "description": "Success"}, 0, "delivered"),
        ({"error": 100}, 1, "would be retried because code_100"),
        ({"error": 120}, 1, "final, never sent again because code_120"),
        (lambda: web.Response(status=500), 1, "would be retried because status_500"),
        (lambda: web.Response(status=410), 1, "would hold the operator because gone"),
        (
            lambda: web.Response(status=503, headers={"Retry-After": "120"}),
            1,
            "would be retried because status_503; nothing would be sent to this operator for 120 s (Retry-After)",
        ),
        (
            lambda: web.Response(status=302, headers={"Location": "https://u:pw@elsewhere/x?key=value"}),
            1,
            "would be retried because redirect",
        ),
        (hang, 1, "would be retried because timeout"),
    ],
    ids=["0", "100", "120", "500", "410", "503", "redirect", "hang"],
)
async def test_send_prints_both_sides_and_the_verdict(tmp_path: Path, answer: Any, code: int, verdict: str) -> None:
    played = answer() if callable(answer) and answer is not hang else answer
    async with scripted_operator(played) as peer:
        timeout = "500ms" if answer is hang else "60s"  # an answer that the test expects may take as long as it needs
        configure(tmp_path, f'url = "{peer.url}"\nallow_private_network = true\ntimeout = "{timeout}"\n')
        words = ("send", "acme", "--session", "s1", "--player", "p1", "--token-file", "player-token")
        done = await asyncio.to_thread(run, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (code, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"POST {peer.url}"
    assert '{"providerId":"luckymonaco","sessionId":"s1","externalPlayerId":"p1","token":"***"}' in lines
    assert lines[-1] == f"Verdict: {verdict}"
    (received,) = peer.received
    assert json.loads(received.body)["token"] == PLAYER_TOKEN
    if "redirect" in verdict:
        assert "Location: https://elsewhere/x?key=***" in lines
    if isinstance(answer, dict):
        assert json.dumps(answer) in lines
        assert "Content-Type: application/json; charset=utf-8" in lines
        assert [line for line in lines if line.startswith("HTTP 200 (")]
    if answer is hang:
        (waited,) = re.findall(r"^No answer \((\d+) ms", done.stdout, re.MULTILINE)
        assert int(waited) >= 500


async def test_what_send_shows_is_what_the_operator_got_but_for_the_secrets(tmp_path: Path) -> None:
    secret_file(tmp_path / "signing", SIGNING_SECRET)
    async with scripted_operator() as peer:
        url = peer.url.replace("http://", "http://me:pass-word@") + "?member=query-secret&flag=&member=2&bare-secret"
        configure(tmp_path, f'url = "{url}"\nallow_private_network = true\nsigning_secret_file = "signing"\n')
        done = await asyncio.to_thread(run, "send", "acme", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    assert shown["request"]["url"] == f"{peer.url}?member=***&flag=***&member=***&***"
    assert (shown["request"]["method"], shown["verdict"], shown["reason"]) == ("POST", "delivered", None)
    (received,) = peer.received
    expected = received.headers | {"Authorization": "Basic ***", "webhook-signature": "v1,***"}
    assert shown["request"]["headers"] == expected
    assert json.loads(shown["request"]["body"]) == json.loads(received.body) | {"token": "***"}
    signature = received.headers["webhook-signature"].removeprefix("v1,")
    basic = received.headers["Authorization"].removeprefix("Basic ")
    for secret in (signature, basic, "pass-word", "query-secret", "bare-secret", json.loads(received.body)["token"]):
        assert secret not in done.stdout


async def test_send_to_a_url_signs_with_the_secret_of_a_file(tmp_path: Path) -> None:
    secret_file(tmp_path / "signing", SIGNING_SECRET)
    async with scripted_operator() as peer:
        options = ("--url", peer.url, "--signing-secret-file", "signing", "--json")
        done = await asyncio.to_thread(run, "send", *options, cwd=tmp_path)
    shown = json.loads(done.stdout)
    (received,) = peer.received
    Webhook(SIGNING_SECRET).verify(received.body, dict(received.headers))
    assert (done.returncode, shown["request"]["headers"]["webhook-signature"]) == (0, "v1,***")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (f"# of May\n{SIGNING_SECRET}\nwhsec_hush", "line 3: must be whsec_ followed by base64 of 24 to 64 bytes"),
        ("# of May", "must not have comments alone"),
    ],
)
def test_a_wrong_signing_secret_is_told_by_its_line_alone(tmp_path: Path, content: str, finding: str) -> None:
    secret_file(tmp_path / "signing", content)
    done = run("send", "--url", "http://127.0.0.1:1/", "--signing-secret-file", "signing", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--signing-secret-file: {finding}\n" in done.stderr


async def test_send_takes_a_url_byte_for_byte_and_masks_it_in_every_spelling(tmp_path: Path) -> None:
    """A URL is masked as written, decoded, and as a server's own parser spells it."""
    path = "/a%2Fb/../c?sig=%41bc%2Bd%2F%7e&empty=&p=%c3%a9t%C3%A9"

    async def echo(request: web.Request) -> web.Response:
        text = "\n".join((request.raw_path, request.headers["Authorization"], "Abc+d/~", "été", "caf%c3%A9", "café"))
        return web.Response(text=text)

    async with scripted_operator(echo) as peer:
        origin = peer.url.removesuffix("/V4/SessionExpired")
        url = origin.replace("http://", "http://caf%c3%A9:k€y@") + path
        done = await asyncio.to_thread(run, "send", "--url", url, "--json", cwd=tmp_path)
    shown = json.loads(done.stdout)
    assert shown["request"]["url"] == f"{origin}/a%2Fb/../c?sig=***&empty=***&p=***"
    assert shown["request"]["headers"]["Authorization"] == "Basic ***"
    assert peer.received[0].headers["Authorization"] == "Basic " + base64.b64encode("café:k€y".encode()).decode()
    assert shown["answer"]["body"].split("\n") == [
        *("/a%2Fb/../c?sig=***&empty=&p=***", "Basic ***", "***", "été", "***", "***"),
    ]


def test_send_shows_no_user_and_password_however_short(tmp_path: Path) -> None:
    done = run("send", "--url", f"http://a:b@127.0.0.1:{free_port()}/?", "--json", cwd=tmp_path)
    request = json.loads(done.stdout)["request"]
    assert request["headers"]["Authorization"] == "Basic ***"
    assert request["url"].endswith("/?")
    assert "YTpi" not in done.stdout


ECHOES = (
    'plåyer/to"ken+<>~never shown',
    'plåyer/to\\"ken+<>~never shown',
    'pl\\u00e5yer\\/to\\"ken+<>~never shown',
    "pl%C3%A5yer%2Fto%22ken%2B%3C%3E~never%20shown",
    "pl%c3%a5yer%2fto%22ken%2b%3c%3e~never+shown",
    "plåyer/to&quot;ken+&lt;&gt;~never shown",
)


async def test_secrets_echoed_in_an_answer_are_masked_in_every_spelling(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.Response:
        fields = dict(part.split("=") for part in (await request.text()).split("&"))
        text = "\n".join(("got:", *ECHOES, fields["hash"], fields["hash"].upper(), "\x1b[2J", "end"))
        return web.Response(text=text, headers={"Via": ECHOES[3], "Location": f"/again?token={ECHOES[4]}"})

    secret_file(tmp_path / "hash-key", HASH_KEY)
    async with scripted_operator(echo) as peer:
        configure(tmp_path)
        options = ("--dialect", "pragmatic", "--hash-key-file", "hash-key", "--token-file", "player-token")
        done = await asyncio.to_thread(run, "send", "--url", peer.url, *options, cwd=tmp_path)
    (received,) = peer.received
    hashed = received.body.decode().partition("hash=")[2].partition("&")[0]
    assert len(hashed) == 32
    assert done.returncode == 1
    assert hashed not in done.stdout.lower()
    assert not [echoed for echoed in ECHOES if echoed in done.stdout]
    lines = done.stdout.splitlines()
    answer = lines[lines.index("got:") : lines.index("end")]
    # No control character of the answer reaches the terminal
    assert answer == ["got:", *["***"] * (len(ECHOES) + 2), "\\x1b[2J"]
    assert "Via: ***" in lines
    assert "Location: /again?token=***" in lines
    assert [line for line in lines if line.startswith("hash=***&providerId=luckymonaco&") and "&token=***" in line]
    assert lines[-1] == "Verdict: would be retried because bad_answer"


async def test_a_secret_that_the_reading_limit_cuts_in_two_is_not_shown(tmp_path: Path) -> None:
    long_answer = web.Response(text="x" * (16 * 1024 - 12) + PLAYER_TOKEN * 100)
    async with scripted_operator(long_answer) as peer:
        configure(tmp_path)
        words = ("send", "--url", peer.url, "--token-file", "player-token")
        done = await asyncio.to_thread(run, *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "xxxx" in done.stdout
    assert PLAYER_TOKEN[:5] not in done.stdout
    assert "(the answer is longer; the rest was not read)" in done.stdout
    assert done.stdout.endswith("Verdict: would be retried because answer_too_long\n")


async def test_the_token_is_in_no_process_list_while_send_runs(tmp_path: Path) -> None:
    async with scripted_operator(hang) as peer:
        configure(tmp_path)
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *("send", "--url", peer.url, "--token-env", "SECRET", "--timeout", "30s"),
            cwd=tmp_path,
            env=environment(SECRET=PLAYER_TOKEN),
            stdout=subprocess.PIPE,
        )
        await peer.wait_for(1)
        command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
        process.kill()
        await process.communicate()
    assert "--token-env\0SECRET" in command_line
    assert PLAYER_TOKEN not in command_line
    assert json.loads(peer.received[0].body)["token"] == PLAYER_TOKEN


async def test_send_to_a_url_takes_every_shipped_dialect(tmp_path: Path) -> None:
    """No configuration file is needed for this."""
    async with scripted_operator() as peer:
        for dialect, player in (("v4", "externalPlayerId"), ("v4.01", "userId")):
            words = ("send", "--url", peer.url, "--dialect", dialect, "--provider-id", "them", "--player", "p9")
            done = await asyncio.to_thread(run, *words, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            body = json.loads(peer.received[-1].body)
            assert (body["providerId"], body[player]) == ("them", "p9")


async def test_send_speaks_the_dialects_of_the_configuration(tmp_path: Path) -> None:
    fields = '{ provider = "p", session = "s", player = "who" }'
    async with scripted_operator({"error": 5}) as peer:
        configure(
            tmp_path,
            f'dialect = "old"\n[dialects.old]\npath = "/old"\nfields = {fields}\ncodes = {{ final = 5 }}\n'
            'required = ["provider", "session", "player"]\n',
        )
        words = ("send", "--url", peer.url, "--dialect", "old", "--session", "s1")
        done = await asyncio.to_thread(run, *words, cwd=tmp_path)
    assert json.loads(peer.received[0].body) == {"p": "luckymonaco", "s": "s1", "who": "lmdaemon-test-player"}
    assert done.stdout.endswith("Verdict: final, never sent again because code_5\n")


def test_send_to_nobody_says_why_there_is_no_answer(tmp_path: Path) -> None:
    port = free_port()
    done = run("send", "--url", f"http://127.0.0.1:{port}/x?key=query-secret", "--json", cwd=tmp_path)
    assert done.returncode == 1
    shown = json.loads(done.stdout)
    assert (shown["answer"], shown["verdict"], shown["reason"]) == (None, "retry", "connect")
    assert str(port) in shown["detail"]
    assert "query-secret" not in done.stdout


def test_send_does_not_go_where_the_daemon_would_not(tmp_path: Path) -> None:
    # `localhost` would be refused when the file is read. This name is checked only when it is resolved
    configure(tmp_path, 'url = "https://acme.example.invalid/"\n')
    done = run("send", "acme", "--yes", cwd=tmp_path, first=partial(forked.put, "socket", "getaddrinfo", leads_inside))
    assert done.returncode == 1
    assert "Verdict: would be retried because private_address" in done.stdout


def test_send_asks_before_it_tells_another_machine(tmp_path: Path) -> None:
    for url in ("https://127.0.0.1.example.invalid/", "http://127.0.0.1@example.invalid/", "https://10.0.0.1/"):
        done = run("send", "--url", url, "--session", "s1", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "that session 's1' of player 'lmdaemon-test-player' has ended" in done.stderr
        assert "say --yes if that is meant" in done.stderr


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("<html>no</html>", "200, but the body is HTML"),
        ('{"Error": 0}', '200, but there is "Error", but no "error"'),
        ('{"error": false}', "200, but `error` is false, where a number is expected"),
        ('{"error": 7, "description": "no"}', '200, but `error` is 7, bad parameters ("no")'),
        ('{"error": 0}', "200, `error` is 0"),
    ],
)
async def test_send_says_in_words_what_came_back(tmp_path: Path, answer: str, words: str) -> None:
    async with scripted_operator(web.Response(text=answer)) as peer:
        done = await asyncio.to_thread(run, "send", "--url", peer.url, cwd=tmp_path)
    assert done.stdout.splitlines()[-2] == f"In words: {words}"


def test_send_refuses_to_judge_an_operator_whose_secrets_are_out_of_reach(tmp_path: Path) -> None:
    configure(tmp_path, 'url = "https://acme.example.invalid/"\nsigning_secret_file = "handed-over"\n')
    secret_file(tmp_path / "handed-over", SIGNING_SECRET).chmod(0)
    done = run("send", "acme", "--yes", cwd=tmp_path, before=forgo_privileges)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "config.toml: operators.acme.signing_secret_file: cannot be read: Permission denied (handed-over)\n"
    )


def test_find_shows_a_session_and_a_players_of_all_operators(lm: Running) -> None:
    lm.open("acme", "found-1")
    lm.open("gone", "found-1")
    text = lm("find", "found-1")
    assert (text.returncode, text.stderr) == (0, "")
    assert [line.split()[:2] for line in text.stdout.splitlines()[1:]] == [["gone", "found-1"], ["acme", "found-1"]]
    of_player = json.loads(lm("find", "p1", "--json", "--all").stdout)
    assert {("acme", "found-1"), ("gone", "found-1")} <= {(one["operator"], one["sessionId"]) for one in of_player}
    nobody = lm("find", "nobody-has-this-id")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr == "lmdaemon: no session and no player has this id\n"


# -- events


def test_events_are_printed_as_they_happen_and_a_restart_is_outlived(tmp_path: Path) -> None:
    operators = '[operators.acme]\nprovider_id = "a"\nendpoint = ""\n'
    with process(tmp_path, operators) as daemon_process:
        printed = tmp_path / "printed"
        with printed.open("w") as out:
            tail = subprocess.Popen(
                [*COMMAND, "events", "--json"], cwd=tmp_path, env=environment(), stdout=out, stderr=subprocess.STDOUT
            )
        try:
            for life in (1, 2):
                poll(lambda life=life: printed.read_text().count('"snapshot":true') == life)
                path = f"{daemon_process.api}/v1/operators/acme/sessions/s{life}"
                daemon_process.call("PUT", path, {"playerId": "p", "token": "t"})
                daemon_process.call("POST", path + "/close")
                poll(lambda life=life: f'"sessionId":"s{life}"' in printed.read_text())
                if life == 1:
                    assert daemon_process.stop() == 0
                    daemon_process.start()
        finally:
            tail.terminate()
            tail.wait(10)
        assert "Traceback" not in printed.read_text()


def test_a_daemon_that_is_away_is_told_once_and_so_is_its_return(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stream of events is ended, twenty connections are refused, the next stream is cut, and so on."""
    snapshot = ("figures", {"snapshot": True})
    refused = admin.Unreachable("daemon not reachable")
    runs: list[list[Any]] = [[snapshot], *[[refused]] * 20, [snapshot, refused], *[[refused]] * 20, [snapshot]]

    class Scripted:
        def __init__(self, *_: object) -> None: ...

        async def __aenter__(self) -> "Scripted":
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def events(self, *_: str, **__: object) -> AsyncIterator[tuple[str, Any]]:
            if not runs:
                raise admin.Failed("the script is over")
            for step in runs.pop(0):
                if isinstance(step, Exception):
                    raise step
                yield step

    monkeypatch.setattr(admin, "Client", Scripted)
    monkeypatch.setattr(admin, "administered", lambda args: None)
    monkeypatch.setattr(admin, "AGAIN_FIRST_S", 0.0)
    with pytest.raises(admin.Failed):
        admin.events(Namespace(client_cert=None, client_key=None, operator=None, json=False))
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "lmdaemon: the daemon has ended the stream; waiting for it",
        "lmdaemon: the daemon is back",
        "lmdaemon: daemon not reachable; waiting for it",
        "lmdaemon: the daemon is back",
        "lmdaemon: the daemon has ended the stream; waiting for it",
    ]
    assert len(told.out.splitlines()) == 3


def test_events_of_a_daemon_that_is_not_there_fail_at_once(tmp_path: Path) -> None:
    configure(tmp_path)
    done = run("events", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "daemon not reachable" in done.stderr
