"""Loads plug-ins by dotted name, and calls them so that their failures affect nothing else.

A plug-in runs in the daemon's event loop. It may hang, raise anything or ignore its cancellation; but a call that
blocks the loop without awaiting blocks the daemon, and this module cannot prevent it.
"""

import asyncio
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Plugin
from lmdaemon.log import Log, place
from lmdaemon.model import Notice, Refuse, SessionEnded

log = Log("plugins")

# The texts of these exceptions name a module, an attribute or a key, so they may be shown
_NAMING = (ImportError, AttributeError, NameError, SyntaxError, TypeError, KeyError)

SERVICE_PLACE = "/usr/local/lib/lmdaemon"  # where an installed service looks for plug-ins, by a .pth file
CANCEL_S = 1.0  # how long a cancelled hook may take to clean up


class PluginFailed(Exception):  # noqa: N818 - an expected result, which the caller judges
    """A hook raised or ran into its time-out. The text is a short reason without secrets."""


def _to_nobody() -> None: ...


class LoadedPlugin:
    """One `[plugins.NAME]`, ready to be called.

    `stray` is the number of calls that have ignored their cancellation and still run. `freed` is called whenever one of
    them has ended.
    """

    def __init__(self, settings: Plugin, hook: Any, freed: Callable[[], None] = _to_nobody) -> None:
        self.settings = settings
        self._session_ended: Callable[[SessionEnded], Awaitable[None]] = getattr(hook, "session_ended", hook)
        self._check: Callable[[Notice], Awaitable[None]] | None = getattr(hook, "check", None)
        self._start: Callable[[], Awaitable[None]] | None = getattr(hook, "start", None)
        self._stop: Callable[[], Awaitable[None]] | None = getattr(hook, "stop", None)
        self.stray = 0
        self._freed = freed

    @property
    def name(self) -> str:
        """The NAME of the plug-in's table `[plugins.NAME]`."""
        return self.settings.name

    @property
    def checks(self) -> bool:
        """Whether the plug-in has the hook `check`."""
        return self._check is not None

    async def start(self) -> None:
        """Calls the plug-in's hook `start`, if there is one. Raises ConfigError."""
        if self._start is None:
            return
        try:
            await self._contained(self._start)
        except PluginFailed as error:
            where = f" at {place(error.__cause__)}" if error.__cause__ is not None else ""
            raise ConfigError([f"plugins.{self.name}: start() failed: {error}{where}"]) from error

    async def stop(self) -> None:
        """Calls the plug-in's hook `stop`, if there is one. A failure is logged."""
        if self._stop is None:
            return
        try:
            await self._contained(self._stop)
        except PluginFailed as error:
            log.warning("plugin.stop_failed", plugin=self.name, reason=str(error))

    async def session_ended(self, event: SessionEnded) -> None:
        """Calls the plug-in's hook `session_ended`. Raises PluginFailed."""
        await self._contained(partial(self._session_ended, event))

    async def check(self, notice: Notice) -> None:
        """Calls the plug-in's hook `check` with a notice that is not accepted yet.

        Raises Refuse, if the hook does, or PluginFailed.
        """
        if self._check is None:
            return
        if self.stray >= self.settings.policy.concurrency:
            raise PluginFailed("too many calls ignore their cancellation")  # otherwise each notice would add one
        try:
            await self._contained(partial(self._check, notice))
        except PluginFailed as failure:
            if isinstance(failure.__cause__, Refuse):
                raise _remade(failure.__cause__) from failure
            raise

    async def _contained(self, call: Callable[[], Awaitable[None]]) -> None:
        """Calls a hook, with its time-out. Raises PluginFailed from whatever the hook raised."""
        task = asyncio.ensure_future(_caught(call))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.settings.policy.timeout_s)
            if not done:
                task.cancel()
                done, _ = await asyncio.wait({task}, timeout=CANCEL_S)
                self._watch(task)
                raise PluginFailed("timeout")
        except asyncio.CancelledError:
            task.cancel()
            raise
        error = task.result()
        if error is not None:
            raise PluginFailed(type(error).__name__) from error

    def _watch(self, task: "asyncio.Future[Any]") -> None:
        if task.done():
            return
        self.stray += 1
        log.warning("plugin.ignores_cancellation", plugin=self.name, running=self.stray)

        def ended(_: object) -> None:
            self.stray -= 1
            self._freed()

        task.add_done_callback(ended)


