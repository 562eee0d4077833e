"""The ledger, on both databases: intents, outcomes, revocation, ageing."""

from __future__ import annotations

import asyncio
import secrets
from datetime import datetime, timedelta

import pytest

from identity_broker.domain.credential import (
    Credential,
    CredentialIntent,
    CredentialKind,
    CredentialOutcome,
    CredentialState,
    RevocationReason,
)
from identity_broker.domain.events import AuditEvent, AuditKind, Topic
from identity_broker.domain.paging import CredentialFilter, EntryFilter, NodeFilter
from identity_broker.domain.selection import Selection
from identity_broker.errors import (
    CredentialNotFound,
    InvariantViolated,
    MalformedRequest,
    PageTokenInvalid,
    StoreUnavailable,
)
from identity_broker.lifecycle.record import Record
from identity_broker.store import STEP, Repositories, Store
from identity_broker.store.database import Mode
from identity_broker.store.ledger_statements import write_outcomes
from identity_ca.spiffe_id import SpiffeId
from support.store import API, NOW, PARENT, SettableClock, all_pages, intent, issued, revoking

OTHER = SpiffeId.parse("spiffe://example.org/orders/api")
LATER = NOW + timedelta(hours=2)


async def state_of(store: Store, credential_id: str) -> CredentialState:
    return (await store.read(lambda r: r.credentials.get(credential_id))).state


async def revoke(store: Store, *serials: str, at: datetime = NOW) -> int:
    revoked = 0
    for serial in serials:
        revoked += len(await store.write(revoking(Selection(serial=serial), at=at)))
    return revoked


async def issue(store: Store, *intents: CredentialIntent) -> None:
    await store.ledger.intend(intents)
    store.ledger.conclude([issued(one) for one in intents])
    await store.ledger.flush()


async def test_an_intent_is_listed_before_it_has_an_outcome(store: Store) -> None:
    one = intent(node_id=None, entry_id="", kind=CredentialKind.JWT)
    await store.ledger.intend([one])
    found = await store.read(lambda r: r.credentials.get(one.id))
    assert found == Credential(one, CredentialState.INTENT)


async def test_instances_are_kept_apart(store: Store) -> None:
    intents = [intent(instance=f"process {number}, größer") for number in range(200)]
    plain = intent()
    await issue(store, *intents, plain)
    found = {one.id: one.intent.instance for one in (await listed(store))}
    assert found == {one.id: one.instance for one in [*intents, plain]}
    assert found[plain.id] == ""


async def listed(store: Store) -> list[Credential]:
    page = await store.read(lambda r: r.credentials.page(CredentialFilter(), "", 500))
    return list(page.items)


async def test_an_outcome_is_written_within_its_lingering_time(store: Store) -> None:
    one = intent()
    await store.ledger.intend([one])
    store.ledger.conclude([issued(one)])
    for _ in range(100):
        await asyncio.sleep(0.02)
        found = await store.read(lambda r: r.credentials.get(one.id))
        if found.state is CredentialState.ISSUED:
            assert found.digest == issued(one).digest
            return
    pytest.fail("no outcome after two seconds")


async def test_an_outcome_without_intents_around_is_written_too(store: Store) -> None:
    one = intent()
    await store.ledger.intend([one])
    await asyncio.sleep(0.3)  # the writer is asleep by now
    store.ledger.conclude([issued(one)])
    await asyncio.sleep(0.5)
    assert await state_of(store, one.id) is CredentialState.ISSUED


async def test_every_issuance_is_audited_once(store: Store) -> None:
    one, two = intent(), intent(node_id=None)
    await issue(store, one, two)
    store.ledger.conclude([issued(one)])
    await store.ledger.flush()
    page = await store.read(lambda r: r.audit.page("", 10))
    assert [(e.kind, e.subject, e.actor) for e in page.items] == [
        (AuditKind.CREDENTIAL_ISSUED, one.id, str(PARENT)),
        (AuditKind.CREDENTIAL_ISSUED, two.id, "broker"),
    ]
    assert page.items[0].facts == {"spiffe_id": str(API)}
    assert page.items[0].correlation_id == "c0ffee"
    assert page.items[0].at == NOW


