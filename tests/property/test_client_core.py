"""Properties of the SDK's sans-I/O core."""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from spiffe import JwtSvid, SpiffeId

from identity_ca import spiffe_id as strict
from identity_ca.errors import SpiffeIdError
from identity_client.credential import IdentitySnapshot
from identity_client.errors import PeerRevoked, SettingsInvalid
from identity_client.jwt_cache import CachedToken, JwtCache
from identity_client.naming import parse_spiffe_id, parse_trust_domain, server_name
from identity_client.renewal import MAX_DELAY, is_urgent, renewal_due, retry_delay
from identity_client.revocation import DenySet, RevokedCredential
from identity_client.rotation import Generation, Pins, Rotation
from identity_client.testing import FakeTrustDomain

START = datetime(2030, 1, 1, tzinfo=UTC)
lives = st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(days=400))
dice = st.floats(min_value=0, max_value=1, exclude_max=True)


# --- renewal -----------------------------------------------------------------------------------


@given(life=lives, roll=dice)
def test_renewal_is_due_around_half_of_the_life(life: timedelta, roll: float) -> None:
    due = renewal_due(received=START, not_after=START + life, dice=roll)
    assert START + life * 0.449 <= due <= START + life * 0.551


@given(late=lives, roll=dice)
def test_what_came_expired_is_due_at_once(late: timedelta, roll: float) -> None:
    assert renewal_due(received=START, not_after=START - late, dice=roll) == START


@given(life=lives, spent=st.floats(min_value=0, max_value=1.5))
def test_urgency_begins_in_the_last_quarter(life: timedelta, spent: float) -> None:
    urgent = is_urgent(received=START, not_after=START + life, now=START + life * spent)
    if spent < 0.749:
        assert not urgent
    if spent > 0.751:
        assert urgent


@given(
    attempt=st.integers(min_value=1, max_value=10_000),
    roll=dice,
    remaining=st.none() | st.timedeltas(timedelta(days=-1), timedelta(days=1)),
    asked=st.none() | st.floats(min_value=0, max_value=3600),
)
def test_a_retry_is_neither_hasty_nor_late(
    attempt: int, roll: float, remaining: timedelta | None, asked: float | None
) -> None:
    delay = retry_delay(attempt, dice=roll, remaining=remaining, retry_after=asked)
    assert timedelta(milliseconds=99) < delay <= MAX_DELAY
    if asked is not None:
        assert delay >= min(timedelta(seconds=asked), MAX_DELAY)
    elif remaining is not None and remaining > timedelta(0):
        assert delay <= max(remaining / 10, timedelta(milliseconds=500))


@given(roll=dice)
def test_delays_grow_with_failures(roll: float) -> None:
    delays = [retry_delay(n, dice=roll) for n in range(1, 12)]
    assert delays == sorted(delays)


# --- names -------------------------------------------------------------------------------------

_text = st.one_of(
    st.text(max_size=60),
    st.from_regex(r"spiffe://[a-zA-Z0-9._-]{0,20}(/[a-zA-Z0-9._%-]{0,8}){0,4}\n?", fullmatch=True),
)


@given(_text)
def test_names_are_as_strict_as_the_ca_s(text: str) -> None:
    try:
        expected: strict.SpiffeId | None = strict.SpiffeId.parse(text)
    except SpiffeIdError:
        expected = None
    try:
        found: SpiffeId | None = parse_spiffe_id(text)
    except SettingsInvalid:
        found = None
    assert (found is None) == (expected is None)
    assert found is None or str(found) == text
    if expected is not None and found is not None:
        try:
            name: str | None = server_name(found)
        except SettingsInvalid:
            name = None
        assert name == expected.dns_san()


@given(st.text(max_size=30))
def test_a_trust_domain_is_canonical_or_refused(text: str) -> None:
    try:
        name = parse_trust_domain(text).name
    except SettingsInvalid:
        assert not re.fullmatch(r"(spiffe://)?[a-z0-9._-]{1,255}", text)
    else:
        assert name == text.removeprefix("spiffe://")


# --- the JWT cache -----------------------------------------------------------------------------


def _cached(jti: str, life: float) -> CachedToken:
    svid = JwtSvid(SpiffeId("spiffe://a/b"), {"x"}, 0, {}, f"token-{jti}")
    return CachedToken(
        svid=svid, jti=jti, received=START, expires_at=START + timedelta(seconds=life)
    )


@given(life=st.floats(5, 1000), spent=st.floats(0, 1.2), revoked=st.booleans())
def test_a_token_is_handed_out_until_half_of_its_life(
    life: float, spent: float, revoked: bool
) -> None:
    cache, denied = JwtCache(), DenySet()
    key = ("spiffe://a/b", frozenset({"x"}))
    cache.put(key, _cached("j", life))
    now = START + timedelta(seconds=life * spent)
    if revoked:
        denied.add([RevokedCredential("j", "spiffe://a/b", START + timedelta(days=1))], now=START)
    fresh = cache.fresh(key, denied=denied, now=now)
    valid = cache.fallback(key, denied=denied, now=now)
    if revoked or spent > 1:
        assert fresh is None
        assert valid is None
    elif spent < 0.49:
        assert fresh is valid is not None
    elif spent > 0.51:
        assert fresh is None
    assert cache.fresh(("spiffe://a/c", key[1]), denied=denied, now=now) is None