async def _caught(call: Callable[[], Awaitable[None]]) -> BaseException | None:
    """Calls a hook and returns what it raised, or None. Raised in a task, a SystemExit would end the event loop."""
    try:
        await call()
    except BaseException as error:
        return error
    return None


def _remade(refusal: Refuse) -> Refuse:
    """A plain Refuse with the same meaning and text, encodable as UTF-8. Raises PluginFailed.

    A plug-in may raise a subclass without a meaning, or with a text that no answer can contain.
    """
    try:
        return Refuse(refusal.meaning, str(refusal.description).encode(errors="replace").decode())
    except BaseException as error:
        raise PluginFailed(type(error).__name__) from error


def load(settings: Plugin, freed: Callable[[], None] = _to_nobody) -> LoadedPlugin:
    """Imports and makes one plug-in; `freed` as in LoadedPlugin. Raises ConfigError, which names the plug-in."""
    target = examine(settings)
    if not inspect.isclass(target):
        return LoadedPlugin(settings, target, freed)
    make: Callable[[dict[str, Any]], Any] = target
    with _naming(settings, "cannot be made"):
        hook = make(deepcopy(dict(settings.options)))  # a copy, because a reload compares the options with the file's
        _check_hooks(settings, hook)  # again, because an instance may have other hooks than its class
        return LoadedPlugin(settings, hook, freed)


def examine(settings: Plugin) -> Any:
    """Imports one plug-in and checks its hooks without calling any. Returns the function or class.

    Raises ConfigError, which names the plug-in.
    """
    module_name, _, attribute = settings.use.partition(":")
    with _naming(settings, "cannot be imported"):
        importlib.invalidate_caches()  # the module may have been installed since the last import
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
        if inspect.isclass(target):
            _check_hooks(settings, target)
        elif not _is_async(target):
            raise _broken(settings, "must be an async function or a class with one named session_ended")
    return target


@contextmanager
def _naming(settings: Plugin, cannot: str) -> Iterator[None]:
    """Raises ConfigError for whatever the plug-in's code raises. A signal raises nothing here: see `commands.serve`."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        raise _broken(settings, f"{cannot}: {_why(error)}") from error


def _check_hooks(settings: Plugin, hook: Any) -> None:
    """Raises ConfigError unless the hooks of a class or of an instance are async."""
    if not _is_async(getattr(hook, "session_ended", None)):
        raise _broken(settings, "must have an async method session_ended(event)")
    for name in ("start", "stop", "check"):
        method = getattr(hook, name, None)
        if method is not None and not _is_async(method):
            raise _broken(settings, f"{name} must be async")


def _is_async(hook: object) -> bool:
    call = hook if inspect.isroutine(hook) else getattr(hook, "__call__", None)  # noqa: B004 - the method itself
    return inspect.iscoroutinefunction(call)


def _why(error: BaseException) -> str:
    """Type and place of an exception of a plug-in's code; its text is left out unless it only names something.

    The text may quote an option, or a secret that the plug-in has read.
    """
    kind = type(error).__name__
    where = f"; modules are looked for in {_places()}" if isinstance(error, ModuleNotFoundError) else ""
    return f"{kind}: {error}{where}" if isinstance(error, _NAMING) else f"{kind} at {place(error)}"


def _places() -> str:
    """Where a plug-in's modules may be, in words: as docs/plugins.md says, as far as it is so for this process."""
    places = [SERVICE_PLACE] if SERVICE_PLACE in sys.path else []
    if not sys.flags.ignore_environment:
        places.append("the directories of $PYTHONPATH")
    return ", ".join([*places, f"the Python environment {sys.prefix}"])


def _broken(settings: Plugin, finding: str) -> ConfigError:
    return ConfigError([f"plugins.{settings.name}.use: {finding} (got {settings.use!r})"])


async def start_all(loaded: list[LoadedPlugin]) -> None:
    """Starts plug-ins in order. When one fails, those already started are stopped. Raises ConfigError."""
    started: list[LoadedPlugin] = []
    try:
        for plugin in loaded:
            await plugin.start()
            started.append(plugin)
    except BaseException:
        await stop_all(started)
        raise


async def stop_all(loaded: list[LoadedPlugin]) -> None:
    """Stops plug-ins in reverse order."""
    for plugin in reversed(loaded):
        await plugin.stop()
