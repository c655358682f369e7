"""`lmdaemon serve`, which runs the daemon to its end, and `lmdaemon check-config`.

The daemon's modules are imported only after the configuration was found to be valid.
"""

import argparse
import asyncio
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdaemon import log, threads, tls
from lmdaemon.commands.arguments import JSON, command
from lmdaemon.commands.shared import (
    FAILED,
    MISCONFIGURED,
    STOPPED,
    log_loop_error,
    print_json,
    quiet_libraries,
    reason,
    say,
)
from lmdaemon.config import reader
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.secrets import exists
from lmdaemon.config.settings import Settings
from lmdaemon.log import Log

if TYPE_CHECKING:
    from lmdaemon.daemon import Daemon

STOPPED_WITHIN_S = 1.0  # the longest time from a signal during the start to the end of the process
ABANDON_AFTER_S = 1.0  # how long the end of the process waits for what plug-ins have left running

# The garbage collector runs each time when the number of objects has grown by this many. Almost all objects of a
# request are freed without the collector. With Python's default of 700 it would find only objects that are still in
# use, and would take 16 % of a touch's CPU time.
GARBAGE = 10_000

# Python's switch interval: how long the event loop may keep the interpreter's lock from the writer's thread, which
# needs it after each statement. With the default of 5 ms, a transaction under load takes three times what SQLite needs.
SWITCH_S = 0.0002


@command()
def serve(args: argparse.Namespace) -> int:
    """Runs the daemon until it is stopped or fails, and returns the exit code."""
    sys.setswitchinterval(SWITCH_S)
    _raise_file_limit()
    # Off until _keep_what_is_made. A start creates almost no garbage, and takes a sixth less time without the collector
    gc.disable()
    code = FAILED
    try:
        settings = reader.for_daemon(args.config)
        log.setup(settings.log.level, settings.log.format)
        quiet_libraries()
        # Closing the loop runs what plug-ins have left in it, which may raise these once more
        with suppress(SystemExit, KeyboardInterrupt), asyncio.Runner(loop_factory=_loop_factory()) as runner:
            code = _until_ended(runner.get_loop(), settings)
            _abandon_what_hangs(runner.get_loop(), code)
    finally:
        gc.enable()
    return code


def _raise_file_limit() -> None:
    """Raises the limit of open files to the hard limit, because every connection needs one.

    The soft limit, often 1,024, exists for programs that use select(2).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where the system refuses, the listeners allow fewer connections
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_what_is_made() -> None:
    """Excludes the daemon's own 45,000 objects from garbage collection, and turns the collector on.

    These objects exist until the daemon ends. A full collection that examines them takes 30 to 60 ms, during which
    nothing else runs.
    """
    gc.freeze()
    gc.set_threshold(GARBAGE)
    gc.enable()


def _until_ended(loop: asyncio.AbstractEventLoop, settings: Settings) -> int:
    """Runs the daemon to its end, logs why it ended, and returns the exit code."""
    with tls.system_certificates_unread():
        from lmdaemon.daemon import Daemon
    from lmdaemon.store.contract import DatabaseError, StoreError

    daemon = Daemon(settings, on_serving=_keep_what_is_made)
    _take_signals(daemon, loop)
    try:
        _run_to_its_end(loop, daemon.run())
    except ConfigError as error:  # raised while a plug-in was loaded; its findings do not name the file
        for finding in error.findings:
            say(f"{settings.named}: {finding}")
        return MISCONFIGURED
    except (DatabaseError, StoreError, OSError) as error:
        Log("daemon").error("daemon.failed", reason=reason(error))
        return FAILED
    # An ExceptionGroup if a loop has failed. The service manager starts the daemon again
    except BaseException as error:
        lost = _database_lost(error)
        if lost is None:
            Log("daemon").exception("daemon.crashed")
        else:
            Log("daemon").error("daemon.failed", reason=str(lost))
        return FAILED
    return STOPPED


def _run_to_its_end(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` on the event loop until it has ended, and raises what it raises.

    A SystemExit or KeyboardInterrupt in another task or in a callback, which only a plug-in can raise, ends the run of
    the loop. Everything else is still queued then, so the loop is run again.
    """
    task = loop.create_task(work)
    task.add_done_callback(lambda _: loop.stop())
    while not task.done():
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            if not task.done():
                log_loop_error(error)
    task.result()


