"""The store when its database is killed, gone, locked, full or hung; and when the broker is."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import event

from identity_broker.domain.credential import CredentialIntent, CredentialState
from identity_broker.domain.paging import CredentialFilter
from identity_broker.errors import StoreUnavailable
from identity_broker.store import Store, ledger
from support.postgres import PostgresServer
from support.store import SettableClock, all_pages, intent, issued, node, put_node, sqlite_url

BOUND = 12.0
"""Seconds within which every call must have an answer."""


async def listed(store: Store) -> set[str]:
    wanted = CredentialFilter()
    pages = await all_pages(store, lambda r, key: r.credentials.page(wanted, key, 1000))
    return {item.id for page in pages for item in page}


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(sqlite_url(tmp_path), clock=SettableClock())
    await opened.migrate()
    yield opened
    await opened.close()


@pytest.fixture
def own_server():
    """A server this test may crash without harm to others."""
    server = PostgresServer()
    server.start()
    yield server
    server.stop()


# --- PostgreSQL ---------------------------------------------------------------------------------


@pytest.mark.postgresql
async def test_postgresql_killed_under_load_loses_nothing_acknowledged(
    own_server: PostgresServer,
) -> None:
    store = Store(own_server.url(), clock=SettableClock())
    await store.migrate()
    acknowledged: list[CredentialIntent] = []
    failures: list[StoreUnavailable] = []
    stop = False

    async def load() -> None:
        while not stop:
            batch = [intent() for _ in range(3)]
            try:
                async with asyncio.timeout(BOUND + 5):
                    await store.ledger.intend(batch)
            except StoreUnavailable as error:
                failures.append(error)
                await asyncio.sleep(0.02)
            else:
                acknowledged.extend(batch)
                store.ledger.conclude([issued(one) for one in batch])

    tasks = [asyncio.ensure_future(load()) for _ in range(4)]
    for _ in range(2):
        await asyncio.sleep(0.5)
        before = len(acknowledged)
        await asyncio.to_thread(own_server.kill)
        await asyncio.sleep(0.3)
        with pytest.raises(StoreUnavailable):
            await store.check()
        with pytest.raises(StoreUnavailable):
            await store.write(lambda r: r.nodes.upsert(node()))
        await asyncio.to_thread(own_server.start)
        deadline = time.monotonic() + 20
        while len(acknowledged) == before and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert len(acknowledged) > before, "it recovers by itself"
        await store.check()
    stop = True
    await asyncio.gather(*tasks)
    await store.ledger.flush()
    assert failures
    assert all(failure.retry_after for failure in failures)
    assert {one.id for one in acknowledged} <= await listed(store)
    page = await store.read(
        lambda r: r.credentials.page(
            CredentialFilter(states=frozenset({CredentialState.INTENT})), "", 1000
        )
    )
    unanswered = {item.id for item in page.items}
    assert not unanswered & {one.id for one in acknowledged}, "outcomes outlive the outage"
    await store.close()


@pytest.mark.postgresql
async def test_a_postgresql_that_hangs_is_given_up_on(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PATIENCE", 2.0)
    store = Store(own_server.url(), clock=SettableClock())
    await store.migrate()
    await store.ledger.intend([intent()])
    with closing(psycopg.connect(own_server.url())) as blocker:
        blocker.execute("LOCK TABLE credentials IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.ledger.intend([intent()])
        assert time.monotonic() - started < BOUND
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        while True:
            try:
                await store.ledger.intend([intent()])
                break
            except StoreUnavailable:
                await asyncio.sleep(0.1)
    await store.close()


async def test_a_postgresql_that_was_never_there_is_unavailable() -> None:
    store = Store("postgresql://nobody:hunter2@127.0.0.1:1/none", clock=SettableClock())
    await store.open()
    started = time.monotonic()
    for call in (store.check(), store.changes.latest(), store.ledger.intend([intent()])):
        with pytest.raises(StoreUnavailable) as refused:
            await call
        assert "hunter2" not in str(refused.value)
    with pytest.raises(StoreUnavailable):
        await store.migrate()
    assert time.monotonic() - started < BOUND
    await store.close()


# --- SQLite -------------------------------------------------------------------------------------


async def test_a_locked_sqlite_is_unavailable_and_recovers(
    sqlite_store: Store, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "broker.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        one = intent()
        started = time.monotonic()
        results = await asyncio.gather(
            sqlite_store.ledger.intend([one]),
            sqlite_store.write(lambda r: r.nodes.upsert(node())),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [StoreUnavailable] * 2
        assert time.monotonic() - started < BOUND
        assert await listed(sqlite_store) == set(), "reading goes on"
        other.execute("ROLLBACK")
    await sqlite_store.ledger.intend([one])
    assert await listed(sqlite_store) == {one.id}


async def test_a_full_disk_refuses_intents(sqlite_store: Store) -> None:
    one = intent()
    await sqlite_store.ledger.intend([one])

    # SQLite's own limit gives the very error of a full disk, on every later connection.
    def limit(connection: sqlite3.Connection, _record: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    event.listen(sqlite_store._database.engine, "connect", limit)
    sqlite_store.ledger._disconnect()
    acknowledged = {one.id}
    with pytest.raises(StoreUnavailable, match="full"):
        for _ in range(50):
            batch = [intent() for _ in range(50)]
            await sqlite_store.ledger.intend(batch)
            acknowledged |= {each.id for each in batch}
    assert await listed(sqlite_store) == acknowledged

    event.remove(sqlite_store._database.engine, "connect", limit)
    sqlite_store._database.engine.dispose()
    await sqlite_store.ledger.intend([intent()])


async def test_a_read_only_sqlite_refuses_intents_and_outcomes_outlive_it(
    sqlite_store: Store,
) -> None:
    one = intent()
    await sqlite_store.ledger.intend([one])

    def freeze(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA query_only = ON")

    event.listen(sqlite_store._database.engine, "connect", freeze)
    sqlite_store._database.engine.dispose()
    sqlite_store.ledger._disconnect()
    sqlite_store.ledger.conclude([issued(one)])
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await sqlite_store.ledger.flush()
    with pytest.raises(StoreUnavailable):
        await sqlite_store.ledger.intend([intent()])
    with pytest.raises(StoreUnavailable, match="readonly"):
        await sqlite_store.write(lambda r: r.nodes.upsert(node()))
    event.remove(sqlite_store._database.engine, "connect", freeze)
    sqlite_store._database.engine.dispose()
    await sqlite_store.ledger.flush()
    found = await sqlite_store.read(lambda r: r.credentials.get(one.id))
    assert found.state is CredentialState.ISSUED


async def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    (tmp_path / "broker.db").write_bytes(b"this is not a database, whatever its name says\n" * 99)
    (tmp_path / "broker.db").chmod(0o600)
    store = Store(url, clock=SettableClock())
    with pytest.raises(StoreUnavailable):
        await store.migrate()
    await store.close()


async def test_writers_are_not_starved_by_a_busy_ledger(sqlite_store: Store) -> None:
    stop = False

    async def load() -> None:
        while not stop:
            await sqlite_store.ledger.intend([intent() for _ in range(50)])

    tasks = [asyncio.ensure_future(load()) for _ in range(8)]
    await asyncio.sleep(0.2)
    started = time.monotonic()
    for number in range(5):
        await sqlite_store.write(put_node(f"n{number}"))
    took = time.monotonic() - started
    stop = True
    await asyncio.gather(*tasks)
    assert took < 4


# --- the broker itself --------------------------------------------------------------------------

_CHILD = """
import asyncio, sys
sys.path[:0] = sys.argv[2].split(":")
from identity_broker.store import Store
from support.store import SettableClock, intent, issued

async def main():
    store = Store(sys.argv[1], clock=SettableClock())
    await store.open()

    async def load():
        while True:
            batch = [intent(), intent()]
            await store.ledger.intend(batch)
            for one in batch:
                print(one.id, flush=True)
            store.ledger.conclude([issued(one) for one in batch])

    print("ready", flush=True)
    await asyncio.gather(*[load() for _ in range(4)])

asyncio.run(main())
"""


@pytest.mark.parametrize("milliseconds", [50, 400])
def test_a_killed_process_has_recorded_all_it_acknowledged(
    store_url: str, milliseconds: int
) -> None:
    support = str(Path(__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, store_url, support],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(milliseconds / 1000)
    os.kill(child.pid, signal.SIGKILL)
    output, _ = child.communicate(timeout=30)
    # The last line may be cut short by the kill.
    acknowledged = {line for line in output.split("\n")[:-1] if line}

    async def reopened() -> set[str]:
        store = Store(store_url, clock=SettableClock())
        await store.open()
        await store.check()
        found = await listed(store)
        await store.ledger.intend([intent()])
        await store.close()
        return found

    recorded = asyncio.run(reopened())
    assert acknowledged <= recorded
    assert recorded or milliseconds < 400, "the child did issue something"
