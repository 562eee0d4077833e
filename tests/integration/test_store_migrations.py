"""Migrations: on both databases, by many at once, and in step with the tables."""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text

from identity_broker.errors import ConfigError, StoreUnavailable
from identity_broker.store import Store, schema
from identity_broker.store.database import Database, Mode
from support.postgres import PostgresServer
from support.store import SettableClock, sqlite_url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgresql)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "sqlite":
        yield sqlite_url(tmp_path)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    server.execute("CREATE DATABASE unmigrated")
    yield server.url("unmigrated")
    server.execute("DROP DATABASE unmigrated WITH (FORCE)")


def migrate(url: str) -> None:
    async def run() -> None:
        store = Store(url, clock=SettableClock())
        await store.migrate()
        await store.check()
        await store.close()

    asyncio.run(run())


def test_tables_and_migrations_agree(store_url: str) -> None:
    database = Database(store_url, connections=1)
    try:
        with database.raw_transaction(Mode.WRITE) as connection:
            command.check(schema.configuration(connection))  # raises when they do not
    finally:
        database.close()


async def test_an_unmigrated_database_is_not_ready(empty_url: str) -> None:
    store = Store(empty_url, clock=SettableClock())
    await store.open()
    with pytest.raises(StoreUnavailable, match="not migrated"):
        await store.check()
    with pytest.raises(StoreUnavailable):
        await store.read(lambda r: r.nodes.all())
    await store.migrate()
    await store.check()
    await store.migrate()
    await store.close()


def test_processes_that_migrate_at_once_do_not_get_in_each_others_way(empty_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=migrate, args=(empty_url,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


async def test_a_newer_brokers_database_is_left_alone(store_url: str) -> None:
    store = Store(store_url, clock=SettableClock())
    await store.open()
    with store._database.raw_transaction(Mode.WRITE) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer version"):
        await store.migrate()
    with pytest.raises(StoreUnavailable):
        await store.check()
    await store.close()


def test_the_first_migration_can_be_undone(store_url: str) -> None:
    database = Database(store_url, connections=1)
    try:
        with database.raw_transaction(Mode.WRITE) as connection:
            command.downgrade(schema.configuration(connection), "base")
            connection.execute(text("SELECT * FROM alembic_version"))
        migrate(store_url)
    finally:
        database.close()


def test_the_migrations_are_part_of_the_package() -> None:
    folder = Path(schema.__file__).parent / "migrations"
    assert {path.name for path in folder.iterdir()} >= {"__init__.py", "env.py", "versions"}
