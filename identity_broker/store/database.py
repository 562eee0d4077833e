"""One database, SQLite or PostgreSQL, behind one notion of a transaction.

- A read sees one snapshot. A write is alone: writes run one after the other, in this process by
  a fair queue, across processes by SQLite's write lock or a PostgreSQL advisory lock. So what a
  write reads stays true until it commits, and outbox numbers are in commit order.
- SQLite: WAL, synchronous=FULL, foreign keys on; writes begin with BEGIN IMMEDIATE. The file is
  made with mode 0600 in a folder that only its owner may enter.
- Text that one of the two could not store is a `DataError` on both, before it is sent.
- Nothing waits for ever: locks and statements are bounded, on both databases.
- The ledger's appends do not take the advisory lock: they add rows nobody else writes.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DataError, SQLAlchemyError

from identity_broker.errors import ConfigError, StoreUnavailable
from identity_broker.store.errors import RETRY_AFTER, translate

LOCK_TIMEOUT = 5.0
"""Seconds a write waits for its turn, and for another process's lock."""
STATEMENT_TIMEOUT = 10.0
"""Seconds one PostgreSQL statement may take."""
CONNECT_TIMEOUT = 3
"""Seconds to reach PostgreSQL."""

# Any two constants, as long as they are the same in every broker process.
_WRITE_LOCK = "SELECT pg_advisory_xact_lock(1768186226, 1)"
_MODE = "identity_broker_mode"


class Mode(Enum):
    """What a transaction is for."""

    READ = "read"
    WRITE = "write"
    APPEND = "append"  # the ledger's: a write that only touches ledger rows


class WriteTurn:
    """A lock that is given in the order it was asked for.

    SQLite's own waiting is a sleep-and-retry in which a busy ledger would starve everybody else.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Event] = deque()

    @contextmanager
    def __call__(self, timeout: float) -> Iterator[None]:
        """Hold the turn.

        Raises:
            StoreUnavailable: it did not come within `timeout` seconds.
        """
        self._take(timeout)
        try:
            yield
        finally:
            self._pass_on()

    def _take(self, timeout: float) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._queue.append(mine)
        if mine.wait(timeout):
            return
        with self._guard:
            if not mine.is_set():
                self._queue.remove(mine)
                raise StoreUnavailable(
                    detail=f"no turn to write within {timeout:g} s", retry_after=RETRY_AFTER
                )
        # The turn came in the very moment of giving up: it is ours.

    def _pass_on(self) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._taken = False


class Database:
    """Connections and transactions. Everything here blocks: call it from a store thread.

    Raises:
        ConfigError: the URL names no database the broker can use, or its folder is open to others.
    """

    def __init__(self, url: str, *, connections: int) -> None:
        self.url = parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._turn = WriteTurn()
        self.engine = (_sqlite if self.is_sqlite else _postgresql)(self.url, connections)
        event.listen(self.engine, "before_cursor_execute", _refuse_unstorable)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def transaction(self, mode: Mode) -> Iterator[Connection]:
        """One transaction on a connection of the pool, committed at the end of the block.

        Raises:
            StoreUnavailable, InvariantViolated, MalformedRequest: for every failure of the
                database.
        """
        try:
            with self.raw_transaction(mode) as connection:
                yield connection
        except SQLAlchemyError as error:
            raise translate(error) from error

    @contextmanager
    def raw_transaction(self, mode: Mode) -> Iterator[Connection]:
        """As `transaction`, with SQLAlchemy's own errors."""
        with self.writing(mode), self.connect(mode) as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self, mode: Mode) -> Iterator[None]:
        """Hold this process's turn to write, where the database has one writer."""
        if mode is Mode.READ or not self.is_sqlite:
            yield
            return
        with self._turn(LOCK_TIMEOUT):
            yield

    def connect(self, mode: Mode) -> Connection:
        """A connection whose transactions are of that mode.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: there is none to be had.
        """
        options: dict[str, Any] = {_MODE: mode}
        if not self.is_sqlite:
            options["isolation_level"] = (
                "REPEATABLE READ" if mode is Mode.READ else "READ COMMITTED"
            )
        return self.engine.connect().execution_options(**options)


