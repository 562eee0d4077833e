"""Nodes, join tokens, authorities, audit log and change feed, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from identity_broker.domain.events import AuditEvent, AuditKind, Topic
from identity_broker.domain.node import JoinToken, Node
from identity_broker.domain.paging import NodeFilter, Page
from identity_broker.domain.selector import Selector
from identity_broker.errors import (
    BrokerError,
    InvariantViolated,
    JoinTokenRejected,
    MalformedRequest,
    NodeNotFound,
    WatchLagged,
)
from identity_broker.store import Repositories, Store
from identity_broker.store.database import Mode
from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.keys import KeyAlgorithm
from support.store import NOW, PARENT, SettableClock, entry, node, put_node


def token(**fields: Any) -> JoinToken:
    values: dict[str, Any] = {
        "token_hash": "1" * 64,
        "node_id": PARENT,
        "expires_at": NOW + timedelta(minutes=10),
        "created_at": NOW,
    }
    return JoinToken(**{**values, **fields})


def authority(
    name: str, state: AuthorityState, kind: AuthorityKind = AuthorityKind.X509
) -> Authority:
    return Authority(
        id=name,
        kind=kind,
        state=state,
        key_id=f"file:{name}@1",
        algorithm=KeyAlgorithm.EC_P256,
        public_key_der=b"\x30\x00" + name.encode(),
        chain=(b"\x30\x01", b"\x00\xff"),
        roots=(b"\x30\x02",),
        upstream="selfsigned",
        created_at=NOW,
        not_before=NOW,
        not_after=NOW + timedelta(days=7),
    )


def use(token_hash: str, at: datetime) -> Callable[[Repositories], JoinToken]:
    return lambda repos: repos.join_tokens.consume(token_hash, at)


def page_of(wanted: NodeFilter) -> Callable[[Repositories], Page[Node]]:
    return lambda repos: repos.nodes.page(wanted, "", 10)


# --- nodes ----------------------------------------------------------------------------------------


async def test_a_node_is_stored_changed_and_removed(store: Store) -> None:
    one = node(selectors=frozenset({Selector("a", "1"), Selector("b", "ü")}))
    await store.write(lambda r: r.nodes.upsert(one))
    assert await store.read(lambda r: r.nodes.get(one.spiffe_id)) == one
    banned = replace(one, banned=True, ban_reason="stolen", selectors=frozenset())
    await store.write(lambda r: r.nodes.upsert(banned))
    assert await store.read(lambda r: r.nodes.all()) == [banned]
    assert await store.write(lambda r: r.nodes.delete(one.spiffe_id)) == banned
    assert await store.read(lambda r: r.nodes.find(one.spiffe_id)) is None
    for work in (lambda r: r.nodes.get(one.spiffe_id), lambda r: r.nodes.delete(one.spiffe_id)):
        with pytest.raises(NodeNotFound):
            await store.write(work)
    changes = await store.changes.after(0)
    assert [(c.topic, c.key) for c in changes] == [(Topic.NODE, str(one.spiffe_id))] * 3


async def test_a_reason_without_a_ban_cannot_be_stored(store: Store) -> None:
    with pytest.raises(InvariantViolated):
        await store.write(lambda r: r.nodes.upsert(node(ban_reason="x")))


async def test_node_pages(store: Store) -> None:
    def fill(repos: Repositories) -> None:
        for number in range(7):
            attestor = "x509_pop" if number % 2 else "join_token"
            repos.nodes.upsert(node(f"n{number}", attestor=attestor, banned=number == 3))

    await store.write(fill)
    first = await store.read(lambda r: r.nodes.page(NodeFilter(), "", 4))
    rest = await store.read(lambda r: r.nodes.page(NodeFilter(), first.next_key, 4))
    assert [len(first.items), len(rest.items), rest.next_key] == [4, 3, ""]
    assert [*first.items, *rest.items] == await store.read(lambda r: r.nodes.all())
    for wanted, count in (
        (NodeFilter(attestor="x509_pop"), 3),
        (NodeFilter(banned=True), 1),
        (NodeFilter(banned=False), 6),
        (NodeFilter(attestor="join_token", banned=True), 0),
    ):
        page = await store.read(page_of(wanted))
        assert len(page.items) == count


async def test_a_ban_outlives_its_node_s_svid(store: Store) -> None:
    def fill(repos: Repositories) -> None:
        for number in range(3):
            repos.nodes.upsert(node(f"old{number}"))
        repos.nodes.upsert(node("banned", banned=True, ban_reason="stolen"))
        repos.nodes.upsert(node("live", expires_at=NOW + timedelta(days=2)))

    await store.write(fill)
    seen = await store.changes.latest()
    limit = node().expires_at
    assert await store.write(lambda r: r.nodes.prune(limit)) == 0, "not before, but at"
    later = limit + timedelta(seconds=1)
    assert [await store.write(lambda r: r.nodes.prune(later, 2)) for _ in range(3)] == [2, 1, 0]
    left = await store.read(lambda r: r.nodes.all())
    assert {one.spiffe_id for one in left} == {node("banned").spiffe_id, node("live").spiffe_id}
    changes = await store.changes.after(seen)
    assert {(change.topic, change.key) for change in changes} == {
        (Topic.NODE, str(node(f"old{number}").spiffe_id)) for number in range(3)
    }


# --- join tokens ----------------------------------------------------------------------------------


async def test_a_join_token_is_used_once(store: Store) -> None:
    await store.write(lambda r: r.join_tokens.create(token()))
    used = await store.write(lambda r: r.join_tokens.consume("1" * 64, NOW))
    assert used == token(used_at=NOW)
    with pytest.raises(JoinTokenRejected, match="already used"):
        await store.write(lambda r: r.join_tokens.consume("1" * 64, NOW))


async def test_of_many_at_once_one_uses_the_token(store: Store) -> None:
    await store.write(lambda r: r.join_tokens.create(token()))

    async def consume() -> bool:
        with suppress(JoinTokenRejected):
            await store.write(lambda r: r.join_tokens.consume("1" * 64, NOW))
            return True
        return False

    assert sum(await asyncio.gather(*[consume() for _ in range(40)])) == 1


async def test_of_many_processes_at_once_one_uses_the_token(store_url: str) -> None:
    stores = [Store(store_url, clock=SettableClock()) for _ in range(4)]
    for one in stores:
        await one.open()
    await stores[0].write(lambda r: r.join_tokens.create(token()))

    async def consume(one: Store) -> bool:
        with suppress(JoinTokenRejected):
            await one.write(lambda r: r.join_tokens.consume("1" * 64, NOW))
            return True
        return False

    won = await asyncio.gather(*[consume(one) for one in stores for _ in range(5)])
    for one in stores:
        await one.close()
    assert sum(won) == 1


async def test_every_bad_token_is_refused_in_the_same_words(store: Store) -> None:
    await store.write(lambda r: r.join_tokens.create(token(token_hash="2" * 64)))
    await store.write(lambda r: r.join_tokens.create(token(token_hash="3" * 64)))
    await store.write(lambda r: r.join_tokens.consume("3" * 64, NOW))
    refusals = []
    for token_hash, at in (("1", NOW), ("2", NOW + timedelta(minutes=10)), ("3", NOW)):
        with pytest.raises(JoinTokenRejected) as refused:
            await store.write(use(token_hash * 64, at))
        refusals.append(refused.value)
    assert len({(r.public, r.hint) for r in refusals}) == 1
    assert [r.detail.split()[0] for r in refusals] == ["unknown", "the", "the"]
    assert "expired" in refusals[1].detail
    assert "used" in refusals[2].detail


async def test_expired_tokens_are_purged(store: Store) -> None:
    await store.write(lambda r: r.join_tokens.create(token()))
    await store.write(
        lambda r: r.join_tokens.create(
            token(token_hash="2" * 64, expires_at=NOW + timedelta(hours=1))
        )
    )
    assert await store.write(lambda r: r.join_tokens.purge(NOW + timedelta(minutes=10))) == 1
    await store.write(use("2" * 64, NOW))


@pytest.mark.parametrize(
    "bad", [token(), token(token_hash="short"), token(token_hash="4" * 64, expires_at=NOW)]
)
async def test_a_token_that_cannot_be_is_refused(store: Store, bad: JoinToken) -> None:
    await store.write(lambda r: r.join_tokens.create(token()))
    with pytest.raises(InvariantViolated):
        await store.write(lambda r: r.join_tokens.create(bad))


# --- authorities ----------------------------------------------------------------------------------


async def test_authorities_are_replaced_kind_by_kind(store: Store) -> None:
    x509 = [authority("old", AuthorityState.OLD), authority("active", AuthorityState.ACTIVE)]
    jwt = [authority("kid", AuthorityState.ACTIVE, AuthorityKind.JWT)]
    assert await store.read(lambda r: r.authorities.sequence()) == 0
    await store.write(lambda r: r.authorities.replace_all(AuthorityKind.X509, x509))
    await store.write(lambda r: r.authorities.replace_all(AuthorityKind.JWT, jwt))
    assert await store.read(lambda r: r.authorities.all()) == [*jwt, *x509]
    await store.write(lambda r: r.authorities.replace_all(AuthorityKind.X509, x509[1:]))
    assert await store.read(lambda r: r.authorities.all()) == [*jwt, x509[1]]
    assert await store.read(lambda r: r.authorities.sequence()) == 3
    changes = await store.changes.after(0)
    assert [(c.topic, c.key) for c in changes] == [
        (Topic.AUTHORITY, "x509"),
        (Topic.AUTHORITY, "jwt"),
        (Topic.AUTHORITY, "x509"),
    ]


@pytest.mark.parametrize("state", [AuthorityState.ACTIVE, AuthorityState.PREPARED])
async def test_two_active_or_two_prepared_cannot_be_stored(
    store: Store, state: AuthorityState
) -> None:
    before = [authority("fine", AuthorityState.ACTIVE)]
    await store.write(lambda r: r.authorities.replace_all(AuthorityKind.X509, before))
    with pytest.raises(InvariantViolated):
        await store.write(
            lambda r: r.authorities.replace_all(
                AuthorityKind.X509, [authority("a", state), authority("b", state)]
            )
        )
    assert await store.read(lambda r: r.authorities.all()) == before
    assert await store.read(lambda r: r.authorities.sequence()) == 1


# --- audit ----------------------------------------------------------------------------------------


async def test_audit_events_come_back_in_order(store: Store) -> None:
    events = [
        AuditEvent(NOW, kind, "uid:0", "subject", "REASON", "c0ffee", {"a": "ü"})
        for kind in AuditKind
    ]

    def append(repos: Repositories) -> None:
        for event in events:
            repos.audit.append(event)

    await store.write(append)
    first = await store.read(lambda r: r.audit.page("", 10))
    rest = await store.read(lambda r: r.audit.page(first.next_key, 100))
    assert [*first.items, *rest.items] == events
    assert (await store.read(lambda r: r.audit.page("", len(events)))).next_key == ""


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_events SET actor = 'nobody'", "DELETE FROM audit_events"]
)
async def test_the_audit_log_cannot_be_rewritten(store: Store, statement: str) -> None:
    event = AuditEvent(NOW, AuditKind.NODE_BANNED, "uid:0", "node")
    await store.write(lambda r: r.audit.append(event))
    with (
        pytest.raises(DBAPIError, match="append-only"),
        store._database.raw_transaction(Mode.WRITE) as connection,
    ):
        connection.execute(text(statement))
    assert (await store.read(lambda r: r.audit.page("", 10))).items == [event]


# --- changes --------------------------------------------------------------------------------------


async def test_a_commit_wakes_who_waits_at_once(store: Store) -> None:
    waiter = asyncio.ensure_future(store.changes.wait(0, 5))
    await asyncio.sleep(0)
    await store.write(lambda r: r.nodes.upsert(node()))
    # No poll can have come in between: waking is part of the commit's own answer.
    done, _ = await asyncio.wait([waiter], timeout=0.05)
    assert done
    assert waiter.result() is True


async def test_waiting_ends_when_nothing_comes(store: Store) -> None:
    assert await store.changes.wait(0, 0.25) is False
    await store.write(lambda r: r.nodes.upsert(node()))
    assert await store.changes.wait(0, 0) is True


async def test_commits_of_other_processes_are_seen(store: Store, store_url: str) -> None:
    other = Store(store_url, clock=SettableClock())
    await other.open()
    waiter = asyncio.ensure_future(store.changes.wait(0, 5))
    await asyncio.sleep(0.15)
    await other.write(lambda r: r.nodes.upsert(node()))
    assert await waiter is True
    assert [c.key for c in await store.changes.after(0)] == [str(node().spiffe_id)]
    await other.close()


async def test_a_reader_behind_retention_is_told(store: Store) -> None:
    for number in range(6):
        await store.write(put_node(f"n{number}"))
    assert await store.write(lambda r: r.retention.purge_outbox(2)) == 4
    assert await store.write(lambda r: r.retention.purge_outbox(2)) == 0
    latest = await store.changes.latest()
    assert len(await store.changes.after(latest - 2)) == 2
    with pytest.raises(WatchLagged):
        await store.changes.after(0)
    await store.write(lambda r: r.retention.purge_outbox(0))
    assert await store.changes.latest() == latest, "numbers are never used twice"


async def test_a_number_skipped_by_an_undone_write_is_no_loss(store: Store) -> None:
    start = await store.changes.latest()
    assert start == 0

    def undone(repos: Repositories) -> None:
        repos.nodes.upsert(node("undone"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.write(undone)
    await store.write(put_node("first"))
    changes = await store.changes.after(start)
    assert [change.key for change in changes] == [str(node("first").spiffe_id)]


async def test_a_skipped_number_at_the_edge_of_what_was_purged_is_no_loss(store: Store) -> None:
    def undone(repos: Repositories) -> None:
        repos.nodes.upsert(node("undone"))
        raise ZeroDivisionError

    await store.write(put_node("seen"))
    seen = await store.changes.latest()
    with pytest.raises(ZeroDivisionError):
        await store.write(undone)
    await store.write(put_node("next"))
    await store.write(lambda r: r.retention.purge_outbox(0))
    changes = await store.changes.after(seen)
    assert [change.key for change in changes] == [str(node("next").spiffe_id)]
    with pytest.raises(WatchLagged):
        await store.changes.after(seen - 1)


async def test_the_outbox_is_purged_in_steps(store: Store) -> None:
    for number in range(6):
        await store.write(put_node(f"n{number}"))
    purge = lambda r: r.retention.purge_outbox(1, 3)  # noqa: E731
    assert [await store.write(purge) for _ in range(3)] == [3, 2, 0]
    assert len(await store.changes.after(await store.changes.latest() - 1)) == 1


async def test_a_reader_of_many_writers_misses_nothing(store: Store, store_url: str) -> None:
    others = [Store(store_url, clock=SettableClock()) for _ in range(2)]
    for one in others:
        await one.open()
    writers, writes = 6, 15
    seen: list[str] = []

    async def write(number: int) -> None:
        target = [store, *others][number % 3]
        for turn in range(writes):
            name = f"w{number}-{turn}"
            await target.write(put_node(name))

    async def follow() -> None:
        seq = 0
        while len(seen) < writers * writes:
            assert await store.changes.wait(seq, 20)
            for change in await store.changes.after(seq, 7):
                assert change.seq > seq
                seq = change.seq
                seen.append(change.key)

    async with asyncio.timeout(60):
        await asyncio.gather(follow(), *[write(number) for number in range(writers)])
    for one in others:
        await one.close()
    assert len(set(seen)) == len(seen) == writers * writes


# --- transactions ---------------------------------------------------------------------------------


async def test_writes_run_one_after_the_other(store: Store, store_url: str) -> None:
    other = Store(store_url, clock=SettableClock())
    await other.open()
    await store.write(lambda r: r.entries.create(entry(labels={"count": "0"})))

    def increment(repos: Repositories) -> None:
        stored = repos.entries.get("api")
        count = int(stored.labels["count"]) + 1
        repos.entries.replace(replace(stored, labels={"count": str(count)}))

    await asyncio.gather(*[one.write(increment) for one in (store, other) for _ in range(15)])
    assert (await store.read(lambda r: r.entries.get("api"))).labels == {"count": "30"}
    await other.close()


async def test_a_read_sees_one_moment(store: Store) -> None:
    loop = asyncio.get_running_loop()

    def read_twice(repos: Repositories) -> tuple[int, int]:
        before = len(repos.nodes.all())
        write = asyncio.run_coroutine_threadsafe(
            store.write(lambda r: r.nodes.upsert(node())), loop
        )
        write.result(10)
        return before, len(repos.nodes.all())

    assert await store.read(read_twice) == (0, 0)
    assert len(await store.read(lambda r: r.nodes.all())) == 1


async def test_of_a_batch_only_the_item_that_cannot_be_stored_fails(store: Store) -> None:
    def batch(repos: Repositories) -> list[type]:
        results: list[type] = []
        for one in (
            node("first"),
            node("nul", attestor="a\x00b"),
            node("constraint", ban_reason="but no ban"),
            node("last"),
        ):
            try:
                with repos.savepoint():
                    repos.nodes.upsert(one)
            except BrokerError as error:
                results.append(type(error))
            else:
                results.append(Node)
        return results

    assert await store.write(batch) == [Node, MalformedRequest, InvariantViolated, Node]
    stored = await store.read(lambda r: r.nodes.all())
    assert [one.spiffe_id for one in stored] == [node("first").spiffe_id, node("last").spiffe_id]


async def test_a_bug_in_the_caller_is_not_an_outage(store: Store) -> None:
    def buggy(repos: Repositories) -> None:
        repos.nodes.upsert(node())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.write(buggy)
    assert await store.read(lambda r: r.nodes.all()) == []
    await store.check()
