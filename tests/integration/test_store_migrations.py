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
from sqlalchemy.exc import IntegrityError

from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.events import Topic
from identity_broker.domain.paging import CredentialFilter
from identity_broker.errors import ConfigError, StoreUnavailable
from identity_broker.store import Store, schema
from identity_broker.store.database import Database, Mode
from support.postgres import PostgresServer
from support.store import SettableClock, hold, intent, revoking, sqlite_url


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


@pytest.mark.parametrize("version", ["0001", "0002", "0004"])
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
    assert {one.order_id for one in page.items} == {found.held_by} == {""}
    # And what is written now stands beside it.
    fresh = intent(instance="process 1")
    await store.ledger.intend([fresh])
    await store.write(
        lambda repos: repos.entries.replace(replace(found, per_process=True, owner="other"))
    )
    assert (await store.read(lambda repos: repos.entries.get("old"))).per_process
    read = await store.read(lambda repos: repos.credentials.get(fresh.id))
    assert read.intent.instance == "process 1"
    # The checks it was made with know neither this reason nor this topic.
    await store.write(revoking(f"serial={fresh.id}", RevocationReason.CERTIFICATE_HOLD))
    await store.write(lambda repos: repos.holds.place(hold()))
    changes = await store.changes.after(0)
    assert changes[0].seq == 1
    assert [change.topic for change in changes] == [
        *(Topic.ENTRY, Topic.ENTRY, Topic.REVOCATION, Topic.HOLD)
    ]
    await store.close()


async def test_widening_a_check_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path), connections=1)
    with database.raw_transaction(Mode.WRITE) as connection:
        command.upgrade(schema.configuration(connection), "0004")
        for name, rows in _OLD_ROWS.items():
            marks = ", ".join(f":{column}" for column in rows[0])
            insertion = f"INSERT INTO {name} ({', '.join(rows[0])}) VALUES ({marks})"
            connection.execute(text(insertion), rows)
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    with database.raw_transaction(Mode.WRITE) as connection:
        command.upgrade(schema.configuration(connection), "head")
    with database.raw_transaction(Mode.READ) as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        catalogue = "SELECT name, sql FROM sqlite_master WHERE type = 'table'"
        stored = {row.name: row.sql for row in connection.exec_driver_sql(catalogue)}
        assert "reason BETWEEN 0 AND 10" in stored["credentials"]
        assert "AUTOINCREMENT" in stored["credentials"]
        assert "AUTOINCREMENT" in stored["outbox"]
        grown = connection.exec_driver_sql("PRAGMA page_count").scalar_one() - pages
        assert grown < 25, "new tables, and no second ledger"
    for wrong in (
        "UPDATE credentials SET reason = 11 WHERE reason IS NOT NULL",
        "UPDATE outbox SET topic = ''",
    ):
        with (
            pytest.raises(IntegrityError),
            database.raw_transaction(Mode.WRITE) as connection,
        ):
            connection.exec_driver_sql(wrong)
    database.close()


async def test_a_ledger_that_another_tool_made_is_not_edited(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path), connections=1)
    with database.raw_transaction(Mode.WRITE) as connection:
        command.upgrade(schema.configuration(connection), "0004")
        connection.exec_driver_sql("DROP TABLE outbox")
        connection.exec_driver_sql("CREATE TABLE outbox (seq INTEGER PRIMARY KEY, topic, key)")
    with (
        pytest.raises(RuntimeError, match="ck_outbox_topic"),
        database.raw_transaction(Mode.WRITE) as connection,
    ):
        command.upgrade(schema.configuration(connection), "head")
    with database.raw_transaction(Mode.READ) as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        tables = connection.exec_driver_sql("SELECT name FROM sqlite_master").scalars().all()
        assert "holds" not in tables
    database.close()


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
