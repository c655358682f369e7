"""Chooses the engine that the configuration asks for. It is the only module that knows all engines, and imports one
when it is needed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from lmdaemon.clock import Clock
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Postgres, Settings
from lmdaemon.limits import StoreLimits
from lmdaemon.store.contract import Archive, Moved, Store
from lmdaemon.store.sqlite.file import COMPANIONS, real_path

__all__ = ["COMPANIONS", "import_file", "migrate", "name_of", "open_archive", "open_store", "real_path"]


async def open_store(settings: Settings, clock: Clock, name: str, limits: StoreLimits) -> Store:
    """Opens the database as the last run left it. Raises DatabaseError, and ConfigError if the database's own settings
    could lose what was acknowledged.

    `name` is the daemon's, by which others on the database know it. The setting `count_downtime` adds the wall time
    since the last transaction to the service clock.
    """
    asked = settings.postgres
    if asked is None:
        from lmdaemon.store.sqlite.store import Store as SQLiteStore

        return await SQLiteStore.open(
            settings.database, clock, name=name, count_downtime=settings.count_downtime, limits=limits
        )
    from lmdaemon.store.postgres.migrations import UnsafeSettingError
    from lmdaemon.store.postgres.store import Store as PostgresStore

    try:
        return await PostgresStore.open(
            asked.url,
            clock,
            name=name,
            password=asked.password,
            may_migrate=asked.migrate,
            count_downtime=settings.count_downtime,
            restart_grace_ms=round(settings.restart_grace_s * 1000),
            limits=limits,
        )
    except UnsafeSettingError as error:
        raise ConfigError([f"database.url: {error}"]) from error


def name_of(settings: Settings) -> str:
    """The database in words, for logs: its file, or server and name."""
    if settings.postgres is None:
        return str(settings.database)
    from lmdaemon.store.postgres.thread import title_of

    return title_of(settings.postgres.url)


def open_archive(settings: Settings) -> AbstractContextManager[Archive]:
    """Opens the ended sessions for a command that runs beside the daemon. Raises DatabaseError, also for errors inside
    the context.
    """
    if settings.postgres is not None:
        from lmdaemon.store.postgres import archive as postgres_archive

        return postgres_archive.open_archive(settings.postgres.url, settings.postgres.password)
    from lmdaemon.store.sqlite import archive

    return archive.open_archive(settings.database)


def import_file(asked: Postgres, file: Path, now_at: int, progress: Callable[[int, int], None]) -> Moved:
    """Moves a stopped daemon's file into an empty PostgreSQL database; no daemon can use the file afterwards.
    `progress` is called with the number of rows moved so far, and the number of all rows. Raises DatabaseError.
    """
    from lmdaemon.store.postgres import importing
    from lmdaemon.store.sqlite.whole import open_whole

    with open_whole(file) as whole:
        return importing.move(asked.url, asked.password, whole, now_at, progress)


def migrate(asked: Postgres, progress: Callable[[int, int], None]) -> list[int]:
    """Brings the schema of a PostgreSQL database to the newest version. Returns the versions that were added.
    `progress` is called with the number of steps done so far, and the number of all steps. Raises DatabaseError.
    """
    from lmdaemon.store.postgres import migrations

    return migrations.migrate_database(asked.url, asked.password, progress)
