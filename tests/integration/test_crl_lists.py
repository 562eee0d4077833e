"""Revocation lists with a clock and parts that are set by hand: numbers, deltas, what fails."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from sqlalchemy import event

from identity_broker.domain.credential import CredentialKind, Revocation, RevocationReason
from identity_broker.domain.revocation import SubjectKind
from identity_broker.errors import (
    AuthorityNotFound,
    SigningBackendUnavailable,
    StoreUnavailable,
)
from identity_broker.lifecycle.crl import authority as authority_module
from identity_broker.lifecycle.crl import entries as entries_module
from identity_broker.lifecycle.crl import lists as lists_module
from identity_broker.lifecycle.crl.document import ListKind
from identity_broker.lifecycle.crl.lists import VALIDITY, RevocationLists
from identity_broker.lifecycle.crl.numbers import BLOCK, ListNumbers
from identity_broker.lifecycle.directory import Update
from identity_broker.store import Store
from identity_ca.authority import AuthorityState
from identity_ca.distribution import DistributionPoints, Shard, shard_of
from identity_ca.errors import BackendUnavailable
from support.lists import base_of, number_of, parsed, reasons, serials
from support.store import NOW, SettableClock
from support.verbs import NODE, OPERATOR, START, Parts

MINUTE = timedelta(minutes=1)
POINTS = DistributionPoints("http://idb.example.org:8082", 64)


# --- numbers --------------------------------------------------------------------------------------


async def test_numbers_grow_across_restarts_and_clocks_set_back(store: Store) -> None:
    clock = SettableClock()
    seen = []
    for days in (0, -1, 2, -400):
        clock.time = NOW + timedelta(days=days)
        numbers = ListNumbers(store, clock)
        for _ in range(3):
            seen.append(await numbers.next("a"))
            clock.time -= MINUTE
    assert seen == sorted(set(seen))
    assert seen[0] == int(NOW.timestamp() * 1000)


async def test_two_brokers_never_use_the_same_number(store: Store) -> None:
    clock = SettableClock()
    brokers = [ListNumbers(store, clock) for _ in range(3)]
    drawn = await asyncio.gather(*(one.next("a") for one in brokers for _ in range(20)))
    assert len(set(drawn)) == 60
    assert await brokers[0].next("b") == int(NOW.timestamp() * 1000)


async def test_most_numbers_need_no_write(parts: Parts) -> None:
    clock = parts.clock
    numbers = ListNumbers(parts.store, clock)
    first = await numbers.next("a")
    with unwritable(parts.store):
        for _ in range(50):
            clock.time += timedelta(seconds=1)
            await numbers.next("a")
        clock.time += timedelta(milliseconds=BLOCK)
        with pytest.raises(StoreUnavailable):
            await numbers.next("a")
    assert await numbers.next("a") > first + BLOCK


@contextmanager
def unwritable(store: Store) -> Any:
    """The disk is full: reading goes on."""

    def freeze(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA query_only = ON")

    engine = store._database.engine
    event.listen(engine, "connect", freeze)
    engine.dispose()
    yield
    event.remove(engine, "connect", freeze)
    engine.dispose()


# --- what stands in which list --------------------------------------------------------------------


@pytest.fixture
async def lists(parts: Parts) -> RevocationLists:
    made = made_lists(parts)
    await made.rebuild()
    return made


def made_lists(parts: Parts, **options: Any) -> RevocationLists:
    options = {"points": POINTS, **options}
    return RevocationLists(
        signing=parts.signing,
        directory=parts.directory,
        store=parts.store,
        clock=parts.clock,
        **options,
    )


def active(parts: Parts) -> str:
    authority = parts.signing.authorities.x509_set.active
    assert authority is not None
    return authority.id


def shard_for(serial: str) -> Shard:
    return Shard(shard_of(int(serial, 16), POINTS.shards), POINTS.shards)


async def crl_of(
    lists: RevocationLists, parts: Parts, kind: ListKind, serial: str = ""
) -> x509.CertificateRevocationList:
    shard = shard_for(serial) if serial else None
    document = await lists.document(active(parts), kind, shard)
    [crl] = parsed([document.der])
    assert document.entries == len(crl)
    assert document.number == number_of(crl)
    assert document.next_update == crl.next_update_utc
    return crl


async def test_part_and_delta_have_it_before_the_full_list_is_made(
    parts: Parts, lists: RevocationLists
) -> None:
    await parts.admit()
    bad = await parts.svid()
    before = await crl_of(lists, parts, ListKind.FULL)
    await parts.end_one(bad.serial)
    assert serials(await crl_of(lists, parts, ListKind.SHARD, bad.serial)) == [bad.serial]
    delta = await crl_of(lists, parts, ListKind.DELTA)
    assert serials(delta) == [bad.serial]
    assert base_of(delta) == number_of(before)
    assert serials(await crl_of(lists, parts, ListKind.FULL)) == []
    await lists.rebuild()
    full = await crl_of(lists, parts, ListKind.FULL)
    assert serials(full) == [bad.serial]
    # The delta goes on to build on what verifiers may have, and comes after the newest.
    delta = await crl_of(lists, parts, ListKind.DELTA)
    assert base_of(delta) == number_of(before)
    assert number_of(delta) > number_of(full)
    # Nobody has a list any more that has expired: the delta builds on a newer one.
    for _ in range(4):
        parts.clock.time += VALIDITY / 2
        await lists.rebuild()
    delta = await crl_of(lists, parts, ListKind.DELTA)
    assert serials(delta) == []
    assert base_of(delta) > number_of(full)


async def test_a_part_is_signed_when_its_content_changed_and_when_it_is_due(
    parts: Parts, lists: RevocationLists
) -> None:
    await parts.admit()
    first, second = await parts.svid(), await parts.svid()
    while shard_for(first.serial) == shard_for(second.serial):
        second = await parts.svid()

    async def part(serial: str) -> int:
        return number_of(await crl_of(lists, parts, ListKind.SHARD, serial))

    numbers = [await part(first.serial), await part(second.serial)]
    await parts.end_one(first.serial)
    assert await part(second.serial) == numbers[1]
    assert await part(first.serial) > numbers[1]
    parts.clock.time += VALIDITY / 2 + MINUTE
    assert await part(second.serial) > numbers[1]
    parts.clock.time -= VALIDITY
    again = await part(second.serial)
    assert again == await part(second.serial)


async def test_what_is_released_leaves_and_a_better_reason_replaces(
    parts: Parts, lists: RevocationLists
) -> None:
    await parts.admit()
    held, other = await parts.svid(), await parts.svid()
    hold = RevocationReason.CERTIFICATE_HOLD
    await parts.end(SubjectKind.SERIAL, held.serial, hold, hold_name="pause")
    await parts.end(SubjectKind.SERIAL, other.serial, hold)
    await lists.rebuild()
    on_hold = x509.ReasonFlags.certificate_hold
    full = await crl_of(lists, parts, ListKind.FULL)
    assert reasons(full) == {held.serial: on_hold, other.serial: on_hold}
    await parts.end_one(other.serial)
    await parts.revoke.lift("pause", OPERATOR)
    await parts.directory.sync()
    assert serials(await crl_of(lists, parts, ListKind.SHARD, held.serial)) == []
    stolen = x509.ReasonFlags.key_compromise
    assert reasons(await crl_of(lists, parts, ListKind.DELTA)) == {
        held.serial: x509.ReasonFlags.remove_from_crl,
        other.serial: stolen,
    }
    await lists.rebuild()
    assert reasons(await crl_of(lists, parts, ListKind.FULL)) == {other.serial: stolen}


async def test_a_restart_begins_with_what_is_revoked_and_higher_numbers(
    parts: Parts, lists: RevocationLists
) -> None:
    await parts.admit()
    bad = await parts.svid()
    await parts.end_one(bad.serial)
    await lists.rebuild()
    last = number_of(await crl_of(lists, parts, ListKind.DELTA))
    parts.clock.time -= timedelta(days=1)
    again = made_lists(parts)
    assert await again.rebuild()
    full = await crl_of(again, parts, ListKind.FULL)
    assert serials(full) == [bad.serial]
    assert number_of(full) > last
    assert serials(await crl_of(again, parts, ListKind.DELTA)) == []
    assert base_of(await crl_of(again, parts, ListKind.DELTA)) == number_of(full)


async def test_more_changes_than_fit_begin_a_new_delta(
    parts: Parts, lists: RevocationLists, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries_module, "MOST_CHANGES", 5)
    await parts.admit()
    issued = [await parts.svid() for _ in range(8)]
    for one in issued[:4]:
        await parts.end_one(one.serial)
    await lists.rebuild()
    middle = number_of(await crl_of(lists, parts, ListKind.FULL))
    for one in issued[4:]:
        await parts.end_one(one.serial)
    await lists.rebuild()
    delta = await crl_of(lists, parts, ListKind.DELTA)
    assert base_of(delta) == middle
    assert serials(delta) == sorted(one.serial for one in issued[4:])


async def test_a_revoked_authority_keeps_its_list_until_it_expires(
    parts: Parts, lists: RevocationLists
) -> None:
    await parts.admit()
    bad = await parts.svid()
    gone = active(parts)
    await parts.end(SubjectKind.AUTHORITY, gone, RevocationReason.CA_COMPROMISE)
    await lists.rebuild()
    states = {one.id: one.state for one in parts.signing.authorities.x509_set}
    assert states[gone] is AuthorityState.REVOKED
    document = await lists.document(gone, ListKind.FULL)
    assert bad.serial in serials(parsed([document.der])[0])
    assert document.der in lists.current
    assert len(lists.current) == 2
    parts.clock.time += timedelta(days=1)
    await lists.rebuild()
    with pytest.raises(AuthorityNotFound):
        await lists.document(gone, ListKind.FULL)


async def test_what_there_is_not(parts: Parts, lists: RevocationLists) -> None:
    with pytest.raises(AuthorityNotFound):
        await lists.document("0" * 40, ListKind.FULL)
    for points, kind, shard in (
        (POINTS, ListKind.SHARD, None),
        (None, ListKind.SHARD, Shard(0, 1)),
    ):
        made = made_lists(parts, points=points)
        await made.rebuild()
        with pytest.raises(AuthorityNotFound):
            await made.document(active(parts), kind, shard)


# --- what fails -----------------------------------------------------------------------------------


@pytest.fixture
def away(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes the key manager unreachable for a while."""

    def fail(key_id: str) -> Any:
        raise BackendUnavailable("the key manager does not answer")

    @contextmanager
    def gone() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(parts.keys, "load", fail)
            yield

    return gone


