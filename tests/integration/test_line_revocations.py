"""Revoking whatever can be named: what it ends, what it stops, what can be taken back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from identity_broker.domain.credential import CredentialState, RevocationReason
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import AuditKind
from identity_broker.domain.revocation import OrderState, RevocationOrder, SubjectKind
from identity_broker.domain.selection import subject
from identity_broker.errors import (
    EntryNotAuthorized,
    HoldExists,
    HoldNotFound,
    KeyBlocked,
    NodeNotFound,
    RevocationExists,
    RevocationNotFound,
    SigningBackendUnavailable,
    SubjectInvalid,
    SubjectNotFound,
)
from identity_broker.lifecycle import orders as orders_module
from identity_broker.lifecycle import revoke as revoke_module
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.issue import JwtOrder, X509Order, one
from identity_broker.lifecycle.revoke import Revoke
from identity_broker.registry.nodes import Nodes
from identity_ca.authority import AuthorityKind
from identity_ca.keys import key_fingerprint
from support.line import csr_for, new_key
from support.verbs import DOMAIN, NODE, OPERATOR, START, Parts

HOLD = RevocationReason.CERTIFICATE_HOLD
API = f"{DOMAIN.id}/payments/api"


async def token(parts: Parts, entry_id: str = "api") -> str:
    """Issue one JWT-SVID; return its jti."""
    grant = parts.authorize.entry(NODE, entry_id)
    return one(await parts.issue.jwt([JwtOrder(grant, ["a"])])).jti


async def state(parts: Parts, credential_id: str) -> CredentialState:
    """What the ledger says of a credential."""
    await parts.store.ledger.flush()
    found = await parts.store.read(lambda repos: repos.credentials.get(credential_id))
    return found.state


async def audited(parts: Parts, kind: AuditKind) -> list[Any]:
    """The audit's events of a kind, oldest first."""
    events = await parts.store.read(lambda repos: repos.audit.page("", 1000).items)
    return [event for event in events if event.kind is kind]


