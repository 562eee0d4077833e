"""The feed's state machine against a broker that lies: nothing is un-denied but by the rules."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_client._wire.revocation_feed import FeedMessage, message_from_wire
from identity_client.errors import ProtocolViolation
from identity_client.revocation import DenySet, RevokedCredential, id_key
from identity_client.revocation_feed import FEED_BROKEN, FEED_GAP, FeedReader

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
IDS = [f"{n:040x}" for n in range(1, 9)]
ids = st.lists(st.sampled_from(IDS), max_size=4, unique=True)
sequences = st.integers(0, 12) | st.sampled_from([2**63, 2**64 - 1])


def denial(credential: str) -> RevokedCredential:
    return RevokedCredential(credential, "spiffe://a/b", LATER)


def message(
    sequence: int,
    previous: int = 0,
    *,
    full: bool = False,
    complete: bool = True,
    revoked: list[str] | None = None,
    released: list[str] | None = None,
    authorities: tuple[str, ...] | None = None,
    flaw: str = "",
) -> FeedMessage:
    return FeedMessage(
        sequence=sequence,
        previous=previous,
        full=full,
        complete=complete,
        revoked=tuple(denial(one) for one in revoked or ()),
        released=tuple(released or ()),
        authorities=authorities,
        flaw=flaw,
    )


class Lying(RuleBasedStateMachine):
    """Any message at any time. The model knows what the rules allow to be taken back."""

    @initialize(at=sequences)
    def begin(self, at: int) -> None:
        self.denied = DenySet()
        self.position = at
        self.must: set[str] = set()  # what has to be denied
        self._open()

    def _open(self) -> None:
        self.reader = FeedReader(self.denied, self.position)
        self.stands: int | None = self.position or None
        self.last = self.position
        self.full: set[str] | None = None
        self.joining = False
        self.taken_back: set[str] = set()

    @rule()
    def the_stream_breaks(self) -> None:
        self.denied.abandon_full()
        self._open()

    @rule(
        sequence=sequences,
        previous=sequences,
        full=st.booleans(),
        complete=st.booleans(),
        revoked=ids,
        released=ids,
        flawed=st.integers(0, 9).map(lambda n: n == 0),
    )
    def anything_is_said(
        self,
        sequence: int,
        previous: int,
        full: bool,
        complete: bool,
        revoked: list[str],
        released: list[str],
        flawed: bool,
    ) -> None:
        self._say(
            message(
                sequence,
                previous,
                full=full,
                complete=complete,
                revoked=revoked,
                released=released,
                flaw="nonsense" if flawed else "",
            )
        )

    @rule(step=st.integers(0, 3), complete=st.booleans(), revoked=ids, released=ids)
    def what_follows_is_said(
        self, step: int, complete: bool, revoked: list[str], released: list[str]
    ) -> None:
        self._say(
            message(
                max(self.last, self.stands or 0) + step,
                self.stands or 0,
                full=self.stands is None and not self.joining,
                complete=complete,
                revoked=revoked,
                released=released,
            )
        )

    def _say(self, said: FeedMessage) -> None:
        follows = not said.flaw and said.sequence >= self.last
        if not self.joining and not said.full:
            follows = follows and said.previous == self.stands
        self.must |= {one.id for one in said.revoked}
        if not follows:
            with pytest.raises(ProtocolViolation) as refused:
                self.reader.take(said, now=NOW)
            assert refused.value.reason in {FEED_BROKEN, FEED_GAP}
            self.position = 0
            self._open()
            return
        applied = self.reader.take(said, now=NOW)
        self.last = said.sequence
        if not self.joining or (said.full and self.full is None):
            self.full = set() if said.full else None
            self.taken_back = set()
        self.joining = True
        revoked, released = {one.id for one in said.revoked}, set(said.released)
        if self.full is not None:
            self.full = (self.full - released) | revoked
        else:
            self.taken_back = (self.taken_back | released) - revoked
        assert applied.complete == said.complete
        if said.complete:
            self.must = self.must - self.taken_back if self.full is None else self.full
            self.joining, self.full = False, None
            self.stands = self.position = said.sequence

    @invariant()
    def exactly_that_is_denied(self) -> None:
        assert {one for one in IDS if one in self.denied} == self.must


TestLying = Lying.TestCase
TestLying.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


# --- one rule each -------------------------------------------------------------------------------


def test_a_replayed_message_ends_the_stream_and_takes_nothing_back() -> None:
    denied = DenySet()
    reader = FeedReader(denied, 0)
    reader.take(message(5, full=True, revoked=[IDS[0]]), now=NOW)
    reader.take(message(7, 5, released=[IDS[0]]), now=NOW)
    assert IDS[0] not in denied
    reader.take(message(9, 7, revoked=[IDS[0]]), now=NOW)
    with pytest.raises(ProtocolViolation) as replayed:
        reader.take(message(7, 5, released=[IDS[0]]), now=NOW)
    assert replayed.value.reason == FEED_GAP
    assert IDS[0] in denied


def test_a_gap_keeps_what_is_denied_and_adds_what_is_new() -> None:
    denied = DenySet()
    reader = FeedReader(denied, 0)
    reader.take(message(5, full=True, revoked=[IDS[0]]), now=NOW)
    with pytest.raises(ProtocolViolation):
        reader.take(message(9, 8, revoked=[IDS[1]], released=[IDS[0]], authorities=()), now=NOW)
    assert IDS[0] in denied
    assert IDS[1] in denied


def test_a_stream_that_was_to_begin_with_everything_does() -> None:
    for at, previous in ((0, 0), (7, 0), (7, 6)):
        with pytest.raises(ProtocolViolation):
            FeedReader(DenySet(), at).take(message(9, previous), now=NOW)


def test_an_old_full_state_is_no_full_state() -> None:
    denied = DenySet()
    denied.add([denial(IDS[0])], now=NOW)
    with pytest.raises(ProtocolViolation):
        FeedReader(denied, 9).take(message(8, full=True), now=NOW)
    assert IDS[0] in denied
    # Asked for everything, it may be any: a broker that was restored counts anew.
    FeedReader(denied, 0).take(message(8, full=True), now=NOW)
    assert IDS[0] not in denied


def test_a_new_broker_stands_at_nothing_and_goes_on() -> None:
    denied = DenySet()
    reader = FeedReader(denied, 0)
    reader.take(message(0, full=True), now=NOW)
    reader.take(message(0, 0), now=NOW)
    reader.take(message(3, 0, revoked=[IDS[0]]), now=NOW)
    assert IDS[0] in denied


def test_authorities_are_all_of_them_and_only_on_a_stream_that_follows() -> None:
    denied = DenySet()
    reader = FeedReader(denied, 0)
    reader.take(message(1, full=True, authorities=("aa", "bb")), now=NOW)
    with pytest.raises(ProtocolViolation):
        FeedReader(denied, 5).take(message(6, 1, authorities=("cc",)), now=NOW)
    assert {"aa", "bb", "cc"} == set(denied.keep().authorities)
    reader.take(message(2, 1), now=NOW)
    assert {"aa", "bb", "cc"} == set(denied.keep().authorities)
    reader.take(message(3, 2, complete=False, authorities=("dd",)), now=NOW)
    assert {"aa", "bb", "cc", "dd"} == set(denied.keep().authorities)
    reader.take(message(3), now=NOW)
    assert {"dd"} == set(denied.keep().authorities)


def test_denial_wins_within_one_message() -> None:
    denied = DenySet()
    reader = FeedReader(denied, 0)
    reader.take(message(1, full=True, revoked=[IDS[0]], released=[IDS[0]]), now=NOW)
    assert IDS[0] in denied
    reader.take(message(2, 1, revoked=[IDS[0]], released=[IDS[0]]), now=NOW)
    assert IDS[0] in denied


# --- octets --------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_whatever_can_be_parsed_can_be_taken(octets: bytes) -> None:
    with suppress(DecodeError, ProtocolViolation):
        read = message_from_wire(pb.FollowResponse.FromString(octets))
        FeedReader(DenySet(), 0).take(read, now=NOW)


texts = st.text(max_size=300)
int64 = st.integers(-(2**63), 2**63 - 1)


@given(
    sequence=st.integers(0, 2**64 - 1),
    revoked=st.lists(st.tuples(texts, int64, st.integers(-(2**31), 2**31 - 1)), max_size=3),
    released=st.lists(texts, max_size=3),
    epochs=st.lists(st.tuples(texts, int64, int64), max_size=3),
    authorities=st.lists(texts, max_size=3),
    numbers=st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)),
)
def test_absurd_values_deny_what_they_name_and_crash_nobody(
    sequence: int,
    revoked: list[tuple[str, int, int]],
    released: list[str],
    epochs: list[tuple[str, int, int]],
    authorities: list[str],
    numbers: tuple[int, int],
) -> None:
    said = pb.FollowResponse(
        sequence=sequence,
        full=True,
        complete=True,
        revoked=[
            pb.RevokedCredential(id=one, kind=kind, expires_at=at)  # type: ignore[arg-type]
            for one, at, kind in revoked
        ],
        released_ids=released,
        epochs=[
            pb.IdentityEpoch(spiffe_id=one, not_before=since, expires_at=until)
            for one, since, until in epochs
        ],
        denied_authorities=pb.DeniedAuthorities(ids=authorities),
        heartbeat_ms=numbers[0],
        reconnect_spread_ms=numbers[1],
    )
    read = message_from_wire(pb.FollowResponse.FromString(said.SerializeToString()))
    denied = DenySet()
    with suppress(ProtocolViolation):
        FeedReader(denied, 0).take(read, now=NOW)
    for one, at, _ in revoked:
        if 0 < len(one) <= 256 and at > NOW.timestamp():
            assert one in denied, id_key(one)
    for one, _, _ in epochs:
        denied.denies_token("", one, 1.0)
    denied.prune(now=NOW + timedelta(days=20 * 366))
    assert len(denied) == 0
