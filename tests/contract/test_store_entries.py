"""Registration entries, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import Topic
from identity_broker.domain.paging import EntryFilter
from identity_broker.domain.selector import Selector
from identity_broker.errors import (
    BrokerError,
    EntryExists,
    EntryInvalid,
    EntryNotFound,
    MalformedRequest,
    SpiffeIdCaseConflict,
    StaleWrite,
)
from identity_broker.store import Repositories, Store
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.store import API, NOW, PARENT, SettableClock, all_pages, entry, node, put_entry

UPPER_API = SpiffeId.parse("spiffe://example.org/payments/API")
LONG_SEGMENT = "x" * 1000


def full(entry_id: str = "full") -> RegistrationEntry:
    return entry(
        entry_id,
        selectors=frozenset({Selector("unix", "uid:1"), Selector("unix", "gid:2")}),
        x509_ttl=timedelta(minutes=5),
        jwt_ttl=timedelta(minutes=1),
        dns_names=("b.example", "a.example"),
        hint="primär",
        federates_with=(TrustDomain("z.test"), TrustDomain("a.test")),
        admin=True,
        downstream=True,
        disabled=True,
        expires_at=NOW + timedelta(days=1),
        owner="payments",
        labels={"team": "pay", "env": "prod"},
        per_process=True,
        key_algorithm=KeyAlgorithm.RSA_2048,
    )


async def test_an_entry_comes_back_as_it_was_stored(store: Store) -> None:
    created = await store.write(lambda r: r.entries.create(full()))
    assert created == replace(full(), revision=1, created_at=NOW, updated_at=NOW)
    assert await store.read(lambda r: r.entries.get("full")) == created
    assert await store.read(lambda r: list(r.entries.iterate())) == [created]
    assert await store.read(lambda r: r.entries.get_many(["full", "none"])) == {"full": created}


async def test_a_replacement_counts_revisions_and_keeps_the_time_of_making(
    store: Store, clock: SettableClock
) -> None:
    await store.write(lambda r: r.entries.create(full()))
    clock.time += timedelta(hours=1)
    changed = replace(full(), owner="other", selectors=frozenset({Selector("unix", "uid:9")}))
    stored = await store.write(lambda r: r.entries.replace(changed, expected_revision=1))
    assert stored == replace(changed, revision=2, created_at=NOW, updated_at=clock.time)
    assert await store.read(lambda r: r.entries.get("full")) == stored


async def test_a_clock_that_goes_back_does_not_stop_changes(
    store: Store, clock: SettableClock
) -> None:
    await store.write(lambda r: r.entries.create(entry()))
    clock.time -= timedelta(days=1)
    stored = await store.write(lambda r: r.entries.replace(entry(owner="x")))
    assert stored.updated_at == NOW


async def test_a_stale_change_is_refused_and_changes_nothing(store: Store) -> None:
    await store.write(lambda r: r.entries.create(entry()))
    await store.write(lambda r: r.entries.replace(entry(owner="first"), 1))
    with pytest.raises(StaleWrite, match="revision 2, not 1"):
        await store.write(lambda r: r.entries.replace(entry(owner="second"), 1))
    assert (await store.read(lambda r: r.entries.get("api"))).owner == "first"


async def test_what_is_not_there_is_not_found(store: Store) -> None:
    for work in (
        lambda r: r.entries.get("none"),
        lambda r: r.entries.delete("none"),
        lambda r: r.entries.replace(entry("none")),
    ):
        with pytest.raises(EntryNotFound):
            await store.write(work)


async def test_the_same_entry_twice_is_refused_and_the_stored_one_is_named(store: Store) -> None:
    stored = await store.write(lambda r: r.entries.create(entry()))
    twin = replace(entry(), id="twin")
    for duplicate in (entry(), twin):
        with pytest.raises(EntryExists) as refused:
            await store.write(put_entry(duplicate))
        assert refused.value.fields["entry"] == stored
        assert "idb entry show api" in refused.value.hint
    await store.write(lambda r: r.entries.create(entry("other")))
    with pytest.raises(EntryExists):
        await store.write(
            lambda r: r.entries.replace(replace(entry("other"), selectors=stored.selectors))
        )


async def test_one_spiffe_id_may_have_several_entries(store: Store) -> None:
    for name in ("one", "two", "three"):
        await store.write(put_entry(entry(name)))
    assert len(await store.read(lambda r: list(r.entries.iterate()))) == 3


async def test_ids_that_differ_by_case_alone_are_refused(store: Store) -> None:
    await store.write(lambda r: r.entries.create(entry()))
    await store.write(
        lambda r: r.entries.create(entry("db", spiffe_id=SpiffeId.parse(f"{API}-db")))
    )
    with pytest.raises(SpiffeIdCaseConflict, match="payments/api"):
        await store.write(lambda r: r.entries.create(entry("up", spiffe_id=UPPER_API)))
    with pytest.raises(SpiffeIdCaseConflict):
        await store.write(lambda r: r.entries.replace(entry("db", spiffe_id=UPPER_API)))


async def test_the_other_spelling_is_free_once_the_first_is_gone(store: Store) -> None:
    await store.write(lambda r: r.entries.create(entry("one")))
    await store.write(lambda r: r.entries.create(entry("two")))
    await store.write(lambda r: r.entries.delete("one"))
    with pytest.raises(SpiffeIdCaseConflict):
        await store.write(lambda r: r.entries.create(entry("up", spiffe_id=UPPER_API)))
    await store.write(
        lambda r: r.entries.replace(
            entry("two", spiffe_id=SpiffeId.parse("spiffe://example.org/x"))
        )
    )
    await store.write(lambda r: r.entries.create(entry("up", spiffe_id=UPPER_API)))


async def test_one_entry_may_correct_the_spelling_only_by_being_made_anew(store: Store) -> None:
    # Both spellings would stand side by side inside the transaction, so this is refused too.
    await store.write(lambda r: r.entries.create(entry("one")))
    with pytest.raises(SpiffeIdCaseConflict):
        await store.write(lambda r: r.entries.replace(entry("one", spiffe_id=UPPER_API)))


async def test_of_spellings_registered_at_once_one_wins(store: Store) -> None:
    spellings = [SpiffeId.parse(f"spiffe://example.org/{w}") for w in ("abc", "Abc", "aBc", "abC")]

    async def register(number: int) -> str:
        wanted = entry(f"e{number}", spiffe_id=spellings[number % 4])
        try:
            return str((await store.write(lambda r: r.entries.create(wanted))).spiffe_id)
        except SpiffeIdCaseConflict:
            return ""

    won = set(await asyncio.gather(*[register(number) for number in range(24)])) - {""}
    assert len(won) == 1
    assert {str(e.spiffe_id) for e in await store.read(lambda r: list(r.entries.iterate()))} == won


async def test_a_hint_stands_once_below_a_parent(store: Store) -> None:
    await store.write(lambda r: r.entries.create(entry("one", hint="db")))
    await store.write(lambda r: r.entries.create(entry("none")))
    await store.write(lambda r: r.entries.create(entry("none-2")))
    other_parent = SpiffeId.parse("spiffe://example.org/idb/node/join_token/web-2")
    await store.write(lambda r: r.entries.create(entry("far", hint="db", parent_id=other_parent)))
    with pytest.raises(EntryInvalid, match='"one" has the same parent and the same hint'):
        await store.write(lambda r: r.entries.create(entry("two", hint="db")))
    with pytest.raises(EntryInvalid):
        await store.write(lambda r: r.entries.replace(entry("none", hint="db")))


async def test_the_longest_values_fit(store: Store) -> None:
    spiffe_id = SpiffeId.parse("spiffe://example.org/" + LONG_SEGMENT + "/" + "y" * 1026)
    parent = SpiffeId.parse("spiffe://example.org/" + "z" * 1000 + "/" + "w" * 1026)
    assert len(str(spiffe_id)) == len(str(parent)) == 2048
    chosen = frozenset(Selector("unix", f"{number:04}" + "ü" * 510) for number in range(64))
    created = await store.write(
        lambda r: r.entries.create(
            entry(
                "e" * 64, spiffe_id=spiffe_id, parent_id=parent, selectors=chosen, hint="h" * 1024
            )
        )
    )
    assert await store.read(lambda r: r.entries.get("e" * 64)) == created


async def test_a_refused_item_leaves_its_batch_usable(store: Store) -> None:
    def batch(repos: Repositories) -> list[str]:
        outcomes = []
        for item in (
            entry("one"),
            entry("one"),
            entry("two", spiffe_id=UPPER_API),
            entry("three", hint="h"),
            entry("four", hint="h"),
            entry("five"),
        ):
            try:
                outcomes.append(repos.entries.create(item).id)
            except BrokerError as error:
                outcomes.append(error.reason)
        return outcomes

    assert await store.write(batch) == [
        "one",
        "ENTRY_EXISTS",
        "SPIFFE_ID_CASE_CONFLICT",
        "three",
        "ENTRY_INVALID",
        "five",
    ]
    stored = await store.read(lambda r: [e.id for e in r.entries.iterate()])
    assert sorted(stored) == ["five", "one", "three"]


async def test_a_refused_transaction_leaves_nothing_behind(store: Store) -> None:
    def half(repos: Repositories) -> None:
        repos.entries.create(entry("one"))
        repos.entries.create(entry("one"))

    with pytest.raises(EntryExists):
        await store.write(half)
    assert await store.read(lambda r: list(r.entries.iterate())) == []
    assert await store.changes.latest() == 0
    await store.write(put_entry(entry("up", spiffe_id=UPPER_API)))


async def test_pages_hold_every_match_once(store: Store) -> None:
    def fill(repos: Repositories) -> None:
        for number in range(25):
            repos.entries.create(
                entry(
                    f"e{number:02}",
                    owner="even" if number % 2 == 0 else "odd",
                    selectors=frozenset(
                        {
                            Selector("n", str(number)),
                            Selector("m", str(number % 5)),
                            Selector("a", "b"),
                        }
                    ),
                )
            )

    await store.write(fill)

    async def pages(wanted: EntryFilter, size: int) -> list[list[str]]:
        found = await all_pages(store, lambda r, key: r.entries.page(wanted, key, size))
        return [[item.id for item in page] for page in found]

    async def ids(wanted: EntryFilter, size: int) -> list[str]:
        return [entry_id for page in await pages(wanted, size) for entry_id in page]

    everything = await pages(EntryFilter(), 10)
    assert [len(page) for page in everything] == [10, 10, 5]
    assert await ids(EntryFilter(), 10) == [f"e{number:02}" for number in range(25)]
    assert await pages(EntryFilter(), 25) == [await ids(EntryFilter(), 10)]
    assert await ids(EntryFilter(owner="odd"), 5) == [f"e{n:02}" for n in range(1, 25, 2)]
    chosen = EntryFilter(selectors=frozenset({Selector("m", "3"), Selector("a", "b")}))
    assert await ids(chosen, 2) == ["e03", "e08", "e13", "e18", "e23"]
    assert await pages(EntryFilter(selectors=frozenset({Selector("m", "9")})), 2) == [[]]
    assert await pages(EntryFilter(spiffe_id=UPPER_API), 2) == [[]]
    assert len((await pages(EntryFilter(spiffe_id=API, parent_id=PARENT), 100))[0]) == 25
    assert await pages(EntryFilter(hint="none"), 2) == [[]]


async def test_every_change_of_an_entry_is_in_the_feed(store: Store) -> None:
    await store.write(lambda r: r.entries.create(entry("one")))
    await store.write(lambda r: r.entries.replace(entry("one", owner="x")))
    await store.write(lambda r: r.entries.delete("one"))
    changes = await store.changes.after(0)
    assert [(change.topic, change.key) for change in changes] == [(Topic.ENTRY, "one")] * 3


async def test_a_deleted_entry_takes_its_selectors_with_it(store: Store, tmp_path: Path) -> None:
    await store.write(lambda r: r.entries.create(full("one")))
    await store.write(lambda r: r.entries.delete("one"))
    again = entry("one", selectors=frozenset({Selector("unix", "uid:1")}))
    await store.write(lambda r: r.entries.create(again))
    assert (await store.read(lambda r: r.entries.get("one"))).selectors == again.selectors


@pytest.mark.parametrize("text", ["a\x00b", "\ud800"], ids=["nul", "surrogate"])
async def test_a_character_that_cannot_be_stored_is_the_caller_s_mistake(
    store: Store, text: str
) -> None:
    reads: list[Callable[[Repositories], object]] = [
        lambda r: r.entries.page(EntryFilter(owner=text), "", 1),
        lambda r: r.entries.get(text),
        lambda r: r.credentials.get(text),
    ]
    for read in reads:
        with pytest.raises(MalformedRequest, match="cannot be stored") as refused:
            await store.read(read)
        assert refused.value.retry_after is None
    with pytest.raises(MalformedRequest, match="cannot be stored"):
        await store.write(lambda r: r.nodes.upsert(node(attestor=text)))
    assert await store.changes.latest() == 0
    await store.check()
