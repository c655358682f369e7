"""The commands that read the whole configuration: `serve`, which runs the daemon to its end, and `check-config`.

`daemon` and what it needs is imported only when the configuration is sound.
"""

import argparse
import asyncio
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdaemon import log
from lmdaemon.commands.arguments import JSON, command
from lmdaemon.commands.shared import FAILED, MISCONFIGURED, STOPPED, print_json, quiet_libraries, reason, say
from lmdaemon.config import reader
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Settings
from lmdaemon.log import Log

if TYPE_CHECKING:
    from lmdaemon.daemon import Daemon

STOPPED_WITHIN_S = 1.0  # by a signal during the start
ABANDON_AFTER_S = 1.0  # for a plug-in's hook that ignores its cancellation when everything else has ended

# By so many objects the living may grow before garbage is looked for. Almost all that a request is made of is freed
# with its last reference; Python's 700 are reached by what is merely in use, and cost a touch 16 % of its CPU time.
GARBAGE = 10_000

# For so long a busy loop may keep the interpreter from the writer, which wants it back after each statement. With
# Python's 5 ms, a transaction of a backlog takes three times what SQLite needs for it.
SWITCH_S = 0.0002


@command()
def serve(args: argparse.Namespace) -> int:
    sys.setswitchinterval(SWITCH_S)
    _raise_file_limit()
    gc.disable()  # until _keep_what_is_made: a start makes little else than what stays, and is a sixth faster so
    try:
        settings = reader.of_command(args.config)
        log.setup(settings.log.level, settings.log.format)
        quiet_libraries()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            code = _until_ended(runner, settings)
            _abandon_what_hangs(runner, code)
    finally:
        gc.enable()
    return code


def _raise_file_limit() -> None:
    """Lets the process open as many files as it may allow itself: the soft limit, often 1,024, is there for programs
    that use select(2), and a connection takes one.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a system that refuses what it offers: the listeners live with the soft one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_what_is_made() -> None:
    """The 45,000 objects that a daemon is made of stay as long as it does, so no collection need look through them:
    that took 30 to 60 ms each time, in which nobody was answered and nothing ended.
    """
    gc.freeze()
    gc.set_threshold(GARBAGE)
    gc.enable()


def _until_ended(runner: asyncio.Runner, settings: Settings) -> int:
    """Runs the daemon to its end, says why it ended, and returns the exit code."""
    from lmdaemon.daemon import Daemon
    from lmdaemon.store.contract import DatabaseError, StoreError

    daemon = Daemon(settings, on_serving=_keep_what_is_made)
    _take_signals(daemon, runner.get_loop())
    try:
        runner.run(daemon.run())
    except ConfigError as error:  # a plug-in's finding; the file's name before it, as the file's own findings have it
        for finding in error.findings:
            say(f"{settings.file}: {finding}")
        return MISCONFIGURED
    except (DatabaseError, StoreError, OSError) as error:
        Log("daemon").error("daemon.failed", reason=reason(error))
        return FAILED
    except Exception as error:  # an ExceptionGroup when a loop died; the service manager starts us again
        lost = _database_lost(error)
        if lost is None:
            Log("daemon").exception("daemon.crashed")
        else:
            Log("daemon").error("daemon.failed", reason=str(lost))
        return FAILED
    return STOPPED


def _take_signals(daemon: "Daemon", loop: asyncio.AbstractEventLoop) -> None:
    """How signals are taken while the daemon starts; when it serves, it takes them itself.

    A stop closes what was opened, within a second. Then the process ends, whatever it is busy with (a migration, a
    plug-in that blocks): nothing was acknowledged yet, and the next start finds what a kill would have left.
    """

    def stop(*_: object) -> None:
        at_last = threading.Timer(STOPPED_WITHIN_S, os._exit, (STOPPED,))
        at_last.daemon = True
        at_last.start()
        loop.call_soon_threadsafe(daemon.stop)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(daemon.reload))


def _database_lost(error: Exception) -> Exception | None:
    """The one reason in a group of exceptions when it is a database that was taken away, else None."""
    from lmdaemon.store.contract import DatabaseError

    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, DatabaseError) else None


def _abandon_what_hangs(runner: asyncio.Runner, code: int) -> None:
    """Ends the process at once when a plug-in's hook ignores its cancellation: the loop's own end would wait for it for
    ever. By now everything of ours is closed.
    """

    async def cancel_all() -> int:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        return len((await asyncio.wait(tasks, timeout=ABANDON_AFTER_S))[1]) if tasks else 0

    hanging = runner.run(cancel_all())
    if hanging:
        Log("daemon").warning("daemon.abandoned_hooks", count=hanging)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _loop_factory() -> Callable[[], Any] | None:
    """uvloop's event loop where that extra is installed; None: asyncio's own."""
    try:
        factory: Callable[[], Any] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


@command(JSON)
def check_config(args: argparse.Namespace) -> int:
    path: Path | None = None
    errors: Sequence[str] = ()
    warnings: Sequence[str] = ()
    try:
        path, found = reader.find(args.config)
        warnings = _checked(path, found=found).warnings
    except ConfigError as error:
        errors = error.findings
    if args.json:
        file = None if path is None else str(path)
        print_json({"file": file, "valid": not errors, "errors": [*errors], "warnings": [*warnings]})
    else:
        for finding in errors:
            say(finding)
        for warning in warnings:
            say(f"{path}: warning: {warning}", "WARNING")
        if not errors:
            print(f"{path}: valid")
    return MISCONFIGURED if errors else STOPPED


def _checked(path: Path, *, found: bool) -> Settings:
    """The settings, their plug-ins imported and looked at, but not called. Raises ConfigError with every finding."""
    from lmdaemon import plugins

    settings = reader.load(path, found=found, secrets="readable")
    findings: list[str] = []

    async def examine() -> None:  # in a running loop, as the daemon does it: a module may ask for it
        for plugin in settings.plugins.values():
            try:
                plugins.examine(plugin)
            except ConfigError as error:
                findings.extend(f"{path}: {finding}" for finding in error.findings)

    quiet_libraries()
    with redirect_stdout(sys.stderr):  # stdout is for the result, whatever an import prints
        asyncio.run(examine())
    if findings:
        raise ConfigError(findings)
    return settings