async def test_an_outcome_supersedes_the_older_one(store: Store) -> None:
    old, unconfirmed, revoked, unanswered = intent(), intent(), intent(), intent()
    await store.ledger.intend([unconfirmed])
    await store.write(lambda r: r.credentials.sweep_unconfirmed(LATER))
    await issue(store, old, revoked)
    await store.ledger.intend([unanswered])
    await revoke(store, revoked.id)
    for older in (old, unconfirmed, revoked, unanswered):
        newer = intent()
        await store.ledger.intend([newer])
        store.ledger.conclude([issued(newer, supersedes=older.id)])
    await store.ledger.flush()
    assert await state_of(store, old.id) is CredentialState.SUPERSEDED
    assert await state_of(store, unconfirmed.id) is CredentialState.SUPERSEDED
    assert await state_of(store, revoked.id) is CredentialState.REVOKED
    assert await state_of(store, unanswered.id) is CredentialState.INTENT


async def test_a_chain_of_outcomes_in_one_commit_ends_with_the_last_issued(store: Store) -> None:
    chain = [intent() for _ in range(5)]
    await store.ledger.intend(chain)
    store.ledger.conclude(
        [
            issued(one, older.id if older else "")
            for older, one in zip([None, *chain[:-1]], chain, strict=True)
        ]
    )
    await store.ledger.flush()
    states = [await state_of(store, one.id) for one in chain]
    assert states == [CredentialState.SUPERSEDED] * 4 + [CredentialState.ISSUED]


async def test_what_is_revoked_never_becomes_issued(store: Store) -> None:
    one = intent()
    await store.ledger.intend([one])
    assert await revoke(store, one.id) == 1
    store.ledger.conclude([issued(one)])
    await store.ledger.flush()
    found = await store.read(lambda r: r.credentials.get(one.id))
    assert found.state is CredentialState.REVOKED
    assert found.digest == issued(one).digest, "that it was signed is known all the same"
    assert (found.reason, found.comment) == (RevocationReason.KEY_COMPROMISE, "stolen")


async def test_revocations_racing_outcomes_always_win(store: Store) -> None:
    intents = [intent() for _ in range(60)]

    async def one(wanted: CredentialIntent) -> None:
        await store.ledger.intend([wanted])
        store.ledger.conclude([issued(wanted)])
        assert await revoke(store, wanted.id) == 1

    await asyncio.gather(*[one(wanted) for wanted in intents])
    await store.ledger.flush()
    states = [await state_of(store, wanted.id) for wanted in intents]
    assert set(states) == {CredentialState.REVOKED}


async def test_of_racing_revocations_one_revokes(store: Store) -> None:
    one = intent()
    await issue(store, one)
    results = await asyncio.gather(*[revoke(store, one.id) for _ in range(12)])
    assert sorted(results) == [0] * 11 + [1]
    changes = await store.changes.after(0)
    assert [(change.topic, change.key) for change in changes] == [(Topic.REVOCATION, one.id)]


async def test_revoking_again_keeps_the_first_reason_and_time(store: Store) -> None:
    one = intent()
    await issue(store, one)
    await revoke(store, one.id)
    assert await revoke(store, one.id, at=NOW + timedelta(minutes=1)) == 0
    (found,) = await store.read(lambda r: r.credentials.revocations([one.id, "unknown"]))
    assert found.revoked_at == NOW


async def test_revoking_passes_over_what_is_unknown_or_expired(store: Store) -> None:
    one = intent()
    await issue(store, one)
    assert await revoke(store, "unknown") == 0
    assert await revoke(store, one.id, at=one.not_after) == 0
    assert await state_of(store, one.id) is CredentialState.ISSUED
    assert await store.changes.latest() == 0


