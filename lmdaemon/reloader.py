"""The settings in force and their plug-ins, and how a new reading of the configuration file replaces them."""

from collections.abc import Callable, Mapping

from lmdaemon import log, plugins
from lmdaemon.clock import Clock
from lmdaemon.config import reader, shown
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import NEEDS_RESTART, Plugin, Settings, changes, taken_over
from lmdaemon.model import rfc3339
from lmdaemon.plugins import LoadedPlugin
from lmdaemon.threads import on_a_thread

events = log.Log("daemon")


class Reloader:
    """Keeps the settings in force and the plug-ins made from them. A reload that fails changes nothing; keys that need
    a restart keep their values.

    `take_over` is called with the digest of the settings when they were replaced; `freed` as in LoadedPlugin.
    """

    def __init__(
        self, settings: Settings, clock: Clock, take_over: Callable[[str], None], freed: Callable[[], None]
    ) -> None:
        self.settings = settings
        self._clock = clock
        # The settings of the start, whose values stay in force for keys that need a restart (NEEDS_RESTART)
        self._started_with = settings
        self.plugins: Mapping[str, LoadedPlugin] = {}
        self.error: str | None = None  # why and when the last reload failed, a line for each finding
        self._take_over = take_over
        self._freed = freed

    async def start_plugins(self) -> None:
        """Makes and starts the plug-ins. Raises ConfigError."""
        self.plugins = await self._plugins_of(self.settings)

    async def stop_plugins(self) -> None:
        """Stops the plug-ins."""
        await plugins.stop_all(list(self.plugins.values()))

    async def reload(self) -> bool:
        """Reads the file again. Takes it over and returns True; or changes nothing, logs why, and returns False."""
        try:
            new = await on_a_thread(self.read_again)
            fresh = await self._plugins_of(new)
        except ConfigError as error:
            self._note_failure(error)
            return False
        for key in await on_a_thread(lambda: list(changes(self._started_with, new))):
            if key in NEEDS_RESTART:
                events.warning("config.needs_restart", key=key)
        in_force = taken_over(new, self._started_with)
        changed = await on_a_thread(lambda: list(changes(self.settings, in_force)))
        digest = await on_a_thread(shown.digest, in_force)
        gone = [plugin for name, plugin in self.plugins.items() if fresh.get(name) is not plugin]
        self.settings, self.plugins, self.error = in_force, fresh, None
        log.setup(new.log.level, new.log.format)
        self._take_over(digest)
        await plugins.stop_all(gone)
        note = f"as systemd handed them over at the start: {', '.join(new.handed_over)}" if new.handed_over else None
        events.info("config.reloaded", changed=",".join(changed) or "nothing", note=note)
        return True

    def _note_failure(self, error: ConfigError) -> None:
        file = f"{self.settings.named}: "  # findings about plug-ins do not begin with the name of the file
        findings = [file + finding.removeprefix(file) for finding in error.findings]
        refused = f"refused at {rfc3339(self._clock.wall_ms())[:19]}Z: the settings from before are in force"
        self.error = log.writable("\n".join([*findings, refused]))
        for finding in findings:
            events.error("config.reload_failed", finding=finding)

    def read_again(self) -> Settings:
        """The configuration as it is in the file now. Must run on a thread: with 1,000 operators it takes 0.2 s.

        Raises ConfigError.
        """
        return reader.load(self.settings.file, found=self.settings.found, named=self.settings.named)

    async def _plugins_of(self, new: Settings) -> dict[str, LoadedPlugin]:
        """The plug-ins of new settings: unchanged ones are kept, the others are made and started.

        Raises ConfigError.
        """
        kept = {
            name: plugin
            for name, plugin in self.plugins.items()
            if name in new.plugins and _same_hook(plugin.settings, new.plugins[name])
        }
        made = [plugins.load(plugin, self._freed) for name, plugin in new.plugins.items() if name not in kept]
        await plugins.start_all(made)
        for name, plugin in kept.items():
            plugin.settings = new.plugins[name]
        by_name = kept | {plugin.name: plugin for plugin in made}
        return {name: by_name[name] for name in new.plugins}


def _same_hook(one: Plugin, other: Plugin) -> bool:
    return (one.use, dict(one.options)) == (other.use, dict(other.options))
