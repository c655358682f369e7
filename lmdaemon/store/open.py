"""Which engine a configuration asks for. The only module that knows them all; each is imported when it is needed."""

from contextlib import AbstractContextManager

from lmdaemon.clock import Clock
from lmdaemon.config.settings import Settings
from lmdaemon.store.contract import Archive, Store
from lmdaemon.store.sqlite.file import COMPANIONS, real_path

__all__ = ["COMPANIONS", "open_archive", "open_store", "real_path"]


async def open_store(settings: Settings, clock: Clock) -> Store:
    """Opens the database and picks up where the last run left it. Raises DatabaseError.

    `count_downtime` adds the wall time since the last transaction to the service clock.
    """
    from lmdaemon.store.sqlite.store import Store as SQLiteStore

    return await SQLiteStore.open(settings.database, clock, count_downtime=settings.count_downtime)


def open_archive(settings: Settings) -> AbstractContextManager[Archive]:
    """What has ended, for a command beside the daemon. Raises DatabaseError, also for what fails inside."""
    from lmdaemon.store.sqlite import archive

    return archive.open_archive(settings.database)