async def test_an_identity_is_revoked_whole_and_no_other(store: Store) -> None:
    mine = [intent() for _ in range(7)]
    others = [intent(spiffe_id=OTHER), intent(spiffe_id=SpiffeId.parse(f"{API}/sub"))]
    await issue(store, *mine[:5], *others)
    await store.ledger.intend(mine[5:])

    def by_identity(repos: Repositories) -> list[str]:
        return sorted(one.id for one in revoking(Selection(spiffe_id=API))(repos))

    assert await store.write(by_identity) == sorted(one.id for one in mine)
    listed = await store.read(lambda r: r.credentials.revoked_unexpired(NOW))
    assert {revocation.id for revocation in listed} == {one.id for one in mine}
    assert await store.read(lambda r: r.credentials.revoked_unexpired(LATER)) == []
    assert await store.read(lambda r: r.credentials.valid_for(API, NOW)) == []
    valid = await store.read(lambda r: r.credentials.valid_for(OTHER, NOW))
    assert [one.id for one in valid] == [others[0].id]
    keys = {change.key for change in await store.changes.after(0)}
    assert keys == {one.id for one in mine}


async def test_a_node_is_revoked_with_all_that_was_issued_through_it(store: Store) -> None:
    through, own, elsewhere = intent(), intent(spiffe_id=PARENT, entry_id=""), intent(node_id=None)
    await issue(store, through, own, elsewhere)
    result = await store.write(revoking(Selection(node_id=PARENT)))
    assert {revocation.id for revocation in result} == {through.id, own.id}


async def test_a_revocation_says_whose_it_is_and_whether_it_was_singled_out(store: Store) -> None:
    one, other = intent(instance="pid:1"), intent(instance="pid:2")
    node_s = intent(spiffe_id=OTHER, instance="pid:3")
    await issue(store, one, other, node_s)
    await revoke(store, one.id)
    await store.write(revoking(Selection(spiffe_id=API)))
    await store.write(revoking(Selection(node_id=PARENT)))
    listed = await store.read(lambda r: r.credentials.revoked_unexpired(NOW))
    found = {revocation.id: revocation for revocation in listed}
    assert found[one.id].singled_out
    assert (found[one.id].entry_id, found[one.id].instance) == (one.entry_id, "pid:1")
    assert found[one.id].denied_to(PARENT) == "pid:1"
    # A process of the same number on another machine is another process.
    assert found[one.id].denied_to(OTHER) == ""
    for whole in (other, node_s):
        assert not found[whole.id].singled_out
        assert found[whole.id].denied_to(PARENT) == ""


async def test_ten_thousand_credentials_are_revoked_at_once(store: Store) -> None:
    for _ in range(10):
        await issue(store, *[intent() for _ in range(1000)])

    async def whole() -> int:
        return len(await store.write(revoking(Selection(spiffe_id=API))))

    async with asyncio.timeout(10):
        assert await whole() == 10_000
    changes = await store.changes.after(0, 20_000)
    assert len({change.key for change in changes}) == 10_000
    assert (
        len(await store.read(lambda r: r.credentials.revocations([c.key for c in changes])))
        == 10_000
    )


async def test_intents_without_outcome_are_swept_and_can_still_be_confirmed(store: Store) -> None:
    old = intent(recorded_at=NOW - timedelta(minutes=2))
    new = intent(recorded_at=NOW)
    await store.ledger.intend([old, new])
    swept = await store.write(lambda r: r.credentials.sweep_unconfirmed(NOW - timedelta(minutes=1)))
    assert swept == 1
    assert await state_of(store, old.id) is CredentialState.UNCONFIRMED
    assert await state_of(store, new.id) is CredentialState.INTENT
    store.ledger.conclude([issued(old)])
    await store.ledger.flush()
    assert await state_of(store, old.id) is CredentialState.ISSUED
    assert await store.write(lambda r: r.credentials.sweep_unconfirmed(NOW)) == 0


async def test_what_is_past_its_validity_expires_but_what_is_revoked_stays_so(store: Store) -> None:
    short, long, revoked, unanswered = (
        intent(),
        intent(not_after=LATER + timedelta(days=1)),
        intent(),
        intent(),
    )
    await issue(store, short, long, revoked)
    await store.ledger.intend([unanswered])
    await revoke(store, revoked.id)
    assert (
        await store.write(lambda r: r.credentials.expire(short.not_after - timedelta(seconds=1)))
        == 0
    )
    assert await store.write(lambda r: r.credentials.expire(short.not_after)) == 1
    assert await store.write(lambda r: r.credentials.expire(short.not_after)) == 0
    assert await state_of(store, short.id) is CredentialState.EXPIRED
    assert await state_of(store, long.id) is CredentialState.ISSUED
    assert await state_of(store, revoked.id) is CredentialState.REVOKED
    assert await state_of(store, unanswered.id) is CredentialState.INTENT


