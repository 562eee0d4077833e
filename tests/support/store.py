"""Stores for tests: SQLite in a folder of its own, PostgreSQL in a database of its own.

- A PostgreSQL database is a copy of a migrated template; there is one server per test process.
- `store` runs a test on both databases; `sqlite_store` and `postgres_store` on one.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from identity_broker.domain.credential import (
    CredentialIntent,
    CredentialKind,
    CredentialOutcome,
    Revocation,
    RevocationReason,
)
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.node import Node
from identity_broker.domain.paging import Page
from identity_broker.domain.revocation import (
    Hold,
    OrderState,
    RevocationOrder,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.domain.selection import Selection, parse_selection, subject
from identity_broker.domain.selector import Selector
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.postgres import PostgresServer

T = TypeVar("T")

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
PARENT = SpiffeId.parse("spiffe://example.org/idb/node/join_token/web-1")
TRUST_DOMAIN = TrustDomain("example.org")
API = SpiffeId.parse("spiffe://example.org/payments/api")


class SettableClock:
    """A clock that stands still until it is set."""

    def __init__(self, now: datetime = NOW) -> None:
        self.time = now

    def now(self) -> datetime:
        return self.time


def entry(entry_id: str = "api", **fields: Any) -> RegistrationEntry:
    """A valid registration entry."""
    values: dict[str, Any] = {
        "id": entry_id,
        "spiffe_id": API,
        "parent_id": PARENT,
        "selectors": frozenset({Selector("unix", f"uid:{entry_id}")}),
    }
    return RegistrationEntry(**{**values, **fields})


def node(name: str = "web-1", **fields: Any) -> Node:
    """An attested node."""
    values: dict[str, Any] = {
        "spiffe_id": SpiffeId.parse(f"spiffe://example.org/idb/node/join_token/{name}"),
        "attestor": "join_token",
        "selectors": frozenset({Selector("join_token", f"name:{name}")}),
        "attested_at": NOW,
        "serial": "ab" * 20,
        "expires_at": NOW + timedelta(hours=1),
        "reattestable": False,
    }
    return Node(**{**values, **fields})


def intent(credential_id: str = "", **fields: Any) -> CredentialIntent:
    """An intent with an id of its own, unless given one."""
    values: dict[str, Any] = {
        "id": credential_id or secrets.token_hex(20),
        "kind": CredentialKind.X509,
        "spiffe_id": API,
        "entry_id": "api",
        "entry_revision": 1,
        "node_id": PARENT,
        "authority_id": "a" * 40,
        "key_fingerprint": "f" * 64,
        "tbs_digest": "d" * 64,
        "not_before": NOW - timedelta(seconds=10),
        "not_after": NOW + timedelta(hours=1),
        "recorded_at": NOW,
        "correlation_id": "c0ffee",
    }
    return CredentialIntent(**{**values, **fields})


def issued(intended: CredentialIntent, supersedes: str = "") -> CredentialOutcome:
    """The outcome of that intent."""
    return CredentialOutcome(intended.id, "e" * 64, NOW, supersedes)


def of(kind: SubjectKind, value: object) -> RevocationSubject:
    """A subject in its canonical spelling."""
    return subject(kind, str(value), trust_domain=TRUST_DOMAIN, now=NOW)


def selecting(expression: str) -> Selection:
    """A selection, from its expression."""
    return parse_selection(expression, TRUST_DOMAIN, NOW)


def revoking(
    selection: Selection | str,
    reason: RevocationReason = RevocationReason.KEY_COMPROMISE,
    *,
    order: str = "order",
    comment: str = "stolen",
    at: datetime = NOW,
    limit: int | None = None,
) -> Callable[[Repositories], tuple[Revocation, ...]]:
    """A write that revokes what is selected, in one step."""
    selection = selecting(selection) if isinstance(selection, str) else selection
    return lambda repos: repos.credentials.revoke(
        selection, order_id=order, reason=reason, comment=comment, now=at, limit=limit
    )


def order(order_id: str = "rev-1", **fields: Any) -> RevocationOrder:
    """An order that has just been given."""
    values: dict[str, Any] = {
        "id": order_id,
        "subject": of(SubjectKind.SPIFFE_ID, API),
        "reason": RevocationReason.KEY_COMPROMISE,
        "comment": "stolen",
        "actor": "uid:0",
        "ordered_at": NOW,
    }
    return RevocationOrder(**{**values, **fields})


def closed(order_id: str = "rev-1", **fields: Any) -> RevocationOrder:
    """An order of which nothing more becomes."""
    done = {
        "state": OrderState.CLOSED,
        "committed_at": NOW,
        "swept": True,
        "sequence": 7,
        "statement": "{}",
    }
    return order(order_id, **{**done, **fields})


def hold(name: str = "freeze", on: RevocationSubject | None = None, **fields: Any) -> Hold:
    """A hold that has just been placed."""
    values: dict[str, Any] = {
        "name": name,
        "subject": on or of(SubjectKind.SPIFFE_ID, API),
        "order_id": "rev-1",
        "reason": RevocationReason.KEY_COMPROMISE,
        "actor": "uid:0",
        "created_at": NOW,
    }
    return Hold(**{**values, **fields})


def put_node(name: str) -> Callable[[Repositories], None]:
    """A write that stores the node of that name."""
    return lambda repos: repos.nodes.upsert(node(name))


def put_entry(new: RegistrationEntry) -> Callable[[Repositories], RegistrationEntry]:
    """A write that stores a new entry."""
    return lambda repos: repos.entries.create(new)


async def all_pages(store: Store, page: Callable[[Repositories, str], Page[T]]) -> list[list[T]]:
    """The items of every page, read one after the other."""
    found: list[list[T]] = []
    key = ""
    while True:
        read = await store.read(partial(lambda key, repos: page(repos, key), key))
        found.append(list(read.items))
        key = read.next_key
        if not key:
            return found


def sqlite_url(folder: Path) -> str:
    """The URL of a database file in that folder, which only its owner may enter."""
    folder.chmod(0o700)
    return f"sqlite:///{folder}/broker.db"


def _run(work: Any) -> None:
    # A loop of its own, in a thread: the fixtures below are asked for inside and outside of one.
    thread = threading.Thread(target=lambda: asyncio.run(work))
    thread.start()
    thread.join()


async def _migrated(url: str) -> None:
    store = Store(url, clock=SettableClock())
    await store.migrate()
    await store.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    server.start()
    try:
        server.execute("CREATE DATABASE migrated")
        _run(_migrated(server.url("migrated")))
        yield server
    finally:
        server.stop()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    name = f"t{secrets.token_hex(8)}"
    postgres_server.execute(f"CREATE DATABASE {name} TEMPLATE migrated")
    yield postgres_server.url(name)
    postgres_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("migrated")
    _run(_migrated(sqlite_url(folder)))
    return folder / "broker.db"


@pytest.fixture(
    params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgresql)],
)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a migrated, empty database; on both kinds."""
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres_url")
        return url
    migrated: Path = request.getfixturevalue("_migrated_file")
    copy = tmp_path / "broker.db"
    copy.write_bytes(migrated.read_bytes())
    copy.chmod(0o600)
    return sqlite_url(tmp_path)


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest.fixture
async def store(store_url: str, clock: SettableClock) -> AsyncIterator[Store]:
    opened = Store(store_url, clock=clock)
    await opened.open()
    yield opened
    await opened.close()
