"""What stands in the lists is what was revoked, whatever came in which order."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from identity_broker.domain.credential import CredentialKind, Revocation, RevocationReason
from identity_broker.lifecycle.crl import entries as entries_module
from identity_broker.lifecycle.crl.entries import RevokedEntries
from identity_ca.crl import RevokedEntry, encode_entry, encode_removal
from identity_ca.der import INTEGER, SEQUENCE, Reader
from identity_ca.distribution import Shard, shard_of
from identity_ca.spiffe_id import SpiffeId

START = datetime(2030, 1, 1, tzinfo=UTC)
OWNER = SpiffeId.parse("spiffe://example.org/api")
HOLD = RevocationReason.CERTIFICATE_HOLD

# Few enough to meet again, and some whose bytes stand inside of others.
SERIALS = [
    *range(1, 6),
    *(0x0214_0000 << 128 | n for n in range(4)),
    *(int.from_bytes(b"\x02\x01" + bytes((n,)) * 18, "big") for n in range(1, 6)),
    *(n << 12 | 5 for n in range(1, 8)),
]
serials = st.sampled_from(SERIALS)
reasons = st.sampled_from([RevocationReason.KEY_COMPROMISE, HOLD, RevocationReason.UNSPECIFIED])


def revocation(serial: int, reason: RevocationReason, hours: int, at: datetime) -> Revocation:
    return Revocation(
        id=f"{serial:040x}",
        kind=CredentialKind.X509,
        spiffe_id=OWNER,
        revoked_at=at,
        expires_at=START + timedelta(hours=hours),
        reason=reason,
    )


def encoded(one: Revocation) -> bytes:
    return encode_entry(RevokedEntry(int(one.id, 16), one.revoked_at, int(one.reason)))


def serial_in(entry: bytes) -> int:
    inner = Reader(entry).enter(SEQUENCE, "entry")
    return int.from_bytes(inner.content(INTEGER, "serial"), "big")


def taken_apart(pieces: Iterable[bytes]) -> dict[int, bytes]:
    reader = Reader(b"".join(pieces))
    found: dict[int, bytes] = {}
    while not reader.at_end:
        entry = reader.whole(SEQUENCE, "entry")
        assert serial_in(entry) not in found
        found[serial_in(entry)] = entry
    return found


class Lists(RuleBasedStateMachine):
    """Revoke, revoke for another reason, release and expire, beside a plain dictionary."""

    @initialize(shards=st.sampled_from([1, 3, 64, 1000, 1024]))
    def begin(self, shards: int) -> None:
        self.shards = shards
        self.entries = RevokedEntries(shards)
        self.model: dict[int, Revocation] = {}
        self.now = START
        self.seen: dict[int, dict[int, bytes]] = {0: {}}
        self.expired: set[int] = set()

    @rule(chosen=st.dictionaries(serials, reasons, min_size=1), hours=st.integers(1, 5))
    def revoke(self, chosen: dict[int, RevocationReason], hours: int) -> None:
        some = [revocation(key, reason, hours, self.now) for key, reason in chosen.items()]
        news = any(
            int(one.id, 16) not in self.model
            or encoded(self.model[int(one.id, 16)]) != encoded(one)
            for one in some
        )
        assert self.entries.put(some) is news
        assert not self.entries.put(some)
        for one in some:
            known = self.model.get(int(one.id, 16))
            if known is None or encoded(known) != encoded(one):
                self.model[int(one.id, 16)] = one
            self.expired.discard(int(one.id, 16))

    @rule(serial=serials)
    def release(self, serial: int) -> None:
        stood = self.model.pop(serial, None) is not None
        before = self.entries.position
        assert self.entries.release(f"{serial:040x}", self.now) is stood
        assert (self.entries.position != before) is stood

    @rule(hours=st.integers(1, 3))
    def expire(self, hours: int) -> None:
        self.now += timedelta(hours=hours)
        before = self.entries.position
        for name in self.entries.expired(self.now):
            self.entries.forget_expired(name, self.now)
        assert self.entries.position == before
        gone = {key for key, one in self.model.items() if one.expires_at <= self.now}
        self.expired |= gone
        for key in gone:
            del self.model[key]

    @precondition(lambda self: self.entries.position not in self.seen)
    @rule()
    def list_it(self) -> None:
        self.seen[self.entries.position] = taken_apart(self.entries.full())
        self.entries.listed(self.entries.position)

    @invariant()
    def the_list_is_the_model(self) -> None:
        stands = taken_apart(self.entries.full())
        assert stands == {key: encoded(one) for key, one in self.model.items()}
        assert len(self.entries) == len(self.model)

    @invariant()
    def the_parts_are_the_list(self) -> None:
        for serial in SERIALS[::4]:
            for of in (self.shards, 7, 64):
                shard = Shard(shard_of(serial, of), of)
                pieces, count = self.entries.part(shard)
                part = taken_apart(pieces)
                assert len(part) == count
                wanted = {key for key in self.model if key % of == shard.number}
                assert part.keys() >= wanted
                if of == self.shards:
                    assert part.keys() == wanted

    @invariant()
    def a_delta_makes_the_new_list_of_the_old(self) -> None:
        for position, stood in self.seen.items():
            changes = self.entries.changes_since(position)
            assert changes is not None
            combined = dict(stood)
            for entry in changes:
                serial = serial_in(entry)
                if entry == encode_removal(serial, _time_of(entry)):
                    combined.pop(serial, None)
                else:
                    combined[serial] = entry
            # What has expired needs nobody's word.
            for serial in self.expired:
                combined.pop(serial, None)
            assert combined == taken_apart(self.entries.full())


def _time_of(entry: bytes) -> datetime:
    inner = Reader(entry).enter(SEQUENCE, "entry")
    inner.enter(INTEGER, "serial")
    text = inner.content(0x17, "time").decode()
    return datetime.strptime(f"20{text}", "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


Lists.TestCase.settings = settings(max_examples=30, stateful_step_count=20)
TestLists: Any = Lists.TestCase


@given(st.integers(1, 1024), st.integers(1, 1024), st.data())
def test_a_part_by_another_count_misses_nothing(shards: int, of: int, data: st.DataObject) -> None:
    """Certificates name the parts of the count that was configured when they were issued."""
    entries = RevokedEntries(shards)
    chosen = data.draw(st.lists(st.integers(1, 1 << 158), min_size=1, max_size=20, unique=True))
    entries.put(revocation(serial, HOLD, 1, START) for serial in chosen)
    for serial in chosen:
        pieces, _ = entries.part(Shard(shard_of(serial, of), of))
        assert serial in taken_apart(pieces)


def test_changes_are_remembered_until_a_list_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "MOST_CHANGES", 10)
    monkeypatch.setattr(entries_module, "MOST_UNLISTED", 25)
    entries = RevokedEntries(4)

    def revoke(*numbers: int) -> None:
        entries.put(revocation(number, HOLD, 1, START) for number in numbers)

    revoke(*range(1, 21))
    assert len(entries.changes_since(0) or []) == 20
    entries.listed(20)
    assert entries.changes_since(0) is None
    assert not entries.knows_since(9)
    assert len(entries.changes_since(10) or []) == 10
    revoke(*range(21, 36))
    assert len(entries.changes_since(20) or []) == 15
    revoke(*range(36, 60))
    assert entries.changes_since(20) is None
    entries.forget_changes()
    assert entries.changes_since(entries.position) == []


def test_a_token_s_id_is_no_entry() -> None:
    entries = RevokedEntries(64)
    assert not entries.release("not-hexadecimal", START)
    assert not entries.release("ab" * 20, START)