async def test_retention_removes_only_what_ended_before(store: Store) -> None:
    ended, revoked, live = intent(), intent(), intent(not_after=LATER + timedelta(days=1))
    await issue(store, ended, revoked, live)
    await revoke(store, revoked.id)
    await store.write(lambda r: r.credentials.expire(LATER))
    assert await store.write(lambda r: r.retention.purge_credentials(ended.not_after)) == 0
    assert await store.write(lambda r: r.retention.purge_credentials(LATER)) == 2
    for gone in (ended, revoked):
        with pytest.raises(CredentialNotFound):
            await state_of(store, gone.id)
    assert await state_of(store, live.id) is CredentialState.ISSUED


async def test_ageing_goes_in_steps(store: Store) -> None:
    await store.ledger.intend([intent() for _ in range(30)])
    for step in (
        lambda r: r.credentials.sweep_unconfirmed(LATER, 20),
        lambda r: r.credentials.expire(LATER, 20),
        lambda r: r.retention.purge_credentials(LATER, 20),
    ):
        assert [await store.write(step) for _ in range(3)] == [20, 10, 0]


async def test_a_step_takes_the_oldest(store: Store) -> None:
    batch = [intent(recorded_at=NOW + timedelta(seconds=n)) for n in (3, 1, 2)]
    await store.ledger.intend(batch)
    await store.write(lambda r: r.credentials.sweep_unconfirmed(LATER, 2))
    states = [await state_of(store, one.id) for one in batch]
    assert states == [
        CredentialState.INTENT,
        CredentialState.UNCONFIRMED,
        CredentialState.UNCONFIRMED,
    ]


async def test_record_sweeps_and_expires_to_the_end(store: Store, clock: SettableClock) -> None:
    record = Record(store, clock, unconfirmed_after=timedelta(minutes=1))
    count = STEP + 3
    await store.ledger.intend([intent() for _ in range(count)])
    clock.time = LATER
    assert await record.sweep() == count
    assert await record.expire() == count
    assert [await record.sweep(), await record.expire()] == [0, 0]


async def test_issuing_waits_for_a_step_not_for_all_of_it(
    store: Store, clock: SettableClock
) -> None:
    record = Record(store, clock, unconfirmed_after=timedelta(minutes=1))
    for _ in range(6):
        await store.ledger.intend([intent() for _ in range(STEP)])
    clock.time = LATER
    ageing = asyncio.ensure_future(record.sweep())
    issued_meanwhile = 0
    while not ageing.done():
        await store.ledger.intend([intent(recorded_at=LATER)])
        issued_meanwhile += 1
    assert await ageing == 6 * STEP
    assert issued_meanwhile > 3, "it came in between the steps"


@pytest.mark.postgresql
async def test_what_another_transaction_holds_is_left_for_another_step(
    postgres_url: str, clock: SettableClock
) -> None:
    store = Store(postgres_url, clock=clock)
    await store.open()
    held, free = intent(), intent()
    await store.ledger.intend([held, free])
    with store._database.raw_transaction(Mode.APPEND) as connection:
        write_outcomes(connection, [issued(held)])
        async with asyncio.timeout(2):
            assert await store.write(lambda r: r.credentials.sweep_unconfirmed(LATER)) == 1
    assert await state_of(store, held.id) is CredentialState.ISSUED
    assert await state_of(store, free.id) is CredentialState.UNCONFIRMED
    await store.close()


async def test_every_swept_credential_is_audited_once(store: Store, clock: SettableClock) -> None:
    one, two = intent(), intent(node_id=None)
    await store.ledger.intend([one, two])
    clock.time = LATER
    for _ in range(2):
        await store.write(lambda r: r.credentials.sweep_unconfirmed(LATER))
    page = await store.read(lambda r: r.audit.page("", 10))
    assert page.items == [
        AuditEvent(
            at=LATER,
            kind=AuditKind.CREDENTIAL_UNCONFIRMED,
            actor=actor,
            subject=swept.id,
            correlation_id=swept.correlation_id,
            facts={"spiffe_id": str(API)},
        )
        for actor, swept in ((str(PARENT), one), ("broker", two))
    ]


