"""SQLite answers every ledger query from an index: none reads the whole ledger."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event

from identity_broker.domain.events import AuditKind
from identity_broker.domain.paging import CredentialFilter
from identity_broker.store import Repositories, Store
from support.store import (
    API,
    NOW,
    PARENT,
    SettableClock,
    intent,
    issued,
    revoking,
    selecting,
    sqlite_url,
)

LATER = NOW + timedelta(days=1)


SELECTIONS = {
    "serial": "serial=ab",
    "jti": "jti=x",
    "identity": f"spiffe-id={API}",
    "identity and time": f"spiffe-id={API} issued-after=2h kind=x509",
    "node": f"node={PARENT}",
    "entry": "entry=api",
    "owner": "owner=team",
    "label": "label.env=prod",
    "key": f"key={'ab' * 32}",
    "authority": f"authority={'ab' * 20}",
    "prefix": "spiffe-id=/shop/*",
    "kind": "kind=jwt",
}


def counting(expression: str) -> Callable[[Repositories], object]:
    return lambda repos: repos.credentials.count(selecting(expression), NOW)


QUERIES: dict[str, Callable[[Repositories], object]] = {
    "revocations": lambda r: r.credentials.revocations(["x", "y"]),
    "page by identity": lambda r: r.credentials.page(CredentialFilter(spiffe_id=API), "9", 5),
    "page by node": lambda r: r.credentials.page(CredentialFilter(node_id=PARENT), "9", 5),
    "page by entry": lambda r: r.credentials.page(CredentialFilter(entry_id="api"), "9", 5),
    "next page": lambda r: r.credentials.page(CredentialFilter(), "9", 5),
    "page by order": lambda r: r.credentials.page(CredentialFilter(order_id="o"), "9", 5),
    **{f"revoke by {name}": revoking(text, limit=9) for name, text in SELECTIONS.items()},
    **{f"count by {name}": counting(text) for name, text in SELECTIONS.items()},
    "release": lambda r: r.credentials.release("o", NOW),
    "revoked": lambda r: r.credentials.revoked_unexpired(NOW),
    "valid": lambda r: r.credentials.valid_for(API, NOW),
    "sweep": lambda r: r.credentials.sweep_unconfirmed(LATER),
    "expire": lambda r: r.credentials.expire(LATER),
    "audit of a sweep": lambda r: r.audit.append_for(AuditKind.CREDENTIAL_UNCONFIRMED, [1, 2], NOW),
    "purge": lambda r: r.retention.purge_credentials(LATER),
}


async def plans(store: Store, work: Callable[[], Awaitable[object]]) -> list[str]:
    """The plans of every statement on the ledger that `work` runs."""
    found: list[str] = []
    engine = store._database.engine

    def explain(connection, _cursor, statement, parameters, _context, many) -> None:
        if " credentials" in statement and not statement.startswith(
            ("EXPLAIN", "INSERT INTO cred")
        ):
            rows = connection.connection.cursor().execute(
                f"EXPLAIN QUERY PLAN {statement}", parameters[0] if many else parameters
            )
            found.extend(row[3] for row in rows)

    event.listen(engine, "before_cursor_execute", explain)
    try:
        await work()
    finally:
        event.remove(engine, "before_cursor_execute", explain)
    return found


@pytest.fixture
async def sqlite_store(tmp_path: Path):
    opened = Store(sqlite_url(tmp_path), clock=SettableClock())
    await opened.migrate()
    yield opened
    await opened.close()


@pytest.mark.parametrize("name", QUERIES)
async def test_no_query_reads_the_whole_ledger(sqlite_store: Store, name: str) -> None:
    found = await plans(sqlite_store, lambda: sqlite_store.write(QUERIES[name]))
    assert found, "nothing was explained"
    scans = [plan for plan in found if plan.startswith("SCAN credentials")]
    # What has no outcome yet is a handful, and all of its index.
    assert {*scans} <= {"SCAN credentials USING INDEX ix_credentials_unanswered"}
    assert any("SEARCH credentials USING" in plan for plan in found)


async def test_outcomes_are_written_by_index(sqlite_store: Store) -> None:
    one, two = intent(), intent()
    await sqlite_store.ledger.intend([one, two])
    sqlite_store.ledger.conclude([issued(one), issued(two, one.id)])
    found = await plans(sqlite_store, sqlite_store.ledger.flush)
    searches = [plan for plan in found if plan.startswith("SEARCH c")]
    assert len(searches) == 3
    assert all("uq_credentials_id" in plan or "sqlite_autoindex" in plan for plan in searches)
    assert not [plan for plan in found if plan.startswith(("SCAN credentials", "SCAN c "))]
