"""The schema's version: bringing it up to date, and checking that it is.

- Migrations run in one transaction, one process at a time: all of them or none.
- A schema of a newer broker is left alone.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from identity_broker.errors import ConfigError, StoreUnavailable
from identity_broker.store.database import Database, Mode
from identity_broker.store.errors import RETRY_AFTER, translate

PATIENCE = 120.0
"""Seconds a migration, and waiting for another process's, may take."""

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(database: Database) -> None:
    """Bring the schema to the newest version this code knows.

    Raises:
        StoreUnavailable: the database did not answer.
        ConfigError: the schema is a newer broker's.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with database.raw_transaction(Mode.WRITE) as connection:
                _upgrade(connection)
            return
        except OperationalError as error:
            # Another process may be migrating: a lock is worth waiting for, nothing else is.
            if not _is_lock(error) or time.monotonic() > deadline:
                raise translate(error) from error
        except SQLAlchemyError as error:
            raise translate(error) from error


def verify(connection: Connection) -> None:
    """Check that the schema is the one this code works with.

    Raises:
        StoreUnavailable: it is not.
    """
    heads = MigrationContext.configure(connection).get_current_heads()
    if heads != (_newest(),):
        raise StoreUnavailable(
            "the broker's database is not migrated",
            detail=f"schema version {', '.join(heads) or 'none'}, expected {_newest()}",
            hint="starting the broker migrates it: idb server run",
            retry_after=RETRY_AFTER,
        )


def configuration(connection: Connection | None = None) -> Config:
    """Alembic's configuration, with the connection to work on."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection) -> None:
    if MigrationContext.configure(connection).get_current_heads() == (_newest(),):
        return
    if connection.dialect.name == "postgresql":
        # A migration may rightly take longer than any statement of a running broker.
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(PATIENCE * 1000)}")
    try:
        command.upgrade(configuration(connection), "head")
    except CommandError as error:
        raise ConfigError(
            "the database was made by a newer version of the broker",
            detail=str(error),
            hint="run that version, or restore the backup made before it",
        ) from error


@cache
def _newest() -> str:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    head = ScriptDirectory.from_config(configuration()).get_current_head()
    return head or ""


def _is_lock(error: OperationalError) -> bool:
    state = getattr(error.orig, "sqlstate", None)  # 55P03: lock_timeout
    return state == "55P03" or "database is locked" in str(error.orig)