async def test_a_clock_that_ran_ahead_leaves_everything_revocable(store: Store) -> None:
    by_id, by_identity, revoked = intent(), intent(spiffe_id=OTHER), intent()
    await issue(store, by_id, by_identity, revoked)
    await revoke(store, revoked.id)
    assert await store.write(lambda r: r.credentials.expire(LATER)) == 2

    # The clock is put right.
    valid = await store.read(lambda r: r.credentials.valid_for(OTHER, NOW))
    assert [one.id for one in valid] == [by_identity.id]
    assert await revoke(store, by_id.id, revoked.id) == 1
    result = await store.write(revoking(Selection(spiffe_id=OTHER)))
    assert [one.id for one in result] == [by_identity.id]
    everything = {by_id.id, by_identity.id, revoked.id}
    listed = await store.read(lambda r: r.credentials.revoked_unexpired(NOW))
    assert {one.id for one in listed} == everything
    wanted = CredentialFilter(states=frozenset({CredentialState.REVOKED}))
    page = await store.read(lambda r: r.credentials.page(wanted, "", 10))
    assert {one.id for one in page.items} == everything
    assert everything == {change.key for change in await store.changes.after(0)}

    # And when their time has really come, they are past revoking, and stay revoked.
    assert await store.write(lambda r: r.credentials.expire(LATER)) == 0
    assert await state_of(store, by_id.id) is CredentialState.REVOKED


async def test_what_has_really_expired_is_past_revoking(store: Store) -> None:
    one = intent()
    await issue(store, one)
    await store.write(lambda r: r.credentials.expire(LATER))
    assert await revoke(store, one.id, at=LATER) == 0
    assert await state_of(store, one.id) is CredentialState.EXPIRED


async def test_pages_are_newest_first_and_hold_every_match_once(store: Store) -> None:
    mine = [intent() for _ in range(12)]
    others = [
        intent(spiffe_id=OTHER, node_id=None, entry_id="orders", kind=CredentialKind.JWT)
        for _ in range(12)
    ]
    for one, other in zip(mine, others, strict=True):
        await store.ledger.intend([one, other])
    store.ledger.conclude([issued(one) for one in mine[:6]])
    await store.ledger.flush()

    async def listed(wanted: CredentialFilter, size: int = 5) -> list[str]:
        pages = await all_pages(store, lambda r, key: r.credentials.page(wanted, key, size))
        assert max(len(page) for page in pages) <= size
        return [item.id for page in pages for item in page]

    newest = [one.id for pair in zip(mine, others, strict=True) for one in pair][::-1]
    assert await listed(CredentialFilter()) == newest
    assert await listed(CredentialFilter(), 24) == newest
    mine_newest = [one.id for one in mine][::-1]
    assert await listed(CredentialFilter(spiffe_id=API)) == mine_newest
    assert await listed(CredentialFilter(node_id=PARENT)) == mine_newest
    assert await listed(CredentialFilter(entry_id="api")) == mine_newest
    assert await listed(CredentialFilter(kind=CredentialKind.X509)) == mine_newest
    assert (
        await listed(CredentialFilter(states=frozenset({CredentialState.ISSUED})))
        == mine_newest[6:]
    )
    assert await listed(CredentialFilter(spiffe_id=OTHER, node_id=PARENT)) == []


@pytest.mark.parametrize(
    "key", ["x", "-1", "1.5", "9" * 30, "9" * 5000, "\uff11", "\x00", "\ud800", "a\nb"]
)
async def test_a_made_up_page_key_is_refused(store: Store, key: str) -> None:
    with pytest.raises(PageTokenInvalid):
        await store.read(lambda r: r.credentials.page(CredentialFilter(), key, 1))
    with pytest.raises(PageTokenInvalid):
        await store.read(lambda r: r.audit.page(key, 1))
    with pytest.raises(PageTokenInvalid):
        await store.read(lambda r: r.nodes.page(NodeFilter(), key, 1))
    # Letters and digits up to 64 are an entry's id, whether or not there is one.
    if key not in {"x", "-1", "1.5", "9" * 30}:
        with pytest.raises(PageTokenInvalid):
            await store.read(lambda r: r.entries.page(EntryFilter(), key, 1))


