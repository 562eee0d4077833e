"""What the store refuses before it touches a database."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from identity_broker.errors import ConfigError, StoreUnavailable
from identity_broker.store import Store
from identity_broker.store.database import parse_url
from support.store import SettableClock, sqlite_url


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "mysql://root:hunter2@localhost/x",
        "postgresql+asyncpg://u:hunter2@localhost/x",
        "sqlite+aiosqlite:////var/lib/idb/x.db",
        "hunter2",
        "",
    ],
)
def test_a_url_the_broker_cannot_use_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_url(url)
    assert "hunter2" not in str(refused.value) + refused.value.hint
    assert "store.url" in str(refused.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_postgresql_url_means_psycopg(scheme: str) -> None:
    assert parse_url(f"{scheme}://u@localhost/x").drivername == "postgresql+psycopg"


async def test_the_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    store = Store(f"sqlite:///{folder}/broker.db", clock=SettableClock())
    await store.migrate()
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = list(folder.iterdir())
        assert {file.name for file in files} >= {"broker.db", "broker.db-wal"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        await store.close()


def test_a_folder_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError) as refused:
        Store(f"sqlite:///{tmp_path}/broker.db", clock=SettableClock())
    assert "chmod 700" in refused.value.hint


def test_a_file_others_may_open_is_refused(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    (tmp_path / "broker.db").touch(mode=0o644)
    (tmp_path / "broker.db").chmod(0o644)
    with pytest.raises(ConfigError) as refused:
        Store(url, clock=SettableClock())
    assert "chmod 600" in refused.value.hint


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    (tmp_path / "broker.db").mkdir()
    with pytest.raises(ConfigError):
        Store(url, clock=SettableClock())


async def test_a_store_that_is_not_open_says_so(tmp_path: Path) -> None:
    store = Store(sqlite_url(tmp_path), clock=SettableClock())
    for call in (store.check(), store.ledger.flush(), store.changes.latest()):
        with pytest.raises(StoreUnavailable):
            await call
    await store.close()