async def test_parts_and_deltas_stay_as_they_were_while_nobody_signs(
    parts: Parts,
    lists: RevocationLists,
    away: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(authority_module, "_RETRY_SECONDS", 0.02)
    await parts.admit()
    bad = await parts.svid()
    part = await crl_of(lists, parts, ListKind.SHARD, bad.serial)
    with away():
        await parts.end_one(bad.serial)
        for _ in range(3):
            assert await crl_of(lists, parts, ListKind.SHARD, bad.serial) == part
        with pytest.raises(SigningBackendUnavailable):
            await lists.document(active(parts), ListKind.DELTA)
        parts.clock.time += VALIDITY + MINUTE
        # Better none than one that is out of date: a verifier refuses it anyway.
        with pytest.raises(SigningBackendUnavailable):
            await lists.document(active(parts), ListKind.SHARD, shard_for(bad.serial))
    await asyncio.sleep(0.03)
    assert serials(await crl_of(lists, parts, ListKind.SHARD, bad.serial)) == [bad.serial]


async def test_a_full_disk_is_waited_out_and_told(
    parts: Parts, lists: RevocationLists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number can be reserved: the former list stays, and readiness says why."""
    monkeypatch.setattr(lists_module, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(lists_module, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lists_module, "_SILENCE_SECONDS", 0.1)
    await lists.check()
    before = lists.current
    with unwritable(parts.store):
        parts.clock.time += VALIDITY / 2 + MINUTE
        running = asyncio.create_task(lists.run())
        async with asyncio.timeout(10):
            with pytest.raises(StoreUnavailable, match="revocation lists"):
                while True:
                    await lists.check()
                    await asyncio.sleep(0.01)
        assert lists.current == before
        until = parsed(before)[0].next_update_utc
        assert until is not None
        assert until > parts.clock.now()
    async with asyncio.timeout(10):
        while lists.current == before:
            await asyncio.sleep(0.01)
    await lists.check()
    running.cancel()


async def test_no_list_is_signed_while_the_change_feed_is_lost(
    parts: Parts, lists: RevocationLists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh time would say that there is nothing else revoked."""
    monkeypatch.setattr(authority_module, "_RETRY_SECONDS", 0.02)
    await parts.admit()
    asked, other = await parts.svid(), await parts.svid()
    while shard_for(asked.serial) == shard_for(other.serial):
        other = await parts.svid()

    async def known() -> list[x509.CertificateRevocationList]:
        return [
            await crl_of(lists, parts, ListKind.FULL),
            await crl_of(lists, parts, ListKind.DELTA),
            await crl_of(lists, parts, ListKind.SHARD, asked.serial),
        ]

    before, told = await known(), lists.current
    parts.directory._followed_at -= 60
    parts.clock.time += VALIDITY / 2 + MINUTE
    with pytest.raises(StoreUnavailable):
        await lists.rebuild()
    assert await known() == before
    assert lists.current == told
    with pytest.raises(StoreUnavailable):
        await lists.check()
    await asyncio.sleep(0.03)
    with pytest.raises(StoreUnavailable):
        await lists.document(active(parts), ListKind.SHARD, shard_for(other.serial))
    parts.directory._followed_at += 60
    await asyncio.sleep(0.03)
    assert await lists.rebuild()
    for old, new in zip(before, await known(), strict=True):
        assert new.last_update_utc > old.last_update_utc
    await lists.check()


async def test_a_feed_that_is_back_is_soon_followed_by_lists(
    parts: Parts, lists: RevocationLists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it was away."""
    monkeypatch.setattr(lists_module, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(lists_module, "_LOOK_SECONDS", 0.02)
    before = lists.current
    parts.directory._followed_at -= 60
    parts.clock.time += VALIDITY / 2 + MINUTE
    running = asyncio.create_task(lists.run())
    await asyncio.sleep(2.0)
    assert lists.current == before
    parts.directory._followed_at += 60
    async with asyncio.timeout(5):
        while lists.current == before:
            await asyncio.sleep(0.01)
    running.cancel()


async def test_a_long_list_costs_a_bounded_share_of_a_cpu(parts: Parts) -> None:
    """News every few milliseconds: full lists are made at most a tenth of the time."""
    authority_id = active(parts)
    lists = made_lists(parts)
    some = [revocation(authority_id, number) for number in range(1, 60_001)]
    update(parts, some)
    await lists.rebuild()
    made: list[tuple[bytes, ...]] = []
    lists.listen(made.append)
    running = asyncio.create_task(lists.run())
    busy, began = time.process_time(), time.monotonic()
    number = 100_000
    last = ""
    while time.monotonic() < began + 1.5:
        number += 1
        one = revocation(authority_id, number)
        last = one.id
        update(parts, [one])
        await asyncio.sleep(0.02)
    share = (time.process_time() - busy) / (time.monotonic() - began)
    rounds = len(made)
    async with asyncio.timeout(10):
        while last not in serials(parsed([made[-1][0]])[0]):
            await asyncio.sleep(0.05)
    running.cancel()
    assert 1 <= rounds < 40
    assert share < 0.8, share


def update(parts: Parts, revocations: list[Revocation]) -> None:
    """As the change feed would tell it."""
    news = Update(parts.directory.seq)
    news.revocations = revocations
    parts.directory._tell(news)


def revocation(authority_id: str, serial: int) -> Revocation:
    return Revocation(
        id=f"{serial:040x}",
        kind=CredentialKind.X509,
        spiffe_id=NODE,
        revoked_at=START,
        expires_at=START + timedelta(days=1),
        reason=RevocationReason.KEY_COMPROMISE,
        authority_id=authority_id,
    )


async def test_nodes_are_told_at_their_pace_and_askers_at_once(parts: Parts) -> None:
    authority_id = active(parts)
    octets: list[int] = []

    def pace(size: int) -> timedelta:
        octets.append(size)
        return timedelta(seconds=0.4)

    lists = made_lists(parts, pace=pace)
    await lists.rebuild()
    told: list[int] = []
    lists.listen(lambda crls: told.append(len(parsed(crls)[0])))
    for number in range(1, 4):
        update(parts, [revocation(authority_id, number)])
        assert await lists.rebuild()
        assert len(await crl_of(lists, parts, ListKind.FULL)) == number
    assert told == []
    async with asyncio.timeout(5):
        while not told:
            await asyncio.sleep(0.02)
    assert told == [3]
    assert octets[-1] == sum(map(len, lists.current))


async def test_what_is_too_long_for_a_node_is_not_told_to_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = made_lists(parts)
    await lists.rebuild()
    [der] = lists.current
    monkeypatch.setattr(lists_module, "MOST_TOLD_OCTETS", len(der))
    update(parts, [revocation(active(parts), 7)])
    assert await lists.rebuild()
    assert lists.current == ()
    assert serials(await crl_of(lists, parts, ListKind.FULL)) == [f"{7:040x}"]


async def test_uncommon_parts_are_made_at_a_bounded_rate(parts: Parts, tmp_path: Path) -> None:
    """Anybody may name any number of parts: that must not keep a CPU busy."""
    authority_id = active(parts)
    lists = made_lists(parts)
    update(parts, [revocation(authority_id, number) for number in range(1, 20_001)])
    await lists.rebuild()
    refused = 0
    for of in range(100, 160):
        try:
            await lists.document(authority_id, ListKind.SHARD, Shard(3, of))
        except SigningBackendUnavailable:
            refused += 1
    assert refused > 20
    document = await lists.document(authority_id, ListKind.SHARD, Shard(3, 64))
    assert document.entries == sum(1 for number in range(1, 20_001) if number % 64 == 3)
