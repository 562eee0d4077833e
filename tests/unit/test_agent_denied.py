"""What an agent refuses: what is told, taken back, replaced and forgotten; and what it costs."""

from __future__ import annotations

import secrets
import tracemalloc
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.agent.denied import GRACE, Denied, DeniedChange, Instance, TokenFacts
from identity_client.node.values import SyncedEpoch, SyncedRevocation, SyncUpdate

NOW = datetime(2030, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
WEB = "spiffe://example.org/web"


async def _unacknowledged(_revision: int) -> None: ...


def update(**fields: Any) -> SyncUpdate:
    defaults: dict[str, Any] = {
        "revision": 1,
        "previous": 1,
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
        "_acknowledge": _unacknowledged,
    }
    return SyncUpdate(**{**defaults, **fields})


def revoked(credential_id: str, left: timedelta = HOUR, **fields: Any) -> SyncedRevocation:
    values: dict[str, Any] = {
        "kind": "x509",
        "spiffe_id": WEB,
        "expires_at": NOW + left,
        "revoked_at": NOW,
        "reason": 1,
        "authority_id": "ab" * 20,
    }
    return SyncedRevocation(credential_id, **{**values, **fields})


def epoch(at: int, spiffe_id: str = WEB) -> SyncedEpoch:
    not_before = NOW + timedelta(seconds=at)
    return SyncedEpoch(spiffe_id, not_before, not_before + HOUR)


def token(**fields: Any) -> TokenFacts:
    values: dict[str, Any] = {
        "spiffe_id": WEB,
        "jti": "j",
        "key_id": "k",
        "issued_at": NOW.timestamp(),
    }
    return TokenFacts(**{**values, **fields})


@pytest.mark.parametrize("name", ["0" * 40, "ABCDEF" * 6 + "0000", "ff", "a jti", "é" * 40])
def test_what_is_revoked_is_told_back_as_it_came(name: str) -> None:
    denied = Denied()
    told = revoked(name)
    assert denied.apply(update(revocations=(told,)), NOW) == DeniedChange(revoked=(told,))
    assert denied.is_revoked(name)
    assert not denied.is_revoked(name.upper() + "x")
    assert list(denied.credentials().part(0, 10)) == [told]
    assert not denied.apply(update(revocations=(told,)), NOW)
    better = revoked(name, reason=6)
    assert denied.apply(update(revocations=(better,)), NOW).revoked == (better,)
    assert denied.apply(update(released_ids=(name,)), NOW).released == (name,)
    assert not denied.is_revoked(name)
    assert not denied.apply(update(released_ids=(name,)), NOW)


def test_a_serial_in_other_letters_is_another_one() -> None:
    denied = Denied()
    denied.apply(update(revocations=(revoked("ab" * 20),)), NOW)
    assert not denied.is_revoked("AB" * 20)


def test_a_full_state_replaces_what_it_does_not_name() -> None:
    denied = Denied()
    denied.apply(
        update(
            full=True,
            revocations=(revoked("a"), revoked("b"), revoked("c", timedelta(seconds=30))),
            epochs=(epoch(1),),
            denied_authorities=("x", "y"),
        ),
        NOW,
    )
    change = denied.apply(
        update(full=True, revocations=(revoked("b"), revoked("d")), denied_authorities=("y",)), NOW
    )
    assert change.revoked == (revoked("d"),)
    assert change.released == ("a",)
    assert denied.is_revoked("c")  # it ends now: for that it may be missing
    assert change.authorities == frozenset("y")
    assert not denied.epochs
    assert not denied.apply(
        update(full=True, revocations=(revoked("b"), revoked("d")), denied_authorities=("y",)), NOW
    )


def test_an_epoch_only_rises_and_ends_tokens_of_its_second() -> None:
    denied = Denied()
    assert denied.apply(update(epochs=(epoch(5),)), NOW).epochs == (epoch(5),)
    assert not denied.apply(update(epochs=(epoch(3),)), NOW)
    assert denied.apply(update(epochs=(epoch(6), epoch(7))), NOW).epochs == (epoch(7),)
    at = NOW.timestamp()
    assert denied.refuses(token(issued_at=at + 7))
    assert not denied.refuses(token(issued_at=at + 7.001))
    assert denied.refuses(token(issued_at=None))
    assert not denied.refuses(token(spiffe_id=f"{WEB}/other", issued_at=at))
    denied.forget(NOW + HOUR + GRACE + timedelta(minutes=1))
    assert not denied.refuses(token(issued_at=at))


def test_tokens_are_refused_by_jti_and_by_authority() -> None:
    denied = Denied()
    assert not denied.refuses(token())
    denied.apply(update(revocations=(revoked("j"),)), NOW)
    assert denied.refuses(token())
    assert not denied.refuses(token(jti=""))
    denied.apply(update(released_ids=("j",), denied_authorities=("k",)), NOW)
    assert denied.refuses(token())
    assert denied.apply(update(denied_authorities=()), NOW).authorities == frozenset()
    assert not denied.refuses(token())


def test_an_instance_is_pardoned_when_nothing_denies_it_any_more() -> None:
    denied = Denied()
    one = Instance("e", "i")
    both = tuple(revoked(name, entry_id="e", instance="i") for name in "ab")
    assert denied.apply(update(revocations=both[:1]), NOW).denied == {one}
    assert not denied.apply(update(revocations=both[1:]), NOW).denied
    assert not denied.apply(update(released_ids=("a",)), NOW).pardoned
    assert denied.apply(update(released_ids=("b",)), NOW).pardoned == {one}
    # That its credential has expired pardons nobody: nor does a full state without it.
    denied.apply(update(revocations=both), NOW)
    later = NOW + HOUR + GRACE + timedelta(minutes=1)
    denied.forget(later)
    assert not denied.is_revoked("a")
    assert not denied.apply(update(full=True, denied_authorities=()), later).pardoned


def test_what_expires_is_refused_a_little_longer_and_then_forgotten() -> None:
    denied = Denied()
    denied.apply(update(revocations=(revoked("a"), revoked("b", 2 * HOUR))), NOW)
    denied.forget(NOW + HOUR)
    assert denied.is_revoked("a")
    snapshot = denied.credentials()
    denied.forget(NOW + HOUR + GRACE + timedelta(minutes=1))
    assert not denied.is_revoked("a")
    assert denied.is_revoked("b")
    assert [each.id for each in snapshot.part(0, 9)] == ["a", "b"]
    assert [each.id for each in denied.credentials().part(0, 9)] == ["b"]
    assert not denied.apply(update(revocations=(revoked("z", -2 * GRACE),)), NOW)


def test_a_revocation_costs_less_than_two_hundred_octets() -> None:
    denied = Denied()
    tracemalloc.start()
    try:
        for _ in range(20):
            some = tuple(
                revoked(secrets.token_hex(20), timedelta(seconds=3600 + n)) for n in range(1_000)
            )
            denied.apply(update(revocations=some), NOW)
            del some
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(denied) == 20_000
    assert size < 4_000_000
    denied.forget(NOW + 24 * HOUR)
    assert len(denied) == 0


names = st.sampled_from(["ab" * 20, "cd" * 20, "jti one", "jti two", "ef" * 20])
updates = st.fixed_dictionaries(
    {
        "full": st.booleans(),
        "revocations": st.lists(names, unique=True, max_size=4),
        "released_ids": st.lists(names, unique=True, max_size=3),
        "epochs": st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=3),
        "denied_authorities": st.none() | st.frozensets(st.sampled_from("xyz")),
    }
)


