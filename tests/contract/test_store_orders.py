"""Orders, blocked keys, epochs and CRL numbers, on both databases."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest

from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.events import Topic
from identity_broker.domain.revocation import (
    BlockedKey,
    IdentityEpoch,
    OrderState,
    RevocationOrder,
)
from identity_broker.errors import PageTokenInvalid, RevocationExists, RevocationNotFound
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId
from support.store import API, NOW, all_pages, closed, hold, intent, order, revoking

SECOND = timedelta(seconds=1)
WEB = SpiffeId.parse("spiffe://example.org/web")


def _create(one: RevocationOrder, repos: Repositories) -> None:
    repos.orders.create(one)


def _reserve(authority: str, number: int, repos: Repositories) -> None:
    repos.crl_numbers.reserve(authority, number)


async def test_an_order_comes_back_as_it_was_last_stored(store: Store) -> None:
    await store.write(lambda r: r.orders.create(order()))
    assert await store.read(lambda r: r.orders.get("rev-1")) == order()
    done = closed(revoked=3, already_revoked=2, expired=1, released=1, hold="freeze")
    await store.write(lambda r: r.orders.update(done))
    assert await store.read(lambda r: r.orders.find("rev-1")) == done
    assert await store.read(lambda r: r.orders.find("rev-2")) is None


async def test_an_id_is_given_to_one_order(store: Store) -> None:
    await store.write(lambda r: r.orders.create(order()))
    with pytest.raises(RevocationExists):
        await store.write(lambda r: r.orders.create(order(comment="another")))
    with pytest.raises(RevocationNotFound):
        await store.write(lambda r: r.orders.update(order("rev-2")))
    with pytest.raises(RevocationNotFound):
        await store.read(lambda r: r.orders.get("rev-2"))
    assert (await store.read(lambda r: r.orders.get("rev-1"))).comment == "stolen"


async def test_orders_are_listed_newest_first_and_until_they_are_finished(store: Store) -> None:
    stages = {
        "running": order("running"),
        "committed": order("committed", state=OrderState.COMMITTED, committed_at=NOW, swept=True),
        "unswept": closed("unswept", swept=False),
        "closed": closed("closed"),
    }
    for one in stages.values():
        await store.write(partial(_create, one))
    pages = await all_pages(store, lambda r, key: r.orders.page(key, 3))
    assert [one.id for page in pages for one in page] == list(stages)[::-1]
    unfinished = await store.read(lambda r: r.orders.unfinished())
    assert [one.id for one in unfinished] == ["running", "committed", "unswept"]
    with pytest.raises(PageTokenInvalid):
        await store.read(lambda r: r.orders.page("-1", 3))


async def test_a_key_is_blocked_once(store: Store) -> None:
    one = BlockedKey("ab" * 32, "rev-1", RevocationReason.KEY_COMPROMISE, NOW)
    other = replace(one, fingerprint="01" * 32)
    assert await store.write(lambda r: r.blocked_keys.block(one))
    assert not await store.write(lambda r: r.blocked_keys.block(replace(one, order_id="rev-2")))
    assert await store.write(lambda r: r.blocked_keys.block(other))
    assert await store.read(lambda r: r.blocked_keys.all()) == [other, one]
    changes = await store.changes.after(0)
    assert [(change.topic, change.key) for change in changes] == [
        (Topic.KEY, one.fingerprint),
        (Topic.KEY, other.fingerprint),
    ]


async def test_an_epoch_never_falls(store: Store) -> None:
    first = IdentityEpoch(API, NOW, NOW + 10 * SECOND)

    async def raise_to(epoch: IdentityEpoch) -> bool:
        return await store.write(lambda r: r.epochs.raise_to(epoch))

    assert await raise_to(first)
    assert not await raise_to(first)
    assert not await raise_to(IdentityEpoch(API, NOW - SECOND, NOW + 9 * SECOND))
    assert await raise_to(IdentityEpoch(API, NOW + SECOND, NOW + 9 * SECOND))
    assert await raise_to(IdentityEpoch(API, NOW, NOW + 11 * SECOND))
    (found,) = await store.read(lambda r: r.epochs.live(NOW))
    assert found == IdentityEpoch(API, NOW + SECOND, NOW + 11 * SECOND)
    changes = await store.changes.after(0)
    assert [(change.topic, change.key) for change in changes] == [(Topic.EPOCH, str(API))] * 3


async def test_epochs_are_found_by_identity_and_while_they_matter(store: Store) -> None:
    short = IdentityEpoch(API, NOW, NOW + SECOND)
    long = IdentityEpoch(WEB, NOW, NOW + 2 * SECOND)

    def fill(repos: Repositories) -> None:
        repos.epochs.raise_to(short)
        repos.epochs.raise_to(long)

    await store.write(fill)
    assert await store.read(lambda r: r.epochs.live(NOW)) == [short, long]
    assert await store.read(lambda r: r.epochs.live(NOW + SECOND)) == [long]
    nobody = SpiffeId.parse("spiffe://example.org/nobody")
    assert await store.read(lambda r: r.epochs.get_many([WEB, nobody])) == [long]
    assert await store.read(lambda r: r.epochs.get_many([])) == []
    assert await store.write(lambda r: r.retention.purge_epochs(NOW + SECOND)) == 1
    assert await store.read(lambda r: r.epochs.get_many([API, WEB])) == [long]


async def test_a_crl_number_never_falls(store: Store) -> None:
    for authority, number in (("a", 5), ("b", 2**62), ("a", 3), ("a", 7), ("a", 7)):
        await store.write(partial(_reserve, authority, number))
    assert await store.read(lambda r: r.crl_numbers.all()) == {"a": 7, "b": 2**62}


# --- retention ------------------------------------------------------------------------------------


async def test_an_order_is_kept_while_anything_names_it(store: Store) -> None:
    one = intent()
    await store.ledger.intend([one])

    def fill(repos: Repositories) -> None:
        repos.orders.create(closed("named"))
        repos.orders.create(closed("holding"))
        repos.orders.create(closed("free"))
        repos.orders.create(closed("unswept", swept=False))
        repos.orders.create(order("running"))
        repos.holds.place(hold(order_id="holding"))
        revoking(f"serial={one.id}", order="named")(repos)

    await store.write(fill)

    async def kept() -> set[str]:
        return {one.id for one in (await store.read(lambda r: r.orders.page("", 9))).items}

    assert await store.write(lambda r: r.retention.purge_orders(NOW)) == 0
    assert await store.write(lambda r: r.retention.purge_orders(NOW + SECOND)) == 1
    assert await kept() == {"named", "holding", "unswept", "running"}
    assert await store.write(lambda r: r.retention.purge_holds(NOW + 9 * SECOND)) == 0
    await store.write(lambda r: r.holds.lift("freeze", NOW + SECOND, "uid:0"))
    assert await store.write(lambda r: r.retention.purge_holds(NOW + SECOND)) == 0
    assert await store.write(lambda r: r.retention.purge_holds(NOW + 2 * SECOND)) == 1
    await store.write(lambda r: r.retention.purge_credentials(one.not_after + SECOND))
    assert await store.write(lambda r: r.retention.purge_orders(NOW + SECOND)) == 2
    assert await kept() == {"unswept", "running"}


async def test_purging_goes_in_steps(store: Store) -> None:
    def fill(repos: Repositories) -> None:
        for number in range(3):
            repos.orders.create(closed(f"rev-{number}"))
            repos.holds.place(hold(f"hold-{number}", order_id="none"))
            repos.holds.lift(f"hold-{number}", NOW, "uid:0")
            identity = SpiffeId.parse(f"spiffe://example.org/{number}")
            repos.epochs.raise_to(IdentityEpoch(identity, NOW, NOW))

    await store.write(fill)
    later = NOW + SECOND
    for step in (
        lambda r: r.retention.purge_orders(later, 2),
        lambda r: r.retention.purge_holds(later, 2),
        lambda r: r.retention.purge_epochs(later, 2),
    ):
        assert [await store.write(step) for _ in range(3)] == [2, 1, 0]