def test_the_jwt_cache_is_bounded_and_forgets_the_oldest() -> None:
    cache, denied = JwtCache(limit=3), DenySet()
    keys = [("spiffe://a/b", frozenset({str(n)})) for n in range(5)]
    for number, key in enumerate(keys):
        cache.put(key, _cached(str(number), 100))
    assert len(cache) == 3
    assert [cache.fresh(key, denied=denied, now=START) is None for key in keys] == [
        True,
        True,
        False,
        False,
        False,
    ]


# --- rotation ----------------------------------------------------------------------------------

DOMAIN = FakeTrustDomain("example.org")
SOURCE = DOMAIN.source("spiffe://example.org/web")


class RotationMachine(RuleBasedStateMachine):
    """However calls and rotations interleave: no call loses its connection, none stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = SOURCE.snapshot()
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.calls: list[Generation[str]] = []
        self.finished = False
        self.pins: Pins | None = None
        self.version = 0
        self.rotation: Rotation[str] = Rotation(
            lambda: self.snapshot, self._open, self.closed.append
        )

    def _open(self, snapshot: IdentitySnapshot, pins: Pins | None) -> str:
        version = pins.version if pins else 0
        self.opened.append(f"{len(self.opened)}: {snapshot.revision}, {version}")
        return self.opened[-1]

    @rule(pinned=st.booleans())
    def pin(self, pinned: bool) -> None:
        self.version += 1
        self.pins = Pins(self.version) if pinned else None

    @rule()
    def cut(self) -> None:
        self.rotation.cut(lambda one: one.pins is not self.pins, PeerRevoked())
        self.doomed = [call for call in self.calls if call.pins is not self.pins]
        assert self.finished or all(call.cut_because is not None for call in self.doomed)
        for call in self.doomed:
            self.calls.remove(call)
            self.rotation.release(call)

    @rule()
    def rotate(self) -> None:
        self.snapshot = self.snapshot.with_bundle(self.snapshot.bundle)

    @precondition(lambda self: not self.finished)
    @rule()
    def call(self) -> None:
        generation = self.rotation.acquire(self.pins)
        version = self.pins.version if self.pins else 0
        assert generation.connection.endswith(f": {self.snapshot.revision}, {version}")
        assert generation.connection not in self.closed
        self.calls.append(generation)

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(min_value=0))
    def end(self, which: int) -> None:
        self.rotation.release(self.calls.pop(which % len(self.calls)))

    @rule()
    def close(self) -> None:
        self.rotation.close()
        self.finished = True

    @invariant()
    def calls_under_way_keep_their_connection(self) -> None:
        if not self.finished:
            assert not {call.connection for call in self.calls} & set(self.closed)

    @invariant()
    def only_the_newest_and_those_in_use_stay_open(self) -> None:
        still_open = set(self.opened) - set(self.closed)
        in_use = {call.connection for call in self.calls}
        assert still_open <= (set() if self.finished else in_use | set(self.opened[-1:]))
        assert len(self.closed) == len(set(self.closed))


TestRotation = RotationMachine.TestCase


# --- snapshots ---------------------------------------------------------------------------------


def test_readers_never_see_a_torn_snapshot() -> None:
    domain = FakeTrustDomain("example.org")
    source = domain.source("spiffe://example.org/web")
    stop = threading.Event()
    torn: list[str] = []
    revisions: list[list[int]] = []

    def read() -> None:
        seen = [0]
        revisions.append(seen)
        while not stop.is_set():
            snapshot = source.snapshot()
            key = snapshot.svid.private_key.public_key()
            if key != snapshot.svid.leaf.public_key():
                torn.append("key and leaf")
            if f"{snapshot.svid.leaf.serial_number:040x}" != snapshot.serial:
                torn.append("serial and leaf")
            (root,) = snapshot.bundle.x509_authorities
            snapshot.svid.leaf.verify_directly_issued_by(root)
            if snapshot.revision < seen[-1]:
                torn.append("older than before")
            if snapshot.revision != seen[-1]:
                seen.append(snapshot.revision)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(300):
        if turn % 10 == 0:
            domain.replace_authority()
        source.rotate()
    stop.set()
    for thread in threads:
        thread.join()
    assert torn == []
    assert all(len(seen) > 5 for seen in revisions)


@pytest.mark.parametrize("revocations", [0, 1])
def test_a_snapshot_cannot_be_changed(revocations: int) -> None:
    snapshot = SOURCE.snapshot()
    with pytest.raises(AttributeError):
        snapshot.revision = revocations  # type: ignore[misc]
    bundle = snapshot.x509_bundle(DOMAIN.trust_domain)
    for authority in bundle.x509_authorities:
        bundle.remove_authority(authority)
    assert snapshot.x509_bundle(DOMAIN.trust_domain).x509_authorities