def parse_url(url: str) -> URL:
    """Read a database URL.

    Raises:
        ConfigError: it names no database the broker can use. The URL itself is not repeated: it
            may hold a password.
    """
    hint = 'store.url looks like "sqlite:////var/lib/idb/broker.db" or "postgresql://user@host/db"'
    try:
        parsed = make_url(url)
        backend, driver = parsed.get_backend_name(), parsed.drivername
    except (ArgumentError, ValueError) as error:
        raise ConfigError("store.url is not a database URL", hint=hint) from error
    if driver in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or driver not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigError("store.url names a database the broker does not speak", hint=hint)
    if not parsed.database or parsed.database == ":memory:" or parsed.query:
        raise ConfigError(
            "store.url must name a file: credentials that are recorded in memory alone are lost",
            hint=hint,
        )
    return parsed.set(drivername="sqlite+pysqlite")


def _sqlite(url: URL, connections: int) -> Engine:
    _prepare_file(Path(url.database or ""))
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=LOCK_TIMEOUT,
        hide_parameters=True,
        connect_args={"timeout": LOCK_TIMEOUT, "cached_statements": 256},
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _postgresql(url: URL, connections: int) -> Engine:
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=LOCK_TIMEOUT,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT,
            "tcp_user_timeout": int(LOCK_TIMEOUT * 1000),
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "application_name": "identity-broker",
        }
        | dict(url.query),
    )
    event.listen(engine, "connect", _configure_postgresql)
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _prepare_file(path: Path) -> None:
    """Make the file with mode 0600, in a folder that nobody else may enter."""
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid not in (os.geteuid(), 0) or stat.S_IMODE(status.st_mode) & 0o077:
            raise ConfigError(
                f'the database folder "{folder}" can be entered by other users',
                hint=f"chmod 700 {folder}",
            )
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(
                f'the database file "{path}" can be opened by other users',
                hint=f"chmod 600 {path}",
            )
    except OSError as error:
        raise ConfigError(
            f'the database file "{path}" cannot be opened: {error.strerror}',
            hint="choose a file this user may write, in store.url",
        ) from error


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver must not begin transactions by itself: `_begin_sqlite` does.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {int(LOCK_TIMEOUT * 1000)}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "cache_size = -32768",
        "temp_store = MEMORY",
        "wal_autocheckpoint = 4000",
        "journal_size_limit = 67108864",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    mode = connection.get_execution_options().get(_MODE, Mode.READ)
    connection.exec_driver_sql("BEGIN" if mode is Mode.READ else "BEGIN IMMEDIATE")


def _configure_postgresql(connection: Any, _record: object) -> None:
    # Not through connect_args["options"]: connection poolers refuse those.
    settings = {
        "statement_timeout": STATEMENT_TIMEOUT,
        "lock_timeout": LOCK_TIMEOUT,
        "idle_in_transaction_session_timeout": 2 * STATEMENT_TIMEOUT,
    }
    with connection.cursor() as cursor:
        for name, seconds in settings.items():
            cursor.execute("SELECT set_config(%s, %s, false)", (name, f"{int(seconds * 1000)}ms"))
    connection.commit()


def _refuse_unstorable(
    _connection: Connection,
    _cursor: object,
    statement: str,
    parameters: Any,
    _context: object,
    executemany: bool,  # noqa: FBT001  # SQLAlchemy's signature
) -> None:
    # PostgreSQL has no NUL in text, SQLite's own functions stop at it; neither driver can encode
    # half a surrogate pair, and then raises what SQLAlchemy does not know as the driver's.
    for row in parameters if executemany else (parameters,):
        for value in row.values() if isinstance(row, dict) else row:
            if isinstance(value, str) and ("\0" in value or not _is_encodable(value)):
                reason = ValueError("a text holds NUL or half a surrogate pair")
                raise DataError(statement, None, reason, hide_parameters=True)


def _is_encodable(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get(_MODE) is Mode.WRITE:
        connection.execute(text(_WRITE_LOCK))
