"""Holds, on both databases: what they stop, now and later, and that lifting undoes just that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest

from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import Topic
from identity_broker.domain.paging import Page
from identity_broker.domain.revocation import Hold, RevocationSubject, SubjectKind
from identity_broker.errors import HoldExists, HoldNotFound, PageTokenInvalid
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId
from support.store import (
    API,
    NOW,
    PARENT,
    SettableClock,
    all_pages,
    entry,
    hold,
    node,
    of,
    put_entry,
    put_node,
)

WEB = SpiffeId.parse("spiffe://example.org/web")
LATER = NOW + timedelta(hours=1)
SELECT = SubjectKind.SELECT


def place(new: Hold) -> Callable[[Repositories], tuple[str, ...]]:
    return lambda repos: repos.holds.place(new)


def lift(name: str, by: str = "uid:0") -> Callable[[Repositories], tuple[Hold, tuple[str, ...]]]:
    return lambda repos: repos.holds.lift(name, LATER, by)


def _replaced(change: RegistrationEntry, repos: Repositories) -> RegistrationEntry:
    return repos.entries.replace(change)


def _entry(entry_id: str, repos: Repositories) -> RegistrationEntry:
    return repos.entries.get(entry_id)


def _holds(repos: Repositories, key: str, *, lifted: bool) -> Page[Hold]:
    return repos.holds.page(key, 3, include_lifted=lifted)


async def held(store: Store) -> dict[str, str]:
    return {one.id: one.held_by for one in await store.read(lambda r: list(r.entries.iterate()))}


async def changes(store: Store, after: int) -> list[tuple[Topic, str]]:
    return [(change.topic, change.key) for change in await store.changes.after(after)]


@pytest.fixture
async def entries(store: Store) -> None:
    for one in (
        entry("api-1", owner="shop"),
        entry("api-2", labels={"env": "prod"}, disabled=True),
        entry("web", spiffe_id=WEB, labels={"env": "prod"}),
    ):
        await store.write(put_entry(one))


async def test_a_hold_is_seen_in_the_entries_it_covers(store: Store, entries: None) -> None:
    before = await store.changes.latest()
    assert await store.write(place(hold())) == ("api-1", "api-2")
    assert await held(store) == {"api-1": "freeze", "api-2": "freeze", "web": ""}
    one = await store.read(lambda r: r.entries.get("api-1"))
    assert (one.revision, one.is_told) == (2, False)
    assert await changes(store, before) == [
        (Topic.ENTRY, "api-1"),
        (Topic.ENTRY, "api-2"),
        (Topic.HOLD, "freeze"),
    ]
    assert await store.read(lambda r: r.holds.held_entry_ids("freeze", 9)) == ("api-1", "api-2")
    assert await store.read(lambda r: r.holds.held_entry_ids("freeze", 1)) == ("api-1",)
    assert await store.read(lambda r: r.holds.get("freeze")) == hold()


async def test_lifting_frees_what_nothing_else_holds(store: Store, entries: None) -> None:
    await store.write(place(hold("first")))
    await store.write(place(hold("second", of(SELECT, "label.env=prod"))))
    assert await held(store) == {"api-1": "first", "api-2": "first", "web": "second"}
    before = await store.changes.latest()
    lifted, freed = await store.write(lift("first", "alice"))
    assert lifted == hold("first", lifted_at=LATER, lifted_by="alice")
    assert freed == ("api-1",)
    assert await held(store) == {"api-1": "", "api-2": "second", "web": "second"}
    assert {*await changes(store, before)} == {
        (Topic.ENTRY, "api-1"),
        (Topic.ENTRY, "api-2"),
        (Topic.HOLD, "first"),
    }
    again = await store.read(lambda r: r.entries.get("api-1"))
    assert (again.revision, again.is_told) == (3, True)
    assert await store.read(lambda r: r.holds.held_entry_ids("first", 9)) == ()
    # Lifting again is no news.
    before = await store.changes.latest()
    assert await store.write(lift("first", "bob")) == (lifted, ())
    assert await store.changes.latest() == before
    # And what is disabled is not told just because nothing holds it.
    assert (await store.write(lift("second")))[1] == ("api-2", "web")
    assert not (await store.read(lambda r: r.entries.get("api-2"))).is_told


@pytest.mark.parametrize(
    ("subject", "covered"),
    [
        (of(SubjectKind.ENTRY, "web"), {"web"}),
        (of(SubjectKind.ENTRY, "later"), set()),
        (of(SELECT, "owner=shop"), {"api-1"}),
        (of(SELECT, "spiffe-id=/payments/* label.env=prod"), {"api-2"}),
        (of(SELECT, "spiffe-id=/*"), {"api-1", "api-2", "web"}),
        (of(SELECT, f"spiffe-id={API} kind=jwt"), set()),
        (of(SELECT, "issued-after=2h"), set()),
        (of(SubjectKind.SERIAL, "ab"), set()),
        (of(SubjectKind.JTI, "ab"), set()),
        (of(SubjectKind.KEY_FINGERPRINT, "ab" * 32), set()),
        (of(SubjectKind.AUTHORITY, "ab"), set()),
        (of(SubjectKind.NODE, PARENT), set()),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)
async def test_a_hold_stops_what_its_subject_names(
    store: Store, entries: None, subject: RevocationSubject, covered: set[str]
) -> None:
    assert {*await store.write(place(hold(on=subject)))} == covered
    assert {name for name, by in (await held(store)).items() if by} == covered
    assert {*(await store.write(lift("freeze")))[1]} == covered


async def test_what_is_written_later_is_held_from_the_start(store: Store) -> None:
    await store.write(place(hold("freeze", of(SELECT, "spiffe-id=/payments/* label.env=prod"))))
    prod = {"env": "prod"}
    assert (await store.write(put_entry(entry("new", labels=prod)))).held_by == "freeze"
    assert (await store.write(put_entry(entry("free")))).held_by == ""
    for change, holds in (
        (entry("free", labels=prod), "freeze"),
        (entry("free", labels=prod, spiffe_id=WEB), ""),
        (entry("new", labels=prod, held_by=""), "freeze"),
        (entry("new", labels={}, held_by="freeze"), ""),
        (entry("new", held_by="made up"), ""),
    ):
        stored = await store.write(partial(_replaced, change))
        assert stored.held_by == holds
        assert await store.read(partial(_entry, change.id)) == stored
    assert await held(store) == {"new": "", "free": ""}


async def test_several_in_one_transaction_are_held_as_the_last_left_it(store: Store) -> None:
    def everything(repos: Repositories) -> list[str]:
        seen = [repos.entries.create(entry("one")).held_by]
        repos.holds.place(hold())
        seen += [repos.entries.create(entry("two")).held_by, repos.entries.get("one").held_by]
        repos.holds.lift("freeze", NOW, "uid:0")
        seen += [repos.entries.create(entry("three")).held_by, repos.entries.get("two").held_by]
        return seen

    assert await store.write(everything) == ["", "freeze", "freeze", "", ""]


async def test_a_hold_whose_time_is_over_is_due(
    store: Store, clock: SettableClock, entries: None
) -> None:
    await store.write(place(hold("hour", until=LATER)))
    await store.write(place(hold("day", until=NOW + timedelta(days=1))))
    await store.write(place(hold("ever")))
    assert await store.read(lambda r: r.holds.due(LATER - timedelta(microseconds=1))) == []
    (due,) = await store.read(lambda r: r.holds.due(LATER))
    assert due.name == "hour"
    # Until it is lifted it stands in what it held; what is new is held by one that lasts.
    clock.time = LATER
    assert (await held(store))["api-1"] == "hour"
    assert (await store.write(put_entry(entry("new")))).held_by == "day"
    assert (await store.write(lift("hour", "time")))[1] == ()
    assert await held(store) == {"api-1": "day", "api-2": "day", "web": "", "new": "day"}
    assert await store.read(lambda r: r.holds.due(LATER)) == []


async def test_names_are_not_used_twice(store: Store) -> None:
    await store.write(place(hold()))
    with pytest.raises(HoldExists):
        await store.write(place(hold(on=of(SELECT, "entry=web"))))
    await store.write(lift("freeze"))
    with pytest.raises(HoldExists):
        await store.write(place(hold()))
    for unknown in (
        lambda r: r.holds.get("none"),
        lambda r: r.holds.held_entry_ids("none", 1),
        lambda r: r.holds.lift("none", NOW, "x"),
    ):
        with pytest.raises(HoldNotFound):
            await store.write(unknown)


async def test_pages_are_newest_first(store: Store) -> None:
    names = [f"hold-{number}" for number in range(7)]
    for name in names:
        await store.write(place(hold(name)))
    await store.write(lift("hold-3"))
    for lifted, wanted in ((True, names), (False, [n for n in names if n != "hold-3"])):
        pages = await all_pages(store, partial(_holds, lifted=lifted))
        assert [one.name for page in pages for one in page] == wanted[::-1]
    with pytest.raises(PageTokenInvalid):
        await store.read(lambda r: r.holds.page("x", 3))
    many = await store.read(lambda r: r.holds.get_many(["hold-3", "hold-1", "none"]))
    assert [one.name for one in many] == ["hold-1", "hold-3"]


# --- nodes ----------------------------------------------------------------------------------------


async def banned(store: Store) -> str | None:
    found = await store.read(lambda r: r.nodes.get(PARENT))
    return found.ban_reason if found.banned else None


@pytest.mark.parametrize("kind", [SubjectKind.NODE, SubjectKind.SPIFFE_ID])
async def test_a_hold_on_a_node_bans_it(store: Store, kind: SubjectKind) -> None:
    await store.write(put_node("web-1"))
    await store.write(put_node("web-2"))
    before = await store.changes.latest()
    assert await store.write(place(hold(on=of(kind, PARENT)))) == ()
    assert await banned(store) == "on hold: freeze"
    assert not (await store.read(lambda r: r.nodes.get(node("web-2").spiffe_id))).banned
    assert await changes(store, before) == [(Topic.NODE, str(PARENT)), (Topic.HOLD, "freeze")]
    await store.write(lift("freeze"))
    assert await banned(store) is None
    assert await store.read(lambda r: r.nodes.get(PARENT)) == node("web-1")


async def test_a_ban_of_another_reason_stays(store: Store) -> None:
    stolen = node("web-1", banned=True, ban_reason="stolen")
    await store.write(lambda r: r.nodes.upsert(stolen))
    await store.write(place(hold(on=of(SubjectKind.NODE, PARENT))))
    assert await banned(store) == "stolen"
    await store.write(lift("freeze"))
    assert await store.read(lambda r: r.nodes.get(PARENT)) == stolen


async def test_a_node_stays_banned_until_its_last_hold_is_lifted(store: Store) -> None:
    await store.write(put_node("web-1"))
    for name in ("first", "second"):
        await store.write(place(hold(name, of(SubjectKind.NODE, PARENT))))
    assert await store.read(lambda r: r.holds.of_node(PARENT)) == "first"
    await store.write(lift("first"))
    assert await banned(store) == "on hold: second"
    await store.write(lift("second"))
    assert await banned(store) is None
    assert await store.read(lambda r: r.holds.of_node(PARENT)) == ""


async def test_a_node_that_was_not_known_is_banned_when_it_comes(store: Store) -> None:
    await store.write(place(hold(on=of(SubjectKind.NODE, PARENT))))
    await store.write(put_node("web-1"))
    assert await banned(store) == "on hold: freeze"
    # Letting it in takes lifting the hold.
    await store.write(lambda r: r.nodes.upsert(replace(node("web-1"), serial="cd" * 20)))
    assert await banned(store) == "on hold: freeze"
    await store.write(lift("freeze"))
    assert await banned(store) is None


async def test_a_node_that_is_gone_does_not_keep_its_hold(store: Store) -> None:
    await store.write(put_node("web-1"))
    await store.write(place(hold(on=of(SubjectKind.NODE, PARENT))))
    await store.write(lambda r: r.nodes.delete(PARENT))
    await store.write(lift("freeze"))
    await store.write(put_node("web-1"))
    assert await banned(store) is None


async def test_many_entries_are_held_and_freed_at_once(store: Store) -> None:
    many = 1_100  # more than fit in one statement

    def fill(repos: Repositories) -> None:
        for number in range(many):
            repos.entries.create(entry(f"e{number}"))

    await store.write(fill)
    assert len(await store.write(place(hold()))) == many
    assert {*(await held(store)).values()} == {"freeze"}
    assert len((await store.write(lift("freeze")))[1]) == many
    assert {*(await held(store)).values()} == {""}
