"""Retention, on both databases: what goes, what stays, and in what steps."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.node import JoinToken
from identity_broker.domain.paging import CredentialFilter
from identity_broker.domain.revocation import BlockedKey, IdentityEpoch
from identity_broker.domain.selection import Selection
from identity_broker.errors import NodeNotFound, WatchLagged
from identity_broker.server.jobs.retention import Removed, Retention
from identity_broker.store import STEP, Repositories, Store
from support.store import (
    API,
    NOW,
    PARENT,
    SettableClock,
    closed,
    hold,
    intent,
    issued,
    node,
    revoking,
)

KEPT = timedelta(days=30)
DUE = NOW + timedelta(hours=1) + KEPT


def token(number: int) -> JoinToken:
    return JoinToken(
        token_hash=f"{number:064}",
        node_id=PARENT,
        expires_at=NOW + timedelta(minutes=10),
        created_at=NOW,
    )


@pytest.fixture
def retention(store: Store, clock: SettableClock) -> Retention:
    return Retention(store, clock, KEPT, kept_changes=10)


async def test_what_is_not_due_stays(
    store: Store, clock: SettableClock, retention: Retention
) -> None:
    one = intent()
    await store.ledger.intend([one])

    def fill(repos: Repositories) -> None:
        repos.nodes.upsert(node())
        repos.join_tokens.create(token(1))
        revoking(Selection(serial=one.id))(repos)

    await store.write(fill)
    nothing = Removed(*[0] * 7)
    assert await retention.run() == nothing
    clock.time = DUE
    assert await retention.run() == replace(nothing, join_tokens=1)
    clock.time = DUE + timedelta(microseconds=1)
    assert await retention.run() == replace(nothing, credentials=1, nodes=1)


async def test_what_revoking_left_goes_once_nothing_names_it(
    store: Store, clock: SettableClock, retention: Retention
) -> None:
    one = intent()
    await store.ledger.intend([one])

    def fill(repos: Repositories) -> None:
        repos.orders.create(closed())
        repos.holds.place(hold())
        revoking(Selection(serial=one.id), order="rev-1")(repos)
        key = BlockedKey("ab" * 32, "rev-1", RevocationReason.KEY_COMPROMISE, NOW)
        repos.blocked_keys.block(key)
        repos.epochs.raise_to(IdentityEpoch(API, NOW, NOW + timedelta(hours=1)))

    await store.write(fill)
    nothing = Removed(*[0] * 7)
    clock.time = NOW + 2 * KEPT
    assert await retention.run() == replace(nothing, credentials=1, epochs=1)
    await store.write(lambda r: r.holds.lift("freeze", clock.time, "uid:0"))
    clock.time += KEPT
    assert await retention.run() == nothing
    clock.time += timedelta(microseconds=1)
    assert await retention.run() == replace(nothing, holds=1, orders=1)
    assert await store.read(lambda r: r.blocked_keys.all())


async def test_everything_due_goes_however_much_it_is(
    store: Store, clock: SettableClock, retention: Retention
) -> None:
    many = STEP + 5
    batch = [intent() for _ in range(many)]
    await store.ledger.intend(batch)
    store.ledger.conclude([issued(one) for one in batch])
    await store.ledger.flush()
    await store.write(lambda r: r.credentials.expire(DUE))
    await store.write(lambda r: r.credentials.expire(DUE))

    def fill(repos: Repositories) -> None:
        for number in range(many):
            repos.join_tokens.create(token(number))
            repos.nodes.upsert(node(f"n{number}"))

    await store.write(fill)
    clock.time = DUE + timedelta(seconds=1)
    removed = await retention.run()
    assert removed == Removed(many, many, many, 0, 0, 0, 2 * many - 10)
    page = await store.read(lambda r: r.credentials.page(CredentialFilter(), "", 1))
    assert not page.items
    assert await store.read(lambda r: r.nodes.all()) == []
    with pytest.raises(WatchLagged):
        await store.changes.after(0)
    audited = await store.read(lambda r: r.audit.page("", many))
    assert len(audited.items) == many, "the audit log is never purged"


async def test_a_ban_is_kept_for_good(
    store: Store, clock: SettableClock, retention: Retention
) -> None:
    banned = node(banned=True, ban_reason="stolen")
    await store.write(lambda r: r.nodes.upsert(banned))
    await store.write(lambda r: r.nodes.upsert(node("other")))
    clock.time = NOW + timedelta(days=4000)
    assert (await retention.run()).nodes == 1
    assert await store.read(lambda r: r.nodes.get(banned.spiffe_id)) == banned
    with pytest.raises(NodeNotFound):
        await store.read(lambda r: r.nodes.get(node("other").spiffe_id))


async def test_the_audit_log_is_kept(
    store: Store, clock: SettableClock, retention: Retention
) -> None:
    event = AuditEvent(at=NOW, kind=AuditKind.NODE_ATTESTED, actor="x", subject="y")
    await store.write(lambda r: r.audit.append(event))
    clock.time = NOW + timedelta(days=4000)
    await retention.run()
    assert (await store.read(lambda r: r.audit.page("", 10))).items == [event]
