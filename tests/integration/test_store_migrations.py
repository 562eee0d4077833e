"""Migrations: on both databases, by many at once, and in step with the tables."""

from __future__ import annotations

import asyncio
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import text

from identity_broker.domain.paging import CredentialFilter
from identity_broker.errors import ConfigError, StoreUnavailable
from identity_broker.store import Store, schema
from identity_broker.store.database import Database, Mode
from support.postgres import PostgresServer
from support.store import SettableClock, intent, sqlite_url


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


# What a broker of the first schema wrote, column by column.
_MICROS = 1_893_553_445_678_901
_OLD_ROWS: dict[str, list[dict[str, Any]]] = {
    "spiffe_ids": [
        {"folded": "spiffe://example.org/a", "spelling": "spiffe://example.org/A"},
    ],
    "entries": [
        {
            "id": "old",
            "spiffe_id": "spiffe://example.org/A",
            "parent_id": "spiffe://example.org/idb/node/join_token/web-1",
            "identity_key": "0" * 64,
            "x509_ttl": 300_000_000,
            "jwt_ttl": None,
            "dns_names": '["a.example.org"]',
            "hint": "",
            "hint_key": None,
            "federates_with": "[]",
            "admin": False,
            "downstream": False,
            "disabled": False,
            "expires_at": None,
            "owner": "team",
            "labels": '{"env":"test"}',
            "revision": 7,
            "created_at": _MICROS,
            "updated_at": _MICROS,
        }
    ],
    "entry_selectors": [
        {"entry_id": "old", "type": "rack", "value": "7"},
        {"entry_id": "old", "type": "unix", "value": "uid:one"},
    ],
    "credentials": [
        {
            "id": f"{number:040x}",
            "kind": "x509",
            "state": state,
            "spiffe_id": "spiffe://example.org/A",
            "entry_id": "old",
            "entry_revision": 7,
            "node_id": "spiffe://example.org/idb/node/join_token/web-1",
            "authority_id": "b" * 40,
            "key_fingerprint": "c" * 64,
            "tbs_digest": "d" * 64,
            "not_before": _MICROS,
            "not_after": _MICROS + 3_600_000_000,
            "recorded_at": _MICROS,
            "correlation_id": "e",
            "digest": "" if state == "intent" else "f" * 64,
            "revoked_at": _MICROS if state == "revoked" else None,
            "reason": 1 if state == "revoked" else None,
            "comment": "",
        }
        for number, state in enumerate(["intent", "issued", "superseded", "revoked", "expired"])
    ],
    "outbox": [{"topic": "entry", "key": "old"}],
}


@pytest.mark.parametrize("version", ["0001", "0002"])
async def test_what_an_older_broker_wrote_is_kept(empty_url: str, version: str) -> None:
    database = Database(empty_url, connections=1)
    with database.raw_transaction(Mode.WRITE) as connection:
        command.upgrade(schema.configuration(connection), version)
        for name, rows in _OLD_ROWS.items():
            columns = ", ".join(rows[0])
            marks = ", ".join(f":{column}" for column in rows[0])
            connection.execute(text(f"INSERT INTO {name} ({columns}) VALUES ({marks})"), rows)
    database.close()

    store = Store(empty_url, clock=SettableClock())
    await store.migrate()
    await store.check()
    found = await store.read(lambda repos: repos.entries.get("old"))
    assert (str(found.spiffe_id), found.revision) == ("spiffe://example.org/A", 7)
    assert {str(one) for one in found.selectors} == {"rack:7", "unix:uid:one"}
    assert (found.per_process, found.key_algorithm) == (False, None)
    assert dict(found.labels) == {"env": "test"}
    page = await store.read(lambda repos: repos.credentials.page(CredentialFilter(), "", 10))
    states = [row["state"] for row in _OLD_ROWS["credentials"]]
    assert [one.state.value for one in page.items] == states[::-1]
    assert {one.intent.instance for one in page.items} == {""}
    # And what is written now stands beside it.
    fresh = intent(instance="process 1")
    await store.ledger.intend([fresh])
    await store.write(
        lambda repos: repos.entries.replace(replace(found, per_process=True, owner="other"))
    )
    assert (await store.read(lambda repos: repos.entries.get("old"))).per_process
    read = await store.read(lambda repos: repos.credentials.get(fresh.id))
    assert read.intent.instance == "process 1"
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
