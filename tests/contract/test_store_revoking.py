"""Revoking by orders, on both databases: steps, holds taken back and made final."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from identity_broker.domain.credential import (
    Credential,
    CredentialIntent,
    CredentialKind,
    CredentialState,
    RevocationReason,
)
from identity_broker.domain.events import Topic
from identity_broker.domain.paging import CredentialFilter
from identity_broker.errors import InvariantViolated
from identity_broker.store import Store
from identity_broker.store.database import Mode
from identity_broker.store.ledger_statements import insert_intents
from identity_broker.store.mapping import intent_row
from identity_ca.spiffe_id import SpiffeId
from support.store import (
    API,
    NOW,
    SettableClock,
    all_pages,
    entry,
    intent,
    issued,
    put_entry,
    revoking,
)

OTHER = SpiffeId.parse("spiffe://example.org/orders/api")
HOLD = RevocationReason.CERTIFICATE_HOLD
STOLEN = RevocationReason.KEY_COMPROMISE
SOON = NOW + timedelta(minutes=5)
IDENTITY = f"spiffe-id={API}"
AUTHORITY = f"authority={'a' * 40}"


async def issue(store: Store, *intents: CredentialIntent) -> None:
    await store.ledger.intend(intents)
    store.ledger.conclude([issued(one) for one in intents])
    await store.ledger.flush()


async def ledger(store: Store) -> dict[str, Credential]:
    page = await store.read(lambda r: r.credentials.page(CredentialFilter(), "", 1000))
    return {one.id: one for one in page.items}


async def announced(store: Store, after: int = 0) -> list[str]:
    changes = await store.changes.after(after, 10_000)
    assert {change.topic for change in changes} <= {Topic.REVOCATION}
    return sorted(change.key for change in changes)


async def release(store: Store, order: str, limit: int = 100) -> list[str]:
    return await store.write(lambda r: r.credentials.release(order, NOW, limit))


@pytest.mark.parametrize("named", [IDENTITY, AUTHORITY])
async def test_steps_revoke_everything_once(store: Store, named: str) -> None:
    mine = [intent() for _ in range(25)]
    await issue(store, *mine[:20], intent(spiffe_id=OTHER, authority_id="b" * 40))
    await store.ledger.intend(mine[20:])
    step = revoking(named, order="rev-1", limit=10)
    sizes: list[int] = []
    while not sizes or sizes[-1] == 10:
        sizes.append(len(await store.write(step)))
    assert sizes == [10, 10, 5]
    assert await announced(store) == sorted(one.id for one in mine)
    states = {one.state for one in (await ledger(store)).values()}
    assert states == {CredentialState.REVOKED, CredentialState.ISSUED}


async def test_a_step_begins_with_the_newest(store: Store) -> None:
    mine = [intent() for _ in range(6)]
    await issue(store, *mine)
    first = await store.write(revoking(IDENTITY, limit=2))
    assert {one.id for one in first} == {mine[4].id, mine[5].id}


async def test_what_is_issued_between_two_steps_is_revoked_too(store: Store) -> None:
    before = [intent() for _ in range(4)]
    await issue(store, *before)
    await store.write(revoking(IDENTITY, limit=2))
    meanwhile = [intent() for _ in range(3)]
    await issue(store, *meanwhile)
    # It goes on below what it has revoked, and then looks above.
    second = await store.write(revoking(IDENTITY, limit=4))
    assert len(second) == 4
    third = await store.write(revoking(IDENTITY, limit=4))
    revoked = {one.id for one in [*second, *third]}
    assert revoked == {one.id for one in [*before[:2], *meanwhile]}


@pytest.mark.postgresql
async def test_what_was_committed_late_among_what_is_revoked_is_found(
    postgres_url: str, clock: SettableClock
) -> None:
    store = Store(postgres_url, clock=clock)
    await store.open()
    await issue(store, *[intent() for _ in range(3)])
    late, last = intent(), intent()
    with store._database.raw_transaction(Mode.APPEND) as connection:
        # Numbered, and not yet committed when what comes after it is revoked.
        insert_intents(connection, [intent_row(late)])
        await issue(store, last)
        first = await store.write(revoking(IDENTITY, limit=2))
    assert last.id in {one.id for one in first}
    assert len(await store.write(revoking(IDENTITY, limit=5))) == 3
    assert (await ledger(store))[late.id].state is CredentialState.REVOKED
    await store.close()


async def test_a_row_says_which_order_revoked_it(store: Store) -> None:
    mine, other = [intent() for _ in range(3)], intent(spiffe_id=OTHER)
    await issue(store, *mine, other)
    await store.write(revoking(IDENTITY, order="rev-1"))
    await store.write(revoking(f"serial={other.id}", order="rev-2"))
    found = await ledger(store)
    assert {found[one.id].order_id for one in mine} == {"rev-1"}
    assert found[other.id].order_id == "rev-2"
    of_first = CredentialFilter(order_id="rev-1")
    pages = await all_pages(store, lambda r, key: r.credentials.page(of_first, key, 2))
    assert [one.id for page in pages for one in page] == [one.id for one in mine[::-1]]


async def test_nothing_is_revoked_without_an_order(store: Store) -> None:
    with pytest.raises(InvariantViolated):
        await store.write(revoking(IDENTITY, order=""))


async def test_a_serial_is_no_jti(store: Store) -> None:
    x509, jwt = intent(), intent(kind=CredentialKind.JWT)
    await issue(store, x509, jwt)
    assert await store.write(revoking(f"jti={x509.id}")) == ()
    assert await store.write(revoking(f"serial={jwt.id}")) == ()
    (one,) = await store.write(revoking(f"jti={jwt.id}"))
    assert (one.id, one.singled_out) == (jwt.id, True)


async def test_owner_and_labels_are_those_of_the_entry_as_it_is_now(store: Store) -> None:
    await store.write(put_entry(entry("api", owner="shop", labels={"env": "prod"})))
    await store.write(put_entry(entry("web", owner="shop")))
    api, web, gone = (intent(entry_id=name) for name in ("api", "web", "gone"))
    await issue(store, api, web, gone)
    first = await store.write(revoking("owner=shop label.env=prod", HOLD, order="rev-1"))
    assert [one.id for one in first] == [api.id]
    labelled = entry("web", owner="shop", labels={"env": "prod"})
    await store.write(lambda r: r.entries.replace(labelled))
    second = await store.write(revoking("label.env=prod", order="rev-2"))
    assert {one.id for one in second} == {api.id, web.id}
    assert (await ledger(store))[gone.id].state is CredentialState.ISSUED


# --- on hold --------------------------------------------------------------------------------------


async def test_what_is_on_hold_is_released_by_its_order_alone(store: Store) -> None:
    mine = [intent() for _ in range(3)]
    await issue(store, *mine[:2])
    await store.ledger.intend(mine[2:])
    before = await ledger(store)
    await store.write(revoking(IDENTITY, HOLD, order="rev-1"))
    seen = await store.changes.latest()
    assert await release(store, "rev-2") == []
    assert sorted(await release(store, "rev-1")) == sorted(one.id for one in mine)
    assert await announced(store, seen) == sorted(one.id for one in mine)
    after = await ledger(store)
    assert [after[one.id] for one in mine[:2]] == [before[one.id] for one in mine[:2]]
    # Whether it was signed is not known: it is not said to be issued.
    assert after[mine[2].id].state is CredentialState.UNCONFIRMED
    assert await release(store, "rev-1") == []
    assert await store.read(lambda r: r.credentials.revoked_unexpired(NOW)) == []
    store.ledger.conclude([issued(mine[2])])
    await store.ledger.flush()
    assert (await ledger(store))[mine[2].id].state is CredentialState.ISSUED


async def test_an_outcome_that_came_on_hold_counts_after_it(store: Store) -> None:
    one = intent()
    await store.ledger.intend([one])
    await store.write(revoking(IDENTITY, HOLD))
    store.ledger.conclude([issued(one)])
    await store.ledger.flush()
    assert (await ledger(store))[one.id].state is CredentialState.REVOKED
    assert await release(store, "order") == [one.id]
    assert (await ledger(store))[one.id].state is CredentialState.ISSUED


async def test_releasing_goes_in_steps(store: Store) -> None:
    await issue(store, *[intent() for _ in range(5)])
    await store.write(revoking(IDENTITY, HOLD))
    assert [len(await release(store, "order", 2)) for _ in range(4)] == [2, 2, 1, 0]


async def test_what_expired_on_hold_stays_as_it_was(store: Store) -> None:
    one = intent()
    await issue(store, one)
    await store.write(revoking(IDENTITY, HOLD))
    assert await store.write(lambda r: r.credentials.release("order", one.not_after, 9)) == []
    assert (await ledger(store))[one.id].state is CredentialState.REVOKED


@pytest.mark.parametrize("named", [IDENTITY, AUTHORITY])
async def test_what_is_on_hold_can_be_revoked_for_good(store: Store, named: str) -> None:
    held, live = intent(), intent()
    await issue(store, held, live)
    await store.write(revoking(f"serial={held.id}", HOLD, order="rev-1"))
    seen = await store.changes.latest()
    step = revoking(named, STOLEN, order="rev-2", comment="for good", at=SOON)
    upgraded = {one.id: one for one in await store.write(step)}
    assert upgraded.keys() == {held.id, live.id}
    assert await announced(store, seen) == sorted([held.id, live.id])
    assert (upgraded[held.id].reason, upgraded[held.id].comment) == (STOLEN, "for good")
    assert upgraded[held.id].revoked_at == NOW, "since it was put on hold"
    assert upgraded[live.id].revoked_at == SOON
    # It was singled out when it was put on hold, and still is.
    assert (upgraded[held.id].singled_out, upgraded[live.id].singled_out) == (True, False)
    assert (await ledger(store))[held.id].order_id == "rev-2"
    for order in ("rev-1", "rev-2"):
        assert await release(store, order) == []
    assert await store.write(step) == ()


async def test_what_is_revoked_for_good_is_not_put_on_hold(store: Store) -> None:
    one = intent()
    await issue(store, one)
    await store.write(revoking(IDENTITY, STOLEN, order="rev-1"))
    assert await store.write(revoking(IDENTITY, HOLD, order="rev-2")) == ()
    assert await release(store, "rev-2") == []
    assert (await ledger(store))[one.id].reason is STOLEN


async def test_of_two_holds_the_first_is_released(store: Store) -> None:
    one = intent()
    await issue(store, one)
    await store.write(revoking(IDENTITY, HOLD, order="rev-1"))
    assert await store.write(revoking(IDENTITY, HOLD, order="rev-2")) == ()
    assert await release(store, "rev-2") == []
    assert await release(store, "rev-1") == [one.id]


async def test_a_hold_leaves_nothing_behind_on_who_gets_another_one(store: Store) -> None:
    one = intent(instance="pid:1")
    await issue(store, one)
    await store.write(revoking(f"serial={one.id}", HOLD, order="rev-1"))
    await release(store, "rev-1")
    (again,) = await store.write(revoking(IDENTITY, order="rev-2"))
    assert not again.singled_out


async def test_releasing_and_making_final_at_once_end_in_what_is_final(store: Store) -> None:
    many = [intent() for _ in range(12)]
    await issue(store, *many)
    await store.write(revoking(IDENTITY, HOLD, order="rev-1"))
    await asyncio.gather(
        *[release(store, "rev-1", 3) for _ in range(4)],
        *[store.write(revoking(f"serial={one.id}", STOLEN, order="rev-2")) for one in many],
        *[release(store, "rev-1", 3) for _ in range(4)],
    )
    assert await release(store, "rev-1") == []
    found = await ledger(store)
    assert {(one.state, one.reason) for one in found.values()} == {
        (CredentialState.REVOKED, STOLEN)
    }


async def test_issuing_writes_nothing_to_the_index_of_orders(store: Store) -> None:
    await issue(store, *[intent() for _ in range(3)])
    with store._database.raw_transaction(Mode.READ) as connection:
        if connection.dialect.name == "sqlite":
            query = "SELECT count(*) FROM credentials INDEXED BY ix_credentials_order_id"
            indexed = connection.exec_driver_sql(f"{query} WHERE order_id <> ''").scalar_one()
            assert indexed == 0
        indexes = (
            "SELECT name FROM pragma_index_list('credentials')"
            if connection.dialect.name == "sqlite"
            else "SELECT indexname FROM pg_indexes WHERE tablename = 'credentials'"
        )
        names = {row[0] for row in connection.exec_driver_sql(indexes)}
    assert {name for name in names if name.startswith("ix_")} == {
        f"ix_credentials_{name}"
        for name in (
            *("spiffe_id", "entry_id", "node_id", "unanswered", "expirable", "dead", "order_id"),
        )
    }, "another index is another write for every credential issued"