async def swept(parts: Parts, order_id: str) -> RevocationOrder:
    """Wait until the order has been looked at a second time."""
    async with asyncio.timeout(10):
        while not (order := (await parts.revoke.get(order_id)).order).swept:
            await asyncio.sleep(0.05)
    return order


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three credentials in a transaction."""
    monkeypatch.setattr(orders_module, "STEP", 3)


# --- an identity ----------------------------------------------------------------------------------


async def test_an_identity_ends_with_all_it_holds_and_gets_nothing_more(parts: Parts) -> None:
    entry = await parts.admit()
    serial, jti = (await parts.svid()).serial, await token(parts)
    updates: list[Update] = []
    parts.directory.listen(updates.append)
    answer = await parts.end(SubjectKind.SPIFFE_ID, API, comment="stolen")
    assert {item.id for item in answer.revocations} == {serial, jti}
    order = answer.order
    assert (order.state, order.revoked, order.actor) == (OrderState.COMMITTED, 2, "uid:0")
    assert order.hold == order.id
    assert answer.held_entry_ids == ("api",)
    assert order.sequence <= parts.directory.seq
    assert parts.directory.is_revoked(serial)
    assert parts.directory.is_revoked(jti)
    [epoch] = parts.directory.epochs()
    assert (epoch.spiffe_id, epoch.not_before) == (entry.spiffe_id, START)
    assert [item.spiffe_id for update in updates for item in update.epochs][:1] == [entry.spiffe_id]
    with pytest.raises(EntryNotAuthorized):
        await parts.svid()
    held = parts.directory.entry("api")
    assert held is not None
    assert not held.is_told
    [missing] = [
        check
        for check in parts.authorize.explain(held, parts.directory.node(NODE), NODE)
        if not check.held
    ]
    assert missing.rule == "nothing holds the entry"
    assert order.id in missing.detail


async def test_lifting_a_hold_frees_the_entries_and_revives_nothing(parts: Parts) -> None:
    await parts.admit()
    before = await parts.svid()
    order = (await parts.end(SubjectKind.SPIFFE_ID, API, hold_name="freeze")).order
    lifted = await parts.revoke.lift("freeze", OPERATOR)
    assert (lifted.released, lifted.freed_entry_ids) == (0, ("api",))
    assert lifted.hold.lifted_by == "uid:0"
    assert parts.directory.is_revoked(before.serial)
    again = await parts.svid()
    assert not parts.directory.is_revoked(again.serial)
    # The second look finds what was issued before the lift, and that alone.
    await swept(parts, order.id)
    assert not parts.directory.is_revoked(again.serial)
    twice = await parts.revoke.lift("freeze", OPERATOR)
    assert (twice.hold.lifted_at, twice.freed_entry_ids) == (lifted.hold.lifted_at, ())


async def test_what_is_on_hold_is_valid_again_when_it_is_lifted(parts: Parts) -> None:
    await parts.admit()
    serial, jti = (await parts.svid()).serial, await token(parts)
    answer = await parts.end(SubjectKind.SPIFFE_ID, API, HOLD, hold_name="look")
    assert parts.directory.is_revoked(serial)
    # An epoch cannot be taken back, so none is raised.
    assert parts.directory.epochs() == []
    updates: list[Update] = []
    parts.directory.listen(updates.append)
    lifted = await parts.revoke.lift("look", OPERATOR)
    assert lifted.released == 2
    assert {key for update in updates for key in update.released} == {serial, jti}
    assert not parts.directory.is_revoked(serial)
    assert await state(parts, serial) is CredentialState.ISSUED
    order = await swept(parts, answer.order.id)
    assert (order.revoked, order.released) == (2, 2)
    assert not parts.directory.is_revoked(serial), "the second look ends what was released"
    [event] = await audited(parts, AuditKind.CREDENTIAL_RELEASED)
    assert event.facts["count"] == "2"


async def test_a_better_reason_stays_when_the_hold_is_lifted(parts: Parts) -> None:
    await parts.admit()
    one_serial, other = (await parts.svid()).serial, (await parts.svid()).serial
    await parts.end(SubjectKind.SPIFFE_ID, API, HOLD, hold_name="look")
    await parts.end(SubjectKind.SERIAL, one_serial)
    lifted = await parts.revoke.lift("look", OPERATOR)
    assert lifted.released == 1
    assert parts.directory.is_revoked(one_serial)
    assert not parts.directory.is_revoked(other)


async def test_a_directory_that_starts_over_tells_what_was_released(parts: Parts) -> None:
    await parts.admit()
    await parts.register("other", "/other")
    serial, freed, new = [(await parts.svid(name)).serial for name in ("api", "other", "other")]
    await parts.end(SubjectKind.SERIAL, serial, HOLD, hold_name="look")
    await parts.end(SubjectKind.SERIAL, freed, HOLD, hold_name="glance")
    other = Directory(parts.store, DOMAIN, parts.clock)
    await other.load()
    seen: list[Update] = []
    other.listen(seen.append)
    await parts.revoke.lift("look", OPERATOR)
    await parts.revoke.lift("glance", OPERATOR)
    await parts.end(SubjectKind.SPIFFE_ID, API)  # revokes one of them again
    await parts.end(SubjectKind.KEY_FINGERPRINT, "ab" * 32)
    await parts.end_one(new)
    await parts.store.write(lambda repos: repos.retention.purge_outbox(0))
    await other.sync()
    [update] = seen
    assert {item.id for item in update.revocations} == {serial, new}
    assert update.released == [freed]
    assert [str(epoch.spiffe_id) for epoch in update.epochs] == [API]
    assert update.blocked_keys == ["ab" * 32]
    assert other.is_key_blocked("ab" * 32)
    assert other.epochs() == parts.directory.epochs()


async def test_without_a_hold_the_next_one_is_issued_and_stays(parts: Parts) -> None:
    await parts.admit()
    before = (await parts.svid()).serial
    order = (await parts.end(SubjectKind.SPIFFE_ID, API, without_hold=True)).order
    assert (order.hold, order.swept, order.revoked) == ("", True, 1)
    after = (await parts.svid()).serial
    await parts.revoke.resume()
    assert parts.directory.is_revoked(before)
    assert not parts.directory.is_revoked(after)


async def test_an_entry_made_or_changed_while_a_hold_lasts_is_held_from_the_start(
    parts: Parts,
) -> None:
    await parts.admit()
    elsewhere = await parts.register("elsewhere", "/elsewhere")
    await parts.end(SubjectKind.SPIFFE_ID, API, hold_name="freeze")
    new = await parts.register("new", "/payments/api")
    assert new.held_by == "freeze"
    [moved] = await parts.entries.update(
        [("elsewhere", 0, lambda entry: replace(entry, spiffe_id=new.spiffe_id))], OPERATOR
    )
    assert isinstance(moved, RegistrationEntry)
    assert moved.held_by == "freeze"
    for entry_id in ("new", "elsewhere"):
        with pytest.raises(EntryNotAuthorized):
            await parts.svid(entry_id)
    [back] = await parts.entries.update(
        [("elsewhere", 0, lambda entry: replace(entry, spiffe_id=elsewhere.spiffe_id))], OPERATOR
    )
    assert isinstance(back, RegistrationEntry)
    assert (await parts.svid("elsewhere")).serial


async def test_what_two_holds_cover_is_free_when_both_are_lifted(parts: Parts) -> None:
    await parts.admit()
    await parts.end(SubjectKind.SPIFFE_ID, API, hold_name="one")
    await parts.end(SubjectKind.SELECT, "spiffe-id=/payments/*", hold_name="two")
    assert (await parts.revoke.lift("one", OPERATOR)).freed_entry_ids == ()
    with pytest.raises(EntryNotAuthorized):
        await parts.svid()
    assert (await parts.revoke.lift("two", OPERATOR)).freed_entry_ids == ("api",)
    assert (await parts.svid()).serial


async def test_a_hold_ends_when_its_time_is_over(parts: Parts) -> None:
    await parts.admit()
    serial = (await parts.svid()).serial
    until = START + timedelta(minutes=10)
    await parts.end(SubjectKind.SPIFFE_ID, API, HOLD, hold_name="lunch", hold_until=until)
    parts.clock.time = until - timedelta(seconds=1)
    await parts.revoke.lift_due()
    assert parts.directory.is_revoked(serial)
    parts.clock.time = until
    await parts.revoke.lift_due()
    assert not parts.directory.is_revoked(serial)
    assert (await parts.svid()).serial
    [status] = (await parts.revoke.holds("", 10, include_lifted=True)).items
    assert (status.hold.lifted_by, status.hold.lifted_at) == ("time", until)
    assert (await parts.revoke.holds("", 10, include_lifted=False)).items == []


# --- other subjects -------------------------------------------------------------------------------


async def test_one_credential_ends_alone_and_nothing_is_stopped(parts: Parts) -> None:
    await parts.admit()
    serial, jti, kept = (await parts.svid()).serial, await token(parts), await parts.svid()
    for kind, name in ((SubjectKind.SERIAL, serial), (SubjectKind.JTI, jti)):
        answer = await parts.end(kind, name)
        assert [item.id for item in answer.revocations] == [name]
        assert answer.revocations[0].singled_out
        assert (answer.order.hold, answer.order.swept) == ("", True)
    assert parts.directory.epochs() == []
    assert not parts.directory.is_revoked(kept.serial)
    assert (await parts.svid()).serial


async def test_a_selection_ends_and_stops_what_it_selects(parts: Parts) -> None:
    await parts.admit()
    await parts.register("shop", "/shop/web", owner="team a")
    await parts.register("desk", "/shop/desk", owner="team b")
    serials = {name: (await parts.svid(name)).serial for name in ("api", "shop", "desk")}
    plan = await parts.revoke.plan(
        subject(SubjectKind.SELECT, 'owner="team a"', trust_domain=DOMAIN, now=START)
    )
    assert (plan.count.live_x509, plan.held_entry_ids, plan.holds) == (1, ("shop",), True)
    answer = await parts.end(SubjectKind.SELECT, 'owner="team a"')
    assert [item.id for item in answer.revocations] == [serials["shop"]]
    assert answer.held_entry_ids == ("shop",)
    answer = await parts.end(SubjectKind.SELECT, "spiffe-id=/shop/* kind=x509")
    assert [item.id for item in answer.revocations] == [serials["desk"]]
    assert (answer.order.hold, answer.held_entry_ids) == ("", ())
    assert not parts.directory.is_revoked(serials["api"])
    assert (await parts.svid("desk")).serial


async def test_a_key_is_refused_for_ever_and_what_was_issued_to_it_ends(parts: Parts) -> None:
    await parts.admit()
    key = new_key()
    grant = parts.authorize.entry(NODE, "api")
    issued = one(await parts.issue.x509([X509Order(grant, csr_for(key))]))
    other = await parts.svid()
    fingerprint = key_fingerprint(key.public_key())
    answer = await parts.end(SubjectKind.KEY_FINGERPRINT, fingerprint)
    assert [item.id for item in answer.revocations] == [issued.serial]
    assert answer.order.hold == ""
    assert not parts.directory.is_revoked(other.serial)
    [refused, fresh] = await parts.issue.x509(
        [X509Order(grant, csr_for(key)), X509Order(grant, csr_for(new_key()))]
    )
    assert isinstance(refused, KeyBlocked)
    assert one([fresh]).serial
    again = Directory(parts.store, DOMAIN, parts.clock)
    await again.load()
    assert again.is_key_blocked(fingerprint)
    assert len(await audited(parts, AuditKind.KEY_BLOCKED)) == 1
    # Blocked twice is blocked once.
    assert (await parts.end(SubjectKind.KEY_FINGERPRINT, fingerprint)).order.already_revoked == 1
    assert len(await audited(parts, AuditKind.KEY_BLOCKED)) == 1


async def test_a_key_that_is_blocked_while_it_gets_its_svid_loses_it(parts: Parts) -> None:
    await parts.admit()
    reached, go_on = asyncio.Event(), asyncio.Event()
    intend = parts.record.intend

    async def slow_intend(*args: Any, **kwargs: Any) -> None:
        reached.set()
        await go_on.wait()
        await intend(*args, **kwargs)

    parts.record.intend = slow_intend  # type: ignore[method-assign]
    key = new_key()
    grant = parts.authorize.entry(NODE, "api")
    issuing = asyncio.create_task(parts.issue.x509([X509Order(grant, csr_for(key))]))
    await reached.wait()
    blocking = asyncio.create_task(
        parts.end(SubjectKind.KEY_FINGERPRINT, key_fingerprint(key.public_key()))
    )
    while not parts.directory.is_key_blocked(key_fingerprint(key.public_key())):
        await asyncio.sleep(0.01)
    go_on.set()
    issued = one(await issuing)
    assert [item.id for item in (await blocking).revocations] == [issued.serial]


async def test_a_banned_node_comes_back_when_its_hold_is_lifted_or_it_is_evicted(
    parts: Parts,
) -> None:
    await parts.admit()
    await parts.directory.sync()
    nodes = Nodes(parts.store, parts.revoke, DOMAIN, parts.clock)
    through = (await parts.svid()).serial
    banned, count = await nodes.ban(NODE, "stolen", OPERATOR)
    assert banned.banned
    assert count == 2
    assert parts.directory.is_revoked(through)
    order = (await parts.revoke.page("", 1)).items[0]
    assert (order.subject.kind, order.reason) == (
        SubjectKind.NODE,
        RevocationReason.PRIVILEGE_WITHDRAWN,
    )
    await parts.revoke.lift(order.hold, OPERATOR)
    assert not (await nodes.get(NODE)).banned
    await nodes.ban(NODE, "again", OPERATOR)
    await nodes.evict(NODE, OPERATOR)
    with pytest.raises(NodeNotFound):
        await nodes.get(NODE)
    assert (await parts.revoke.holds("", 10, include_lifted=False)).items == []
    for work in (nodes.ban(NODE, "", OPERATOR), nodes.evict(NODE, OPERATOR)):
        with pytest.raises(NodeNotFound):
            await work
    assert len((await parts.revoke.page("", 10)).items) == 3


async def test_a_node_that_is_on_hold_and_not_known_is_held_when_it_comes(parts: Parts) -> None:
    await parts.admit()
    await parts.end(SubjectKind.NODE, NODE, hold_name="freeze")
    await parts.store.write(lambda repos: repos.nodes.delete(NODE))
    held = await parts.store.read(lambda repos: repos.holds.of_node(NODE))
    assert held == "freeze"


async def test_an_authority_that_is_revoked_is_replaced_at_once(parts: Parts) -> None:
    await parts.admit()
    issued = await parts.svid()
    first = parts.signing.authorities.x509_set.active
    assert first is not None
    seen: list[Update] = []
    parts.directory.listen(seen.append)
    answer = await parts.end(
        SubjectKind.AUTHORITY, first.id, RevocationReason.CA_COMPROMISE, comment="out"
    )
    assert issued.serial in {item.id for item in answer.revocations}
    assert any(update.authorities_changed for update in seen)
    assert parts.directory.denied_authorities() == (first.id,)
    now = parts.signing.authorities
    assert now.x509_set.active is not None
    assert now.x509_set.active.id != first.id
    assert now.x509_set.get(first.id).state.value == "revoked"
    assert not parts.signing.is_trusted(first.id)
    assert not set(first.roots) & set(parts.signing.bundle.x509_authorities)
    again = await parts.svid()
    assert not parts.directory.is_revoked(again.serial)
    other = Directory(parts.store, DOMAIN, parts.clock)
    await other.load()
    assert other.denied_authorities() == (first.id,)
    # Whoever repeats the command replaces nothing a second time.
    await parts.end(SubjectKind.AUTHORITY, first.id)
    assert parts.signing.authorities.x509_set.active == now.x509_set.active
    # It is forgotten with its validity.
    parts.clock.time = first.not_after + timedelta(minutes=6)
    await other.forget_expired()
    assert other.denied_authorities() == ()


async def test_a_jwt_authority_is_replaced_as_well(parts: Parts) -> None:
    await parts.admit()
    jti, serial = await token(parts), (await parts.svid()).serial
    first = parts.signing.authorities.jwt_set.active
    assert first is not None
    answer = await parts.end(SubjectKind.AUTHORITY, first.id)
    assert [item.id for item in answer.revocations] == [jti]
    assert not parts.directory.is_revoked(serial)
    assert first.id not in {key.key_id for key in parts.signing.bundle.jwt_keys}
    assert parts.directory.denied_authorities() == (first.id,)
    assert not parts.directory.is_revoked(await token(parts))


async def test_a_prepared_authority_takes_over_and_one_that_is_only_old_needs_no_successor(
    parts: Parts,
) -> None:
    parts.clock.time = START + timedelta(hours=7)
    await parts.rotate.run()
    x509_set = parts.signing.authorities.x509_set
    assert x509_set.active is not None
    assert x509_set.prepared is not None
    first, second = x509_set.active, x509_set.prepared
    await parts.end(SubjectKind.AUTHORITY, first.id)
    assert parts.states(AuthorityKind.X509) == ["revoked", "active"]
    assert parts.signing.authorities.x509_set.active is not None
    assert parts.signing.authorities.x509_set.active.id == second.id
    await parts.rotate.run()
    assert "prepared" not in parts.states(AuthorityKind.X509)


async def test_an_authority_whose_successor_cannot_be_made_is_revoked_as_soon_as_it_can(
    parts: Parts,
) -> None:
    await parts.admit()
    issued = await parts.svid()
    first = parts.signing.authorities.x509_set.active
    assert first is not None
    make = parts.signing.new_authority

    async def away(*_: Any) -> Any:
        raise SigningBackendUnavailable

    parts.signing.new_authority = away  # type: ignore[assignment]
    with pytest.raises(SigningBackendUnavailable):
        await parts.end(SubjectKind.AUTHORITY, first.id, id="out")
    assert (await parts.revoke.get("out")).order.state is OrderState.RUNNING
    with pytest.raises(SigningBackendUnavailable):
        await parts.revoke.resume()
    parts.signing.new_authority = make  # type: ignore[method-assign]
    parts.clock.time += timedelta(seconds=11)
    await parts.revoke.resume()
    assert (await parts.revoke.get("out")).order.state is OrderState.COMMITTED
    assert parts.directory.is_revoked(issued.serial)
    assert parts.directory.denied_authorities() == (first.id,)


# --- orders ---------------------------------------------------------------------------------------


async def test_a_repeat_with_the_same_id_is_the_same_order(parts: Parts) -> None:
    await parts.admit()
    await parts.svid()
    seen: list[RevocationOrder] = []
    parts.revoke.on_committed.append(seen.append)
    first = await parts.end(SubjectKind.SPIFFE_ID, API, id="night")
    again = await parts.end(SubjectKind.SPIFFE_ID, API, id="night")
    assert again.order.ordered_at == first.order.ordered_at
    assert again.order.revoked == 1
    assert again.revocations == ()
    assert again.held_entry_ids == ("api",)
    assert [order.swept for order in seen] == [False]
    with pytest.raises(RevocationExists):
        await parts.end(SubjectKind.ENTRY, "api", id="night")
    with pytest.raises(RevocationExists):
        # Even where nothing is known of the other subject.
        await parts.end(SubjectKind.ENTRY, "nobody", id="night")
    await swept(parts, "night")
    assert [order.swept for order in seen] == [False, True]


async def test_a_repeat_that_asks_for_something_else_is_refused(parts: Parts) -> None:
    await parts.admit()
    serial = (await parts.svid()).serial
    until = parts.clock.now() + timedelta(hours=8)
    first = await parts.end(SubjectKind.SPIFFE_ID, API, HOLD, id="night", hold_until=until)
    assert not first.repeated
    others: list[tuple[dict[str, Any], str]] = [
        ({"reason": RevocationReason.KEY_COMPROMISE, "hold_until": until}, "for certificate-hold"),
        ({"reason": HOLD}, "a hold that ends at"),
        ({"reason": HOLD, "hold_until": until, "hold_name": "look"}, 'the hold "night"'),
        (
            {"reason": RevocationReason.KEY_COMPROMISE, "without_hold": True},
            'for certificate-hold, has the hold "night"',
        ),
    ]
    for asked, differs in others:
        with pytest.raises(RevocationExists, match=f'"night" .*{differs}') as refused:
            await parts.end(SubjectKind.SPIFFE_ID, API, id="night", **asked)
        assert "idb revoke status night" in refused.value.hint
    # "8h" is typed again a minute later, with other words.
    again = await parts.end(
        *(SubjectKind.SPIFFE_ID, API, HOLD),
        id="night",
        hold_until=until + timedelta(minutes=1),
        comment="once more",
    )
    assert again.repeated
    assert (again.order.comment, again.order.revoked) == ("", 1)
    await parts.end(SubjectKind.SERIAL, serial, id="single")
    with pytest.raises(RevocationExists, match="has no hold"):
        await parts.end(SubjectKind.SERIAL, serial, id="single", reason=HOLD)


@pytest.mark.parametrize("lifted", [True, False])
async def test_a_repeat_after_its_hold_is_over_is_refused(parts: Parts, *, lifted: bool) -> None:
    await parts.admit()
    until = None if lifted else parts.clock.now() + timedelta(minutes=5)
    await parts.end(SubjectKind.SPIFFE_ID, API, id="night", hold_until=until)
    if lifted:
        await parts.revoke.lift("night", OPERATOR)
    else:
        parts.clock.time += timedelta(minutes=5)
        await parts.revoke.lift_due()
    new = (await parts.svid()).serial
    later = None if lifted else parts.clock.now() + timedelta(minutes=5)
    over = "was lifted" if lifted else "has ended"
    with pytest.raises(RevocationExists, match=f"{over}: this is another incident") as refused:
        await parts.end(SubjectKind.SPIFFE_ID, API, id="night", hold_until=later)
    assert "choose another --id" in refused.value.hint
    assert not parts.directory.is_revoked(new)
    await parts.end(SubjectKind.SPIFFE_ID, API, id="next")
    assert parts.directory.is_revoked(new)


async def test_a_relative_time_typed_again_is_another_revocation(parts: Parts) -> None:
    await parts.admit()
    await parts.svid()
    typed = "spiffe-id=/payments/* issued-after=2h"
    first = (await parts.end(SubjectKind.SELECT, typed, id="night")).order
    parts.clock.time += timedelta(seconds=1)
    with pytest.raises(RevocationExists, match="one like 2h is another") as refused:
        await parts.end(SubjectKind.SELECT, typed, id="night")
    assert f"--select '{first.subject.value}'" in refused.value.hint
    again = await parts.end(SubjectKind.SELECT, first.subject.value, id="night")
    assert again.repeated
    with pytest.raises(RevocationExists, match="is of select=spiffe-id="):
        await parts.end(SubjectKind.SELECT, "spiffe-id=/payments/*", id="night")


async def test_a_plan_names_the_nodes_that_cannot_come_back(parts: Parts) -> None:
    await parts.admit()
    at = parts.clock.now()
    authority = parts.signing.authorities.x509_set.active
    assert authority is not None

    async def stranded(kind: SubjectKind, value: object) -> tuple[list[str], int]:
        named = subject(kind, str(value), trust_domain=DOMAIN, now=at)
        plan = await parts.revoke.plan(named)
        return [str(one) for one in plan.stranded_node_ids], plan.stranded_node_count

    node = await parts.store.read(lambda repos: repos.nodes.get(NODE))
    lost = ([str(NODE)], 1)
    assert await stranded(SubjectKind.AUTHORITY, authority.id) == lost
    assert await stranded(SubjectKind.SERIAL, node.serial) == lost
    assert await stranded(SubjectKind.SELECT, "kind=x509 issued-after=1h") == lost
    # Banned by it, or not concerned.
    assert await stranded(SubjectKind.NODE, NODE) == ([], 0)
    assert await stranded(SubjectKind.SPIFFE_ID, API) == ([], 0)
    await parts.store.write(lambda repos: repos.nodes.upsert(replace(node, reattestable=True)))
    assert await stranded(SubjectKind.AUTHORITY, authority.id) == ([], 0)
    await parts.store.write(lambda repos: repos.nodes.upsert(node))
    await parts.end_one(node.serial)
    assert await stranded(SubjectKind.AUTHORITY, authority.id) == ([], 0)


async def test_the_same_order_given_twice_at_once_is_one(parts: Parts) -> None:
    await parts.admit()
    await parts.svid()
    answers = await asyncio.gather(
        *(parts.end(SubjectKind.SPIFFE_ID, API, id="night") for _ in range(5))
    )
    assert {answer.order.state for answer in answers} == {OrderState.COMMITTED}
    assert {answer.order.revoked for answer in answers} == {1}
    assert any(answer.revocations for answer in answers)
    assert [answer.repeated for answer in answers].count(False) == 1
    assert len((await parts.revoke.page("", 10)).items) == 1


async def test_expired_and_revoked_ones_are_counted_and_no_error(parts: Parts) -> None:
    await parts.admit()
    early = (await parts.svid()).serial
    parts.clock.time += timedelta(minutes=30)
    revoked = (await parts.svid()).serial
    await parts.svid()
    await parts.end_one(revoked)
    parts.clock.time += timedelta(minutes=45)
    order = (await parts.end(SubjectKind.SPIFFE_ID, API)).order
    assert (order.revoked, order.already_revoked, order.expired) == (1, 1, 1)
    order = (await parts.end_one(early)).order
    assert (order.state, order.revoked, order.expired) == (OrderState.COMMITTED, 0, 1)
    order = (await parts.end_one(revoked)).order
    assert (order.revoked, order.already_revoked) == (0, 1)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (SubjectKind.SPIFFE_ID, f"{DOMAIN.id}/nobody"),
        (SubjectKind.SERIAL, "0" * 40),
        (SubjectKind.JTI, "nothing"),
        (SubjectKind.NODE, f"{DOMAIN.id}/idb/node/join_token/nobody"),
        (SubjectKind.ENTRY, "nobody"),
        (SubjectKind.AUTHORITY, "nobody"),
        (SubjectKind.SELECT, "owner=nobody"),
        (SubjectKind.SELECT, "spiffe-id=/nobody/*"),
    ],
)
async def test_what_nobody_knows_cannot_be_revoked(
    parts: Parts, kind: SubjectKind, value: str
) -> None:
    await parts.admit()
    with pytest.raises(SubjectNotFound):
        await parts.end(kind, value)
    with pytest.raises(SubjectNotFound):
        await parts.revoke.plan(subject(kind, value, trust_domain=DOMAIN, now=START))
    assert (await parts.revoke.page("", 10)).items == []


async def test_what_has_nothing_yet_can_be_revoked_all_the_same(parts: Parts) -> None:
    await parts.admit()
    fingerprint = "ab" * 32
    plan = await parts.revoke.plan(
        subject(SubjectKind.KEY_FINGERPRINT, fingerprint, trust_domain=DOMAIN, now=START)
    )
    assert (plan.blocked_keys, plan.holds) == ((fingerprint,), False)
    assert (await parts.end(SubjectKind.KEY_FINGERPRINT, fingerprint)).order.revoked == 0
    answer = await parts.end(SubjectKind.ENTRY, "api")
    assert (answer.order.revoked, answer.held_entry_ids) == (0, ("api",))


@pytest.mark.parametrize(
    ("kind", "value", "options"),
    [
        (SubjectKind.SPIFFE_ID, API, {"id": "a/b"}),
        (SubjectKind.SPIFFE_ID, API, {"hold_name": "-"}),
        (SubjectKind.SPIFFE_ID, API, {"comment": "x" * 513}),
        (SubjectKind.SPIFFE_ID, API, {"hold_until": START}),
        (SubjectKind.SPIFFE_ID, API, {"without_hold": True, "hold_name": "freeze"}),
        (SubjectKind.SPIFFE_ID, API, {"without_hold": True, "reason": HOLD}),
        (SubjectKind.JTI, "x", {"hold_name": "freeze"}),
        (SubjectKind.KEY_FINGERPRINT, "ab" * 32, {"reason": HOLD}),
        (SubjectKind.AUTHORITY, "x", {"reason": HOLD}),
    ],
)
async def test_what_contradicts_itself_is_refused(
    parts: Parts, kind: SubjectKind, value: str, options: dict[str, Any]
) -> None:
    await parts.admit()
    with pytest.raises(SubjectInvalid):
        await parts.end(kind, value, **options)
    assert (await parts.revoke.page("", 10)).items == []
    assert (await parts.svid()).serial


async def test_a_name_is_taken_once(parts: Parts) -> None:
    await parts.admit()
    await parts.register("other", "/other")
    await parts.end(SubjectKind.SPIFFE_ID, API, hold_name="freeze")
    with pytest.raises(HoldExists):
        await parts.end(SubjectKind.ENTRY, "other", hold_name="freeze", id="second")
    assert (await parts.svid("other")).serial
    with pytest.raises(RevocationNotFound):
        await parts.revoke.get("second")
    with pytest.raises(HoldNotFound):
        await parts.revoke.lift("second", OPERATOR)


async def test_revoking_a_credential_for_hold_can_be_taken_back(parts: Parts) -> None:
    await parts.admit()
    serial = (await parts.svid()).serial
    answer = await parts.end(SubjectKind.SERIAL, serial, HOLD)
    assert answer.order.hold == answer.order.id
    assert answer.held_entry_ids == ()
    assert (await parts.svid()).serial
    assert (await parts.revoke.lift(answer.order.hold, OPERATOR)).released == 1
    assert not parts.directory.is_revoked(serial)


# --- many credentials, and what is cut off --------------------------------------------------------


@pytest.mark.usefixtures("small_steps")
async def test_many_credentials_end_in_steps_that_issuing_goes_between(parts: Parts) -> None:
    await parts.admit()
    await parts.register("other", "/other")
    serials = {(await parts.svid()).serial for _ in range(11)}
    advance = parts.revoke._orders.advance
    between: list[str] = []

    async def advance_and_issue(order_id: str, *, commit: bool) -> Any:
        between.append((await parts.svid("other")).serial)
        return await advance(order_id, commit=commit)

    parts.revoke._orders.advance = advance_and_issue  # type: ignore[method-assign]
    answer = await parts.end(SubjectKind.SPIFFE_ID, API)
    assert {item.id for item in answer.revocations} == serials
    assert answer.order.revoked == 11
    assert len(between) >= 4
    assert not any(parts.directory.is_revoked(serial) for serial in between)


@pytest.mark.usefixtures("small_steps")
async def test_a_call_does_not_wait_for_a_very_large_order(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.admit()
    serials = {(await parts.svid()).serial for _ in range(7)}
    monkeypatch.setattr(revoke_module, "_PATIENCE_SECONDS", 0.05)
    go_on = asyncio.Event()
    advance = parts.revoke._orders.advance

    async def slow_advance(order_id: str, *, commit: bool) -> Any:
        await go_on.wait()
        return await advance(order_id, commit=commit)

    parts.revoke._orders.advance = slow_advance  # type: ignore[method-assign]
    answer = await parts.end(SubjectKind.SPIFFE_ID, API, id="night")
    assert (answer.order.state, answer.order.revoked) == (OrderState.RUNNING, 3)
    assert answer.order.sequence == 0
    with pytest.raises(EntryNotAuthorized):
        await parts.svid()
    # Whoever asks again waits for the same work.
    monkeypatch.setattr(revoke_module, "_PATIENCE_SECONDS", 5.0)
    again = asyncio.create_task(parts.end(SubjectKind.SPIFFE_ID, API, id="night"))
    go_on.set()
    assert (await again).order.state is OrderState.COMMITTED
    assert all(map(parts.directory.is_revoked, serials))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_what_was_cut_off_is_finished_by_whoever_is_up(parts: Parts, steps: int) -> None:
    await parts.admit()
    serials = {(await parts.svid()).serial for _ in range(7)}
    advance = parts.revoke._orders.advance
    taken = 0

    async def cut_off(order_id: str, *, commit: bool) -> Any:
        nonlocal taken
        if taken == steps:
            raise asyncio.CancelledError
        taken += 1
        return await advance(order_id, commit=commit)

    parts.revoke._orders.advance = cut_off  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await parts.end(SubjectKind.SPIFFE_ID, API, id="night")
    await parts.revoke.close()
    seen: list[RevocationOrder] = []
    another = Revoke(
        parts.store,
        parts.directory,
        parts.clock,
        parts.issue.settled,
        revoke_authority=parts.rotate.revoke,
    )
    another.on_committed.append(seen.append)
    await another.resume()
    order = (await another.get("night")).order
    assert (order.state, order.revoked) == (OrderState.COMMITTED, 7)
    assert all(map(parts.directory.is_revoked, serials))
    assert [item.id for item in seen] == ["night"]
    await another.resume()
    assert (await another.get("night")).order.revoked == 7
    await another.close()


async def test_a_second_look_that_never_came_is_made_up_for(parts: Parts) -> None:
    entry = await parts.admit()
    stale = parts.authorize.entry(NODE, entry.id)
    order = (await parts.end(SubjectKind.SPIFFE_ID, API)).order
    await parts.revoke.close()
    late = one(await parts.issue.x509([X509Order(stale, csr_for(new_key()))]))
    assert not parts.directory.is_revoked(late.serial)
    await parts.revoke.resume()
    assert parts.directory.is_revoked(late.serial)
    after = (await parts.revoke.get(order.id)).order
    assert after.swept
    assert after.sequence > order.sequence


async def test_an_order_that_somebody_is_at_is_left_to_him(parts: Parts) -> None:
    await parts.admit()
    another = Revoke(
        parts.store,
        parts.directory,
        parts.clock,
        parts.issue.settled,
        revoke_authority=parts.rotate.revoke,
    )
    await another.resume()
    order = (await parts.end(SubjectKind.SPIFFE_ID, API)).order
    await another.resume()
    assert not (await another.get(order.id)).order.swept
    parts.clock.time += timedelta(seconds=11)
    await another.resume()
    assert (await another.get(order.id)).order.swept
    await another.close()


async def test_a_listener_with_a_bug_stops_nothing(parts: Parts) -> None:
    await parts.admit()
    serial = (await parts.svid()).serial

    def broken(_: RevocationOrder) -> None:
        raise ValueError("a bug")

    seen: list[RevocationOrder] = []
    parts.revoke.on_committed += [broken, seen.append]
    answer = await parts.end_one(serial)
    assert answer.order.state is OrderState.COMMITTED
    assert parts.directory.is_revoked(serial)
    assert seen == [answer.order]


async def test_what_happened_is_audited(parts: Parts) -> None:
    await parts.admit()
    await parts.svid()
    await parts.end(SubjectKind.SPIFFE_ID, API, hold_name="freeze", id="night", comment="stolen")
    await parts.revoke.lift("freeze", OPERATOR)
    [revoked] = await audited(parts, AuditKind.CREDENTIAL_REVOKED)
    assert (revoked.actor, revoked.subject) == ("uid:0", f"spiffe-id={API}")
    assert revoked.facts == {
        "revocation": "night",
        "comment": "stolen",
        "hold": "freeze",
        "revoked": "1",
    }
    [placed] = await audited(parts, AuditKind.HOLD_PLACED)
    assert placed.facts["hold"] == "freeze"
    [lifted] = await audited(parts, AuditKind.HOLD_LIFTED)
    assert (lifted.actor, lifted.facts["count"]) == ("uid:0", "1")