def _take_signals(daemon: "Daemon", loop: asyncio.AbstractEventLoop) -> None:
    """Handles signals while the daemon starts. Once it serves, the daemon has handlers of its own.

    A stop has STOPPED_WITHIN_S to close what was opened. Then the process exits, whatever it is doing (a migration, a
    plug-in that blocks). That is safe: nothing was acknowledged yet, and the next start recovers as after a kill.
    """

    def stop(*_: object) -> None:
        at_last = threading.Timer(STOPPED_WITHIN_S, os._exit, (STOPPED,))
        at_last.daemon = True
        at_last.start()
        loop.call_soon_threadsafe(daemon.stop)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(daemon.reload))


def _database_lost(error: BaseException) -> BaseException | None:
    """The DatabaseError, if it is the only exception in a group (the database file was taken away); else None."""
    from lmdaemon.store.contract import DatabaseError

    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, DatabaseError) else None


def _abandon_what_hangs(loop: asyncio.AbstractEventLoop, code: int) -> None:
    """Cancels the tasks of plug-ins. Has the process exit ABANDON_AFTER_S later at the latest.

    asyncio and the interpreter would wait for ever for a task that ignores its cancellation, a thread, an asynchronous
    generator, a function registered with atexit. By now the daemon has closed everything.
    """
    left_threads = threads.of_others()
    left_tasks = asyncio.all_tasks(loop)

    def abandon() -> None:
        hooks = sum(not task.done() for task in left_tasks)
        running = sum(thread.is_alive() for thread in left_threads)
        try:
            Log("daemon").warning("daemon.abandoned_hooks", count=hooks, threads=running)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also if the streams cannot be written to
            os._exit(code)

    async def end_all() -> None:
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await loop.shutdown_asyncgens()

    at_last = threading.Timer(ABANDON_AFTER_S, abandon)
    at_last.daemon = True  # the interpreter does not wait for it, and it still runs during atexit's functions
    try:
        at_last.start()
    except RuntimeError:  # no thread can be started, as when a plug-in has used up all that the process may have
        abandon()
    _run_to_its_end(loop, end_all())


def _loop_factory() -> Callable[[], Any] | None:
    """uvloop's event loop where it is installed; None stands for asyncio's own."""
    try:
        factory: Callable[[], Any] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


@command(JSON)
def check_config(args: argparse.Namespace) -> int:
    """Prints what is wrong with the configuration. Exit code 2 if anything is."""
    path: Path | None = None
    errors: Sequence[str] = ()
    warnings: Sequence[str] = ()
    try:
        path, found = reader.find(args.config)
        settings = _checked(path, found=found)
        warnings = (*settings.warnings, *_missing_directory(settings))
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


def _missing_directory(settings: Settings) -> list[str]:
    """The warning that the database's directory does not exist: the daemon makes the file, but no directory."""
    directory = settings.database.absolute().parent
    missing = settings.postgres is None and not exists(directory)
    return [f"database.path: the directory {directory} does not exist"] if missing else []


def _checked(path: Path, *, found: bool) -> Settings:
    """The settings, after their plug-ins were imported and examined but not called.

    Raises ConfigError with every finding.
    """
    from lmdaemon import plugins

    settings = reader.load(path, found=found, secrets="readable")
    findings: list[str] = []

    async def examine() -> None:  # a plug-in may need a running event loop when it is imported; the daemon has one
        for plugin in settings.plugins.values():
            try:
                plugins.examine(plugin)
            except ConfigError as error:
                findings.extend(f"{path}: {finding}" for finding in error.findings)

    quiet_libraries()
    # Ctrl-C ends the process at once, because a KeyboardInterrupt would be taken for the plug-in's
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(FAILED))
    with redirect_stdout(sys.stderr):  # an imported module may print, but stdout is for the result
        asyncio.run(examine())
    if findings:
        raise ConfigError(findings)
    return settings