@given(st.lists(updates, max_size=12))
def test_it_says_what_has_changed_and_nothing_else(told: list[dict[str, Any]]) -> None:
    """Whoever applies the changes alone has what it has; so does whoever believes each update."""
    denied = Denied()
    truth: set[str] = set()
    follower: set[str] = set()
    epochs: dict[str, datetime] = {}
    heard: dict[str, datetime] = {}
    authorities: frozenset[str] = frozenset()
    for each in told:
        full = each["full"]
        released = () if full else tuple(set(each["released_ids"]) - set(each["revocations"]))
        denied_now = each["denied_authorities"]
        if full:
            truth, epochs, denied_now = set(), {}, denied_now or frozenset()
        truth = (truth - set(released)) | set(each["revocations"])
        raised = tuple(epoch(at, who) for who, at in each["epochs"])
        for one in raised:
            epochs[one.spiffe_id] = max(epochs.get(one.spiffe_id, one.not_before), one.not_before)
        authorities = authorities if denied_now is None else denied_now
        change = denied.apply(
            update(
                full=full,
                revocations=tuple(map(revoked, each["revocations"])),
                released_ids=released,
                epochs=raised,
                denied_authorities=None if denied_now is None else tuple(denied_now),
            ),
            NOW,
        )
        assert not {one.id for one in change.revoked} & set(change.released)
        follower = (follower - set(change.released)) | {one.id for one in change.revoked}
        heard |= {one.spiffe_id: one.not_before for one in change.epochs}
        assert follower == truth == {one.id for one in denied.credentials().part(0, 99)}
        assert {one.spiffe_id: one.not_before for one in denied.epochs} == epochs
        assert epochs.items() <= heard.items()
        assert denied.authorities == authorities