async def test_a_character_that_cannot_be_stored_fails_its_caller_alone(store: Store) -> None:
    good = [intent() for _ in range(6)]
    results = await asyncio.gather(
        *[store.ledger.intend([one]) for one in good[:3]],
        store.ledger.intend([intent(correlation_id="a\x00b")]),
        store.ledger.intend([intent(correlation_id="\ud800")]),
        *[store.ledger.intend([one]) for one in good[3:]],
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [
        *[type(None)] * 3,
        *[MalformedRequest] * 2,
        *[type(None)] * 3,
    ]
    page = await store.read(lambda r: r.credentials.page(CredentialFilter(), "", 100))
    assert {item.id for item in page.items} == {one.id for one in good}


async def test_an_outcome_that_cannot_be_written_takes_no_other_along(store: Store) -> None:
    one, two, three = intent(), intent(), intent()
    await store.ledger.intend([one, two, three])
    store.ledger.conclude([issued(one), CredentialOutcome(two.id, "\x00", NOW), issued(three)])
    await store.ledger.flush()
    states = [await state_of(store, each.id) for each in (one, two, three)]
    assert states == [CredentialState.ISSUED, CredentialState.INTENT, CredentialState.ISSUED]


async def test_a_value_no_driver_can_make_sense_of_does_not_end_the_ledger(store: Store) -> None:
    good = [intent() for _ in range(4)]
    results = await asyncio.gather(
        *[store.ledger.intend([one]) for one in good],
        store.ledger.intend([intent(entry_revision=2**70)]),
        return_exceptions=True,
    )
    assert [type(result) for result in results[:4]] == [type(None)] * 4
    # SQLite's driver and PostgreSQL itself find different words for it.
    assert isinstance(results[4], InvariantViolated | MalformedRequest)
    await store.check()
    await issue(store, intent())


async def test_a_failing_writer_tells_who_waits_and_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = store.ledger._take
    failures = 2

    def failing():
        nonlocal failures
        if failures:
            failures -= 1
            raise KeyError("bug")
        return take()

    monkeypatch.setattr(store.ledger, "_take", failing)
    async with asyncio.timeout(5):
        with pytest.raises(InvariantViolated):
            await store.ledger.intend([intent()])
        await store.check()
        with pytest.raises(InvariantViolated):
            await store.ledger.intend([intent()])
        one = intent()
        await issue(store, one)
    assert await state_of(store, one.id) is CredentialState.ISSUED


async def test_a_commit_that_fails_for_no_known_reason_keeps_the_outcomes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = intent()
    await store.ledger.intend([one])
    commit = store.ledger._transact_once

    def failing(work):
        raise RuntimeError("bug")

    monkeypatch.setattr(store.ledger, "_transact_once", failing)
    store.ledger.conclude([issued(one)])
    with pytest.raises(InvariantViolated):
        await store.ledger.flush()
    monkeypatch.setattr(store.ledger, "_transact_once", commit)
    await store.ledger.flush()
    assert await state_of(store, one.id) is CredentialState.ISSUED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_writer_is_reported_and_not_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying():
        raise SystemExit

    monkeypatch.setattr(store.ledger, "_take", dying)
    killed = asyncio.ensure_future(store.ledger.intend([intent()]))
    while store.ledger._thread is not None and store.ledger._thread.is_alive():
        await asyncio.sleep(0.01)
    with pytest.raises(StoreUnavailable, match="writer"):
        await store.check()
    async with asyncio.timeout(1):
        with pytest.raises(StoreUnavailable, match="writer"):
            await store.ledger.intend([intent()])
    killed.cancel()


async def test_every_group_commit_is_told_of(store: Store) -> None:
    told: list[tuple[int, float]] = []
    store.ledger.observe = lambda rows, seconds: told.append((rows, seconds))
    await store.ledger.intend([intent(), intent()])
    one = intent()
    await issue(store, one)
    await store.ledger.flush()
    assert sum(rows for rows, _ in told) == 4, "intents and outcomes; empty flushes do not count"
    assert all(0 < seconds < 10 for _, seconds in told)

    def broken(rows: int, seconds: float) -> None:
        raise ZeroDivisionError

    store.ledger.observe = broken
    await issue(store, intent())
    await store.check()


async def test_a_store_is_made_with_its_observer(store_url: str, clock: SettableClock) -> None:
    told: list[int] = []
    opened = Store(store_url, clock=clock, on_commit=lambda rows, _seconds: told.append(rows))
    await opened.open()
    await opened.ledger.intend([intent()])
    await opened.close()
    assert told == [1]


async def test_pending_counts_what_waits_for_a_commit(
    store: Store, store_url: str, clock: SettableClock
) -> None:
    assert store.ledger.pending == 0
    one, two = intent(), intent()
    waiting = asyncio.ensure_future(store.ledger.intend([one, two]))
    await asyncio.sleep(0)
    assert store.ledger.pending == 2
    await waiting
    assert store.ledger.pending == 0
    unopened = Store(store_url, clock=clock)
    unopened.ledger.conclude([issued(one), issued(two)])
    assert unopened.ledger.pending == 2


async def test_a_duplicate_id_fails_its_caller_alone(store: Store) -> None:
    taken = intent()
    await store.ledger.intend([taken])
    good = [intent() for _ in range(8)]
    twice = intent()
    results = await asyncio.gather(
        *[store.ledger.intend([one]) for one in good[:4]],
        store.ledger.intend([intent(), taken]),
        store.ledger.intend([twice, twice]),
        *[store.ledger.intend([one]) for one in good[4:]],
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None)] * 4 + [InvariantViolated] * 2 + [
        type(None)
    ] * 4
    for one in good:
        assert await state_of(store, one.id) is CredentialState.INTENT
    page = await store.read(lambda r: r.credentials.page(CredentialFilter(), "", 100))
    assert len(page.items) == 9, "all of a call's intents or none"


