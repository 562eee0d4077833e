"""What the agent's core must keep whatever the broker, the clocks and the workloads do."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from identity_broker.agent.denied import GRACE
from identity_broker.agent.identity import X509Identity
from identity_broker.agent.match import EntryIndex, WatcherIndex, kind_of, wanted_of
from identity_broker.agent.mirror import (
    INSIST_SECONDS,
    EntryChange,
    Mirror,
    Mismatch,
    OutOfStep,
)
from identity_broker.agent.schedule import Rank, Schedule
from identity_broker.agent.svids import Entries, Issued, SvidKey, Svids
from identity_ca.spiffe_id import TrustDomain
from identity_client.node.values import (
    SyncedBundle,
    SyncedEntry,
    SyncedRevocation,
    SyncUpdate,
    entry_digest,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
DOMAIN = TrustDomain("example.org")
SELECTORS = [
    *("unix:uid:0", "unix:uid:1", "unix:gid:0", "unix:path:/bin/a", "unix:path:/bin/b"),
    *("docker:label:app:web", "docker:label:app:api", "systemd:id:a.service"),
]
KINDS = sorted({kind_of(selector) for selector in SELECTORS})
BUNDLE = SyncedBundle("example.org", (b"root",), (), 1, timedelta(minutes=1))


async def unacknowledged(_revision: int) -> None:
    raise AssertionError("nobody acknowledges here")


def update(revision: int, previous: int = 0, **fields: Any) -> SyncUpdate:
    defaults: dict[str, Any] = {
        "full": False,
        "entries": (),
        "removed_ids": (),
        "bundle": None,
        "revocations": (),
        "released_ids": (),
        "epochs": (),
        "denied_authorities": None,
        "crls": None,
        "entries_digest": 0,
        "sent_at": NOW,
        "_acknowledge": unacknowledged,
    }
    return SyncUpdate(revision=revision, previous=previous, **{**defaults, **fields})


def digest_of(entries: Sequence[SyncedEntry]) -> int:
    digest = 0
    for entry in entries:
        digest ^= entry_digest(entry.id, entry.revision)
    return digest


entry_ids = st.sampled_from([f"e{number}" for number in range(6)])
selector_sets = st.frozensets(st.sampled_from(SELECTORS), max_size=4)
expiries = st.sampled_from([None, NOW - timedelta(1), NOW, NOW + timedelta(1)])


@st.composite
def some_entries(draw: st.DrawFn) -> list[SyncedEntry]:
    return [
        SyncedEntry(
            id=entry_id,
            revision=draw(st.integers(1, 3)),
            spiffe_id=f"spiffe://example.org/{entry_id}",
            selectors=tuple(sorted(draw(selector_sets))),
            expires_at=draw(expiries),
            created_at=draw(st.sampled_from([None, NOW, NOW - timedelta(2)])),
        )
        for entry_id in draw(st.lists(entry_ids, unique=True))
    ]


# --- matching -----------------------------------------------------------------------------------


@given(st.lists(some_entries(), max_size=4), st.lists(entry_ids, max_size=3), selector_sets)
def test_the_index_finds_what_a_search_through_all_entries_finds(
    batches: list[list[SyncedEntry]], removed: list[str], shown: frozenset[str]
) -> None:
    index, model = EntryIndex(), dict[str, SyncedEntry]()
    for batch in batches:
        for entry in batch:
            assert index.put(entry) == model.get(entry.id)
            model[entry.id] = entry
    for entry_id in removed:
        assert index.remove(entry_id) == model.pop(entry_id, None)
    found = index.match(shown, NOW)
    assert {entry.id for entry in found} == {
        entry.id
        for entry in model.values()
        if entry.selectors
        and set(entry.selectors) <= shown
        and (entry.expires_at is None or entry.expires_at > NOW)
    }
    assert len(index) == len(model)
    assert index.kinds == {kind_of(each) for entry in model.values() for each in entry.selectors}
    created = [entry.created_at or datetime.min.replace(tzinfo=UTC) for entry in found]
    assert created == sorted(created)


@given(some_entries(), selector_sets)
def test_matching_does_not_depend_on_the_order_in_which_entries_came(
    entries: list[SyncedEntry], shown: frozenset[str]
) -> None:
    there, back = EntryIndex(entries), EntryIndex(reversed(entries))
    assert there.match(shown, NOW) == back.match(shown, NOW)


@given(
    st.lists(
        st.tuples(
            selector_sets, st.frozensets(st.sampled_from(sorted({*map(kind_of, SELECTORS)})))
        ),
        max_size=5,
    ),
    st.lists(st.integers(0, 4), max_size=2),
    st.lists(st.sampled_from(SELECTORS), min_size=1, max_size=3, unique=True),
)
def test_a_change_wakes_whom_it_may_concern_and_nobody_else(
    placed: list[tuple[frozenset[str], frozenset[tuple[str, str]]]],
    dropped: list[int],
    changed: list[str],
) -> None:
    index: WatcherIndex[int] = WatcherIndex()
    model: dict[int, tuple[frozenset[str], frozenset[tuple[str, str]]]] = {}
    for watcher, (selectors, kinds) in enumerate(placed):
        shown = frozenset(each for each in selectors if kind_of(each) in kinds)
        index.place(watcher, shown, kinds)
        model[watcher] = (shown, kinds)
    for watcher in dropped:
        index.drop(watcher)
        model.pop(watcher, None)
    assert index.concerned(changed) == {
        watcher
        for watcher, (shown, kinds) in model.items()
        if all(each in shown for each in changed if kind_of(each) in kinds)
    }
    assert len(index) == len(model)
    for watcher in model:
        index.drop(watcher)
    assert not index.concerned(changed)
    assert not index._groups
    assert not index._members


def test_an_entry_without_selectors_matches_and_wakes_nobody() -> None:
    bare = SyncedEntry("e", 1, "spiffe://example.org/e", ())
    assert EntryIndex([bare]).match(frozenset(SELECTORS), NOW) == []
    index: WatcherIndex[int] = WatcherIndex()
    index.place(1, frozenset(), frozenset())
    assert index.concerned(()) == set()


def test_attestors_are_asked_for_what_entries_ask_for() -> None:
    kinds = EntryIndex(
        [
            SyncedEntry("a", 1, "spiffe://example.org/a", ("unix:uid:0", "unix:path:/a:b")),
            SyncedEntry("b", 1, "spiffe://example.org/b", ("docker:label:a:b",)),
        ]
    ).kinds
    assert wanted_of(kinds) == {
        "unix": frozenset({"uid", "path"}),
        "docker": frozenset({"label"}),
    }


# --- the mirror ---------------------------------------------------------------------------------


@dataclass
class Broker:
    """What a broker knows, and every update it ever made of it."""

    entries: dict[str, SyncedEntry] = field(default_factory=dict)
    before: dict[str, SyncedEntry] = field(default_factory=dict)
    revision: int = 1
    writes: int = 10

    def full(self) -> SyncUpdate:
        return update(
            self.revision,
            full=True,
            entries=tuple(self.entries.values()),
            bundle=BUNDLE,
            crls=(),
            entries_digest=digest_of([*self.entries.values()]),
        )

    def delta(self, changed: list[SyncedEntry], removed: list[str], step: int) -> SyncUpdate:
        self.before = dict(self.entries)
        self.writes += 1
        changed = [replace(entry, revision=self.writes) for entry in changed]
        for entry_id in removed:
            self.entries.pop(entry_id, None)
        for entry in changed:
            self.entries[entry.id] = entry
        previous, self.revision = self.revision, self.revision + step
        return update(
            self.revision,
            previous,
            entries=tuple(changed),
            removed_ids=tuple(removed),
            entries_digest=digest_of([*self.entries.values()]),
        )


@given(st.data())
def test_the_mirror_is_the_broker_s_state_or_asks_for_it(data: st.DataObject) -> None:
    """Updates get lost, come twice or arrive damaged; what is applied is always a whole state."""
    broker, mirror = Broker(), Mirror(DOMAIN)
    for entry in data.draw(some_entries()):
        broker.entries[entry.id] = entry
    assert mirror.apply(broker.full(), now=NOW, tick=0.0)
    known = dict(broker.entries)
    for _ in range(data.draw(st.integers(0, 6))):
        next_update = broker.delta(
            data.draw(some_entries()),
            data.draw(st.lists(entry_ids, max_size=2)),
            data.draw(st.integers(0, 2)),
        )
        fate = data.draw(st.sampled_from(["arrives", "lost", "damaged", "twice"]))
        before = mirror.position
        if fate == "damaged":
            damaged = replace(next_update, entries_digest=next_update.entries_digest ^ 1)
            with pytest.raises(OutOfStep):
                mirror.apply(damaged, now=NOW, tick=0.0)
            assert mirror.position == before
        elif fate != "lost":
            missed = known != broker.before or before.revision != next_update.previous
            try:
                changed = mirror.apply(next_update, now=NOW, tick=0.0)
            except OutOfStep:
                assert missed
                assert mirror.position == before
                mirror.apply(broker.full(), now=NOW, tick=0.0)
            else:
                expected = {
                    entry_id
                    for entry_id in known.keys() | broker.entries.keys()
                    if known.get(entry_id) != broker.entries.get(entry_id)
                }
                assert {change.entry_id for change in changed.entries} == expected
            known = dict(broker.entries)
            if fate == "twice" and next_update.revision != next_update.previous:
                with pytest.raises(OutOfStep):
                    mirror.apply(next_update, now=NOW, tick=0.0)
        assert {entry.id: entry for entry in mirror._index} == known
        assert mirror.position.digest == digest_of([*known.values()])


@given(some_entries(), some_entries())
def test_a_full_state_says_exactly_what_changed(
    before: list[SyncedEntry], after: list[SyncedEntry]
) -> None:
    mirror = Mirror(DOMAIN)
    first = update(
        1, full=True, entries=tuple(before), bundle=BUNDLE, entries_digest=digest_of(before)
    )
    second = update(
        2, full=True, entries=tuple(after), bundle=BUNDLE, entries_digest=digest_of(after)
    )
    mirror.apply(first, now=NOW, tick=0.0)
    changed = mirror.apply(second, now=NOW, tick=0.0)
    old = {entry.id: entry for entry in before}
    new = {entry.id: entry for entry in after}
    assert {(change.old, change.new) for change in changed.entries} == {
        (old.get(entry_id), new.get(entry_id))
        for entry_id in old.keys() | new.keys()
        if old.get(entry_id) != new.get(entry_id)
    }
    assert not changed.bundle


@given(st.integers(2, 50), st.lists(st.floats(0, 40), max_size=8))
def test_an_older_state_is_believed_after_a_minute_of_it(
    revision: int, pauses: list[float]
) -> None:
    mirror = Mirror(DOMAIN)
    mirror.apply(update(revision, full=True, bundle=BUNDLE), now=NOW, tick=0.0)
    older = update(revision - 1, full=True, bundle=BUNDLE)
    tick, first = 100.0, 100.0
    for pause in pauses:
        if tick - first >= INSIST_SECONDS:
            assert mirror.apply(older, now=NOW, tick=tick) is not None
            assert mirror.revision == revision - 1
            return
        with pytest.raises(OutOfStep) as caught:
            mirror.apply(older, now=NOW, tick=tick)
        assert caught.value.mismatch is Mismatch.STALE
        assert mirror.revision == revision
        tick += pause


def test_a_broker_that_catches_up_has_not_insisted() -> None:
    mirror = Mirror(DOMAIN)
    older, newer = (update(number, full=True, bundle=BUNDLE) for number in (4, 6))
    mirror.apply(update(5, full=True, bundle=BUNDLE), now=NOW, tick=0.0)
    with pytest.raises(OutOfStep):
        mirror.apply(older, now=NOW, tick=10.0)
    mirror.apply(newer, now=NOW, tick=20.0)
    with pytest.raises(OutOfStep):
        mirror.apply(older, now=NOW, tick=75.0)
    assert mirror.revision == 6
    # Nor has one that goes on where we stand, without a full state.
    mirror.apply(update(6, 6), now=NOW, tick=80.0)
    with pytest.raises(OutOfStep):
        mirror.apply(older, now=NOW, tick=140.0)
    assert mirror.revision == 6


def test_a_delta_is_nothing_to_a_mirror_that_was_never_told() -> None:
    with pytest.raises(OutOfStep):
        Mirror(DOMAIN).apply(update(1, 0), now=NOW, tick=0.0)


@pytest.mark.parametrize(
    "bundle",
    [
        None,
        replace(BUNDLE, trust_domain="example.com"),
        replace(BUNDLE, sequence=-1),
    ],
)
def test_a_full_state_without_a_bundle_of_ours_is_refused(bundle: SyncedBundle | None) -> None:
    mirror = Mirror(DOMAIN)
    with pytest.raises(OutOfStep) as caught:
        mirror.apply(update(1, full=True, bundle=bundle), now=NOW, tick=0.0)
    assert caught.value.mismatch is Mismatch.BUNDLE
    assert not mirror.synced


def test_entries_end_by_the_clock_and_revocations_are_forgotten_with_their_credential() -> None:
    mirror = Mirror(DOMAIN)
    short = SyncedEntry(
        "e", 1, "spiffe://example.org/e", ("unix:uid:0",), expires_at=NOW + timedelta(seconds=5)
    )
    revoked = SyncedRevocation("ff", "x509", "spiffe://example.org/e", NOW + timedelta(1), NOW)
    mirror.apply(
        update(
            1,
            full=True,
            entries=(short,),
            bundle=BUNDLE,
            revocations=(revoked,),
            entries_digest=digest_of([short]),
        ),
        now=NOW,
        tick=0.0,
    )
    assert mirror.match(frozenset({"unix:uid:0"}), NOW) == [short]
    assert not mirror.expire(NOW)
    assert mirror.denied.is_revoked("ff")
    later = NOW + timedelta(seconds=5)
    assert mirror.expire(later).entries == (EntryChange(short, None),)
    assert mirror.match(frozenset({"unix:uid:0"}), later) == []
    assert mirror.entry("e", later) is None
    assert not mirror.expire(later)
    # The clock was wrong, and is set back: the entry counts again, and ends again.
    assert mirror.expire(NOW).entries == (EntryChange(None, short),)
    assert mirror.match(frozenset({"unix:uid:0"}), NOW) == [short]
    assert not mirror.expire(NOW)
    assert mirror.expire(later).entries == (EntryChange(short, None),)
    mirror.expire(NOW + timedelta(1))
    assert mirror.denied.is_revoked("ff")  # clocks differ
    mirror.expire(NOW + timedelta(1) + GRACE + timedelta(minutes=1))
    assert not mirror.denied.is_revoked("ff")


@pytest.mark.parametrize("clock_flaps", [False, True])
def test_an_entry_that_is_changed_again_and_again_leaves_no_trail(*, clock_flaps: bool) -> None:
    broker, mirror = Broker(), Mirror(DOMAIN)
    ends_at = NOW + timedelta(days=365)
    broker.entries = {
        f"e{number}": SyncedEntry(f"e{number}", 1, "spiffe://example.org/a", (), expires_at=ends_at)
        for number in range(10)
    }
    mirror.apply(broker.full(), now=NOW, tick=0.0)
    entry = broker.entries["e0"]
    for revision in range(2, 2_000):
        before, entry = entry, replace(entry, revision=revision)
        broker.entries["e0"] = entry
        mirror.apply(
            update(
                broker.revision + revision,
                mirror.revision,
                entries=(entry,),
                entries_digest=digest_of([*broker.entries.values()]),
            ),
            now=NOW,
            tick=0.0,
        )
        assert mirror.entry("e0", NOW) == entry != before
        if clock_flaps:
            mirror.expire(ends_at)
            assert len(mirror.expire(NOW).entries) == 10
        assert len(mirror._expiries) <= 2 * 10 + 64 + 1
    gone = mirror.expire(ends_at).entries
    assert sorted(change.entry_id for change in gone) == sorted(broker.entries)
    assert mirror.expire(ends_at) == mirror.expire(ends_at + timedelta(1))


def test_withdrawing_leaves_nothing_and_asks_for_everything() -> None:
    broker, mirror = Broker(), Mirror(DOMAIN)
    entry = SyncedEntry("e", 1, "spiffe://example.org/e", ("unix:uid:0",))
    broker.entries["e"] = entry
    mirror.apply(broker.full(), now=NOW, tick=0.0)
    assert mirror.withdraw(NOW).entries == (EntryChange(entry, None),)
    assert not mirror.synced
    assert mirror.position.revision == 0
    assert len(mirror) == 0


# --- the schedule -------------------------------------------------------------------------------

keys = st.sampled_from("abcdef")
ranks = st.sampled_from(list(Rank))


class ScheduleMachine(RuleBasedStateMachine):
    """A schedule beside a simple model of what is due, planned and in flight."""

    @initialize()
    def begin(self) -> None:
        self.schedule: Schedule[str] = Schedule()
        self.now, self.tick = NOW, 1000.0
        self.ready: dict[str, Rank] = {}
        self.planned: dict[str, tuple[Rank, datetime | None, float]] = {}
        self.flying: dict[str, Rank | None] = {}

    def ripen(self) -> None:
        for key, (rank, at, tick) in list(self.planned.items()):
            if tick <= self.tick or (at is not None and at <= self.now):
                del self.planned[key]
                self.ready[key] = rank

    @rule(key=keys, rank=ranks)
    def want(self, key: str, rank: Rank) -> None:
        self.schedule.want(key, rank)
        if key not in self.flying:
            # One that has ripened unseen may keep its rank or take the better one.
            self.planned.pop(key, None)
            self.ready[key] = min(rank, self.ready.get(key, rank))

    @rule(key=keys, rank=ranks)
    def redo(self, key: str, rank: Rank) -> None:
        self.schedule.redo(key, rank)
        if key in self.flying:
            earlier = self.flying[key]
            self.flying[key] = rank if earlier is None else min(rank, earlier)
        else:
            self.planned.pop(key, None)
            self.ready[key] = min(rank, self.ready.get(key, rank))

    @rule(key=keys, rank=ranks, wall=st.floats(0, 50) | st.none(), tick=st.floats(0, 50))
    def later(self, key: str, rank: Rank, wall: float | None, tick: float) -> None:
        if key in self.flying:
            return  # Whoever plans lands first.
        at = None if wall is None else self.now + timedelta(seconds=wall)
        self.schedule.later(key, rank, due_tick=self.tick + tick, due_at=at)
        self.ready.pop(key, None)
        self.planned[key] = (rank, at, self.tick + tick)

    @rule(key=keys)
    def forget(self, key: str) -> None:
        self.schedule.forget(key)
        for known in (self.ready, self.planned, self.flying):
            known.pop(key, None)

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        self.ripen()
        taken = self.schedule.take(now=self.now, tick=self.tick, limit=limit)
        assert len(taken) == min(limit, len(self.ready))
        assert not set(taken) & self.flying.keys()
        given_ranks = [self.ready.pop(key) for key in taken]
        assert given_ranks == sorted(given_ranks)
        assert all(rank >= max(given_ranks, default=rank) for rank in self.ready.values())
        self.flying |= dict.fromkeys(taken)

    @rule(left=st.sets(keys))
    def take_all_in_two_ways(self, left: set[str]) -> None:
        self.ripen()
        taken = self.schedule.take(
            now=self.now, tick=self.tick, limit=100, aside=lambda key: key in left
        )
        assert {*taken} == self.ready.keys() - left
        aside = []
        while (key := self.schedule.take_aside()) is not None:
            aside.append(key)
        assert len(aside) == len(self.ready) - len(taken)
        assert {*aside} == self.ready.keys() & left
        for found in (taken, aside):
            given_ranks = [self.ready.pop(key) for key in found]
            assert given_ranks == sorted(given_ranks)
            self.flying |= dict.fromkeys(found)

    @rule(key=keys)
    def land(self, key: str) -> None:
        assert self.schedule.land(key) == (key in self.flying)
        again = self.flying.pop(key, None)
        if again is not None:
            self.ready[key] = again

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        self.tick += seconds
        self.now += timedelta(seconds=seconds)

    @rule(seconds=st.floats(-86400, 86400))
    def clock_is_set(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: hasattr(self, "schedule"))
    @invariant()
    def it_knows_when_something_is_due(self) -> None:
        self.ripen()
        pause = self.schedule.pause(now=self.now, tick=self.tick)
        if self.ready:
            assert pause == 0.0
        elif not self.planned:
            assert pause is None
        else:
            assert pause is not None
            dues = [tick - self.tick for _, _, tick in self.planned.values()]
            dues += [(at - self.now).total_seconds() for _, at, _ in self.planned.values() if at]
            assert pause == pytest.approx(min(dues), abs=1e-3)
        known = self.ready.keys() | self.planned.keys() | self.flying.keys()
        assert len(self.schedule) == len(known)


_STORY = settings(max_examples=80, stateful_step_count=40)
TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = _STORY


def test_what_is_aside_is_taken_by_urgency_as_of_then() -> None:
    schedule: Schedule[str] = Schedule()
    for key in "abcd":
        schedule.want(key, Rank.PREFETCH)
    assert schedule.take(now=NOW, tick=0.0, limit=1, aside=lambda key: key != "d") == ["d"]
    assert schedule.pause(now=NOW, tick=0.0) is None
    assert schedule.is_pending("a")
    assert not schedule.is_flying("a")
    assert schedule.take_aside() == "a"
    schedule.want("c", Rank.WAITED)
    schedule.want("e", Rank.RENEW)
    schedule.forget("b")
    assert schedule.pause(now=NOW, tick=0.0) == 0.0
    assert schedule.take(now=NOW, tick=0.0, limit=9, aside=lambda _key: True) == []
    assert [schedule.take_aside() for _ in range(3)] == ["c", "e", None]


# --- the SVIDs at hand --------------------------------------------------------------------------

LIMIT = 3
HOUR = timedelta(hours=1)


def entry_of(entry_id: str, revision: int = 1, **fields: Any) -> SyncedEntry:
    return SyncedEntry(
        entry_id, revision, f"spiffe://example.org/{entry_id}", ("unix:uid:0",), **fields
    )


def listed(entries: Sequence[SyncedEntry]) -> Entries:
    return Entries(len(entries), lambda: entries)


class SvidsMachine(RuleBasedStateMachine):
    """SVIDs that come, go, are watched, revoked and distrusted in any order."""

    @initialize()
    def begin(self) -> None:
        self.svids = Svids(LIMIT, lambda: 0.5)
        self.svids.trust([b"root"])
        self.now, self.tick = NOW, 0.0
        self.entries: dict[str, SyncedEntry] = {}
        self.pins: list[SvidKey] = []
        self.flying: set[SvidKey] = set()
        self.denied: set[SvidKey] = set()
        self.revoked: set[str] = set()
        self.serials: dict[str, SvidKey] = {}
        self.anchors = {b"root"}
        self.number = 0

    def follow(self, old: SyncedEntry | None, new: SyncedEntry | None) -> None:
        self.svids.follow([EntryChange(old, new)], listed([*self.entries.values()]))

    @rule(entry_id=entry_ids, per_process=st.booleans())
    def entry_comes(self, entry_id: str, per_process: bool) -> None:
        old = self.entries.get(entry_id)
        revision = 1 if old is None else old.revision + 1
        new = entry_of(entry_id, revision, per_process=per_process)
        self.entries[entry_id] = new
        self.follow(old, new)

    @rule(entry_id=entry_ids)
    def entry_goes(self, entry_id: str) -> None:
        old = self.entries.pop(entry_id, None)
        if old is not None:
            self.follow(old, None)
            self.flying = {key for key in self.flying if key.entry_id != entry_id}

    @rule(entry_id=entry_ids, pid=st.sampled_from(["1", "2"]))
    def watched(self, entry_id: str, pid: str) -> None:
        entry = self.entries.get(entry_id)
        if entry is not None:
            key = SvidKey(entry_id, pid if entry.per_process else "")
            self.svids.pin(key, entry, self.now)
            self.pins.append(key)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unwatched(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.pins))
        self.pins.remove(key)
        self.svids.unpin(key)

    @rule(limit=st.integers(1, 5))
    def take(self, limit: int) -> None:
        for key in self.svids.take(now=self.now, tick=self.tick, limit=limit):
            assert key not in self.flying, "one order at a time"
            assert key not in self.denied
            if key.entry_id not in self.entries:
                self.svids.discard(key)
            else:
                self.flying.add(key)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), root=st.sampled_from([b"root", b"other"]))
    def issued(self, data: st.DataObject, root: bytes) -> None:
        key = data.draw(st.sampled_from(sorted(self.flying)))
        assume(root in self.anchors)
        self.flying.discard(key)
        entry = self.entries[key.entry_id]
        self.number += 1
        serial = f"{self.number:040x}"
        identity = X509Identity(
            entry_id=entry.id,
            spiffe_id=entry.spiffe_id,
            hint="",
            chain=(serial.encode(), b"shared " * 3),
            key=b"key of " + serial.encode(),
            serial=serial,
            not_after=self.now + HOUR,
        )
        issued = Issued(identity, entry.revision, bytes(root))
        if self.svids.adopt(key, issued, now=self.now, tick=self.tick):
            self.serials[serial] = key

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.flying)))
        self.flying.discard(key)
        self.svids.fail(
            key, reason="AWAY", message="", retry_after=None, now=self.now, tick=self.tick
        )

    @precondition(lambda self: self.serials)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        serial = data.draw(st.sampled_from(sorted(self.serials)))
        for key in self.svids.revoke([serial]):
            assert self.serials[serial] == key
            if key.instance and key not in self.pins:
                self.flying.discard(key)
        self.revoked.add(serial)

    @rule(entry_id=entry_ids, instance=st.sampled_from(["", "1", "2"]))
    def deny(self, entry_id: str, instance: str) -> None:
        """Whether it holds an SVID, waits for one, or was never heard of."""
        key = SvidKey(entry_id, instance)
        news = {key} - self.denied if instance else set()
        assert self.svids.deny([key]) == news
        self.denied |= news
        self.flying -= news

    @rule(anchors=st.sampled_from([{b"root"}, {b"root", b"other"}, {b"other"}]))
    def trust(self, anchors: set[bytes]) -> None:
        self.anchors = anchors
        self.svids.trust(anchors)

    @rule()
    def broker_is_back(self) -> None:
        self.svids.retry_all(listed([*self.entries.values()]))

    @rule(minutes=st.integers(1, 45))
    def time_passes(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)
        self.tick += minutes * 60

    @precondition(lambda self: hasattr(self, "svids"))
    @invariant()
    def nothing_is_handed_out_that_must_not_be(self) -> None:
        for key in {*self.svids._held, *self.pins, *self.denied}:
            entry = self.entries.get(key.entry_id)
            if entry is None:
                assert key not in self.svids._held
                continue
            found = self.svids.usable(key, entry, self.now)
            if found is not None:
                assert key not in self.denied
                assert found.serial not in self.revoked
                assert found.not_after > self.now
                assert self.svids._held[key].anchor in self.anchors
                assert found.spiffe_id == entry.spiffe_id

    @precondition(lambda self: hasattr(self, "svids"))
    @invariant()
    def memory_is_bounded_and_what_is_watched_is_kept(self) -> None:
        pinned = set(self.pins) & self.svids._held.keys()
        assert len(self.svids) <= max(LIMIT, len(pinned))
        assert set(self.svids._idle) == self.svids._held.keys() - set(self.pins)
        assert set(self.svids._by_serial.values()) == self.svids._held.keys()

    @precondition(lambda self: hasattr(self, "svids"))
    @invariant()
    def whoever_waits_is_not_forgotten(self) -> None:
        for key in set(self.pins):
            entry = self.entries.get(key.entry_id)
            if entry is None or bool(key.instance) != entry.per_process:
                continue
            if self.svids.usable(key, entry, self.now) is None and not self.svids.is_denied(key):
                self.svids.want(key, entry, self.now)  # As a watch does on every look.
                assert key in self.svids._schedule


TestSvids = SvidsMachine.TestCase
TestSvids.settings = _STORY


def test_chains_share_their_certificates() -> None:
    svids = Svids(10, lambda: 0.5)
    svids.trust([b"root"])
    for number in range(3):
        entry = entry_of(f"e{number}")
        key = SvidKey(entry.id)
        svids.pin(key, entry, NOW)
        svids.take(now=NOW, tick=0.0, limit=1)
        identity = X509Identity(
            entry.id,
            entry.spiffe_id,
            "",
            (b"leaf", bytes(bytearray(b"intermediate"))),
            b"",
            f"{number}",
            NOW + HOUR,
        )
        svids.adopt(key, Issued(identity, 1, bytes(bytearray(b"root"))), now=NOW, tick=0.0)
    chains = {id(held.identity.chain[1]) for held in svids._held.values()}
    assert len(chains) == len({id(held.anchor) for held in svids._held.values()}) == 1


def test_ten_thousand_entries_cost_a_question_what_it_finds() -> None:
    index = EntryIndex(
        SyncedEntry(
            f"e{number}", 1, f"spiffe://example.org/{number}", (f"unix:uid:{number}", "unix:gid:0")
        )
        for number in range(10_000)
    )
    assert len(index.match(frozenset({"unix:uid:7", "unix:gid:0"}), NOW)) == 1
    # Filed under what tells them apart, not under what they share.
    assert max(map(len, index._filed.values())) <= 100


def test_ten_thousand_svids_are_a_few_megabytes() -> None:
    svids = Svids(20_000, lambda: 0.5)
    svids.trust([b"root"])
    entries = [entry_of(f"entry-{number}") for number in range(10_000)]
    svids.follow([EntryChange(None, entry) for entry in entries], listed(entries))
    tracemalloc.start()
    try:
        while taken := svids.take(now=NOW, tick=0.0, limit=250):
            for key in taken:
                leaf, intermediate = bytes(600) + key.entry_id.encode(), bytes(bytearray(700))
                identity = X509Identity(
                    key.entry_id,
                    f"spiffe://example.org/{key.entry_id}",
                    "",
                    (leaf, intermediate),
                    bytes(138) + key.entry_id.encode(),
                    key.entry_id,
                    NOW + HOUR,
                )
                svids.adopt(key, Issued(identity, 1, b"root"), now=NOW, tick=0.0)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(svids) == 10_000
    assert size < 10_000 * 4_000


def test_entries_that_fit_are_prefetched_and_those_that_do_not_are_not() -> None:
    svids = Svids(LIMIT, lambda: 0.5)
    entries = [entry_of(f"e{number}") for number in range(LIMIT)]
    svids.follow([EntryChange(None, entry) for entry in entries], listed(entries))
    assert len(svids.take(now=NOW, tick=0.0, limit=10)) == LIMIT
    crowd = Svids(LIMIT, lambda: 0.5)
    entries.append(entry_of("one-too-many"))
    crowd.follow([EntryChange(None, entry) for entry in entries], listed(entries))
    assert crowd.take(now=NOW, tick=0.0, limit=10) == []


def test_what_nobody_waits_for_is_tried_again_too_while_everything_fits() -> None:
    svids = Svids(LIMIT, lambda: 0.5)
    entries = [entry_of("a"), entry_of("b")]
    svids.follow([EntryChange(None, entry) for entry in entries], listed(entries))
    (first, second) = svids.take(now=NOW, tick=0.0, limit=2)
    for key in (first, second):
        svids.fail(key, reason="RATE_LIMITED", message="", retry_after=2.0, now=NOW, tick=0.0)
    assert svids.take(now=NOW, tick=1.9, limit=2) == []
    svids.pin(second, entry_of("b"), NOW)
    assert svids.is_hopeful(second)
    assert set(svids.take(now=NOW, tick=2.1, limit=2)) == {first, second}
    for attempt in range(2):
        svids.fail(second, reason="AWAY", message="", retry_after=None, now=NOW, tick=3.0)
        assert svids.is_hopeful(second) == (attempt == 0)
        assert svids.take(now=NOW, tick=60.0, limit=2) == [second]


def test_half_way_through_its_life_an_svid_is_ordered_anew_and_failures_come_closer() -> None:
    svids = Svids(LIMIT, lambda: 0.5)
    svids.trust([b"root"])
    entry, key = entry_of("e"), SvidKey("e")
    svids.pin(key, entry, NOW)
    assert svids.take(now=NOW, tick=0.0, limit=1) == [key]
    identity = X509Identity("e", entry.spiffe_id, "", (b"leaf",), b"", "1", NOW + HOUR)
    svids.adopt(key, Issued(identity, 1, b"root"), now=NOW, tick=0.0)
    pause = svids.pause(now=NOW, tick=0.0)
    assert pause == pytest.approx(1800)
    half = NOW + timedelta(seconds=1800)
    assert svids.take(now=half, tick=1800.0, limit=1) == [key]
    tick, now, pauses = 1800.0, half, []
    while now < NOW + HOUR - timedelta(seconds=20):
        svids.fail(key, reason="AWAY", message="", retry_after=None, now=now, tick=tick)
        wait = svids.pause(now=now, tick=tick) or 0.0
        pauses.append(wait)
        tick, now = tick + wait, now + timedelta(seconds=wait)
        assert svids.take(now=now, tick=tick, limit=1) == [key]
    assert len(pauses) > 20
    assert max(pauses) <= 30
    assert pauses[-1] < 5
    assert svids.usable(key, entry, now) is not None


def test_a_clock_set_back_does_not_put_a_renewal_off() -> None:
    svids = Svids(LIMIT, lambda: 0.5)
    svids.trust([b"root"])
    entry, key = entry_of("e"), SvidKey("e")
    svids.pin(key, entry, NOW)
    svids.take(now=NOW, tick=0.0, limit=1)
    identity = X509Identity("e", entry.spiffe_id, "", (b"leaf",), b"", "1", NOW + HOUR)
    svids.adopt(key, Issued(identity, 1, b"root"), now=NOW, tick=0.0)
    assert svids.take(now=NOW - timedelta(1), tick=1700.0, limit=1) == []
    assert svids.take(now=NOW - timedelta(1), tick=1801.0, limit=1) == [key]