async def test_an_outcome_needs_a_digest(store: Store) -> None:
    one = intent()
    await store.ledger.intend([one])
    with pytest.raises(InvariantViolated):
        store.ledger.conclude([type(issued(one))(one.id, "", NOW)])


async def test_outcomes_of_unknown_intents_do_no_harm(store: Store) -> None:
    stray, one = intent(), intent()
    await store.ledger.intend([one])
    store.ledger.conclude([issued(stray, supersedes=one.id), issued(one)])
    await store.ledger.flush()
    assert len((await store.read(lambda r: r.audit.page("", 10))).items) == 1


async def test_a_waiter_that_is_cancelled_takes_nobody_along(store: Store) -> None:
    tasks = [asyncio.ensure_future(store.ledger.intend([intent()])) for _ in range(50)]
    await asyncio.sleep(0)
    for task in tasks[::3]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results[1::3]] == [type(None)] * len(results[1::3])
    assert all(isinstance(r, asyncio.CancelledError) for r in results[::3])
    await store.ledger.intend([intent()])


async def test_concurrent_callers_share_commits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = 0
    commit = store.ledger._transact_once

    def counting(work):
        nonlocal commits
        commits += 1
        return commit(work)

    monkeypatch.setattr(store.ledger, "_transact_once", counting)
    await asyncio.gather(*[store.ledger.intend([intent()]) for _ in range(200)])
    assert commits <= 20


@pytest.mark.parametrize("count", [1, 2, 3, 127, 128, 129, 255, 1000])
async def test_batches_of_any_size_arrive_whole(store: Store, count: int) -> None:
    batch = [intent(correlation_id=secrets.token_hex(4)) for _ in range(count)]
    await issue(store, *batch)
    page = await store.read(lambda r: r.credentials.page(CredentialFilter(), "", 1000))
    assert [item.intent for item in page.items] == batch[::-1]
    assert {item.state for item in page.items} == {CredentialState.ISSUED}


async def test_an_empty_batch_is_no_work(store: Store) -> None:
    await store.ledger.intend([])
    store.ledger.conclude([])
    await store.ledger.flush()


async def test_what_is_queued_at_closing_is_written(store_url: str, clock) -> None:
    first = Store(store_url, clock=clock)
    await first.open()
    one = intent()
    await first.ledger.intend([one])
    first.ledger.conclude([issued(one)])
    await first.close()
    second = Store(store_url, clock=clock)
    await second.open()
    assert await state_of(second, one.id) is CredentialState.ISSUED
    await second.close()
