"""The life of a signing authority: transitions, what is trusted, and when the next step is due."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from datetime import timedelta

import pytest

from identity_ca.authority import (
    Authority,
    AuthorityKind,
    AuthoritySet,
    AuthorityState,
    activation_due,
    activation_time,
    authority_bundle,
    preparation_due,
    preparation_time,
)
from identity_ca.errors import AuthorityTransitionError
from identity_ca.keys import spki_der
from support.ca_material import (
    DAY,
    NOW,
    TRUST_DOMAIN,
    authority,
    der,
    root_certificate,
    signing_key,
)

PREPARED, ACTIVE, OLD, TAINTED, REVOKED = AuthorityState
HINT = timedelta(minutes=5)


def a_set(*states: AuthorityState, kind: AuthorityKind = AuthorityKind.JWT) -> AuthoritySet:
    """Authorities named a, b, c, … in those states."""
    return AuthoritySet(
        kind,
        tuple(
            authority("abcdefgh"[place], kind, state=state) for place, state in enumerate(states)
        ),
    )


def name(one: Authority | None) -> str | None:
    return one.id if one else None


def states(authorities: AuthoritySet) -> str:
    return " ".join(f"{a.id}:{a.state.value}" for a in authorities)


def test_the_whole_life_of_an_authority():
    line = AuthoritySet(AuthorityKind.JWT).prepare(authority("a"))
    assert (name(line.prepared), name(line.active)) == ("a", None)
    line = line.activate("a")
    assert (name(line.prepared), name(line.active)) == (None, "a")
    line = line.prepare(authority("b"))
    assert states(line) == "a:active b:prepared"
    line = line.activate("b")
    assert states(line) == "a:old b:active"
    line = line.taint("a")
    assert [a.id for a in line.trusted] == ["a", "b"]
    line = line.revoke("a")
    assert states(line) == "a:revoked b:active"
    assert [a.id for a in line.trusted] == ["b"]
    assert line.prune(NOW + 2 * DAY).authorities == (line.active,)


def test_every_state_but_revoked_is_trusted():
    line = a_set(TAINTED, REVOKED, OLD, OLD, ACTIVE, PREPARED)
    assert [a.id for a in line.trusted] == ["a", "c", "d", "e", "f"]


def test_an_active_one_can_be_tainted_and_then_nothing_is_active():
    line = a_set(ACTIVE, PREPARED).taint("a")
    assert line.active is None
    assert states(line.activate("b")) == "a:tainted b:active"


def test_a_prepared_one_can_be_dropped_or_revoked():
    assert states(a_set(ACTIVE, PREPARED).drop("b")) == "a:active"
    revoked = a_set(ACTIVE, PREPARED).revoke("b")
    assert states(revoked) == "a:active b:revoked"
    assert name(revoked.prepare(authority("c")).prepared) == "c"


ALLOWED: dict[str, dict[AuthorityState, AuthorityState | None]] = {
    "activate": {PREPARED: ACTIVE},
    "taint": {ACTIVE: TAINTED, OLD: TAINTED},
    "revoke": {PREPARED: REVOKED, TAINTED: REVOKED},
    "drop": {PREPARED: None},
}


@pytest.mark.parametrize("verb", ALLOWED)
@pytest.mark.parametrize("state", list(AuthorityState))
def test_each_transition_from_each_state(verb, state):
    line = a_set(state)
    if state not in ALLOWED[verb]:
        with pytest.raises(AuthorityTransitionError, match=state.value) as refusal:
            getattr(line, verb)("a")
        assert refusal.value.hint
        return
    moved = getattr(line, verb)("a")
    wanted = ALLOWED[verb][state]
    assert [a.state for a in moved] == ([wanted] if wanted else [])
    assert states(line) == f"a:{state.value}"


@pytest.mark.parametrize("verb", [*ALLOWED, "get"])
def test_an_unknown_authority_is_refused(verb):
    with pytest.raises(AuthorityTransitionError, match="no jwt authority"):
        getattr(a_set(ACTIVE), verb)("z")


@pytest.mark.parametrize("state", [s for s in AuthorityState if s is not PREPARED])
def test_a_new_authority_starts_as_prepared(state):
    with pytest.raises(AuthorityTransitionError, match="starts as prepared"):
        a_set(ACTIVE).prepare(authority("b", state=state))


def test_only_one_is_prepared_at_a_time():
    with pytest.raises(AuthorityTransitionError, match="prepared already"):
        a_set(ACTIVE, PREPARED).prepare(authority("c"))


def test_an_id_is_never_used_again():
    with pytest.raises(AuthorityTransitionError, match="share one id"):
        a_set(REVOKED).prepare(authority("a"))


def test_kinds_do_not_mix():
    with pytest.raises(AuthorityTransitionError, match="does not sign jwt"):
        a_set(ACTIVE).prepare(authority("b", AuthorityKind.X509))


@pytest.mark.parametrize("twice", [(ACTIVE, ACTIVE), (PREPARED, OLD, PREPARED)])
def test_a_contradictory_set_cannot_be_built(twice):
    with pytest.raises(AuthorityTransitionError, match="more than one"):
        a_set(*twice)


def test_values_do_not_change():
    line = a_set(ACTIVE)
    with pytest.raises(FrozenInstanceError):
        line.authorities[0].state = REVOKED  # type: ignore[misc]  # that is the point
    with pytest.raises(FrozenInstanceError):
        line.authorities = ()  # type: ignore[misc]  # that is the point


def test_prune_forgets_what_expired_and_keeps_the_active_one():
    line = a_set(OLD, TAINTED, REVOKED, ACTIVE, PREPARED)
    just_before = NOW + DAY - timedelta(microseconds=1)
    assert line.prune(just_before) == line
    assert states(line.prune(NOW + DAY)) == "d:active"


# --- when ---------------------------------------------------------------------------------------


def test_the_next_one_is_prepared_at_half_of_the_life():
    active = authority("a", state=ACTIVE, lifetime=6 * DAY)
    assert preparation_time(active) == NOW + 3 * DAY
    assert not preparation_due(active, NOW + 3 * DAY - timedelta(seconds=1))
    assert preparation_due(active, NOW + 3 * DAY)


def test_without_an_active_one_the_next_is_prepared_and_activated_at_once():
    assert preparation_due(None, NOW)
    assert activation_due(authority("a"), None, NOW, refresh_hint=HINT)


def test_the_prepared_one_takes_over_at_five_sixths_of_the_life():
    active = authority("a", state=ACTIVE, lifetime=6 * DAY)
    prepared = authority("b", created_at=NOW + 3 * DAY)
    assert activation_time(prepared, active, refresh_hint=HINT) == NOW + 5 * DAY
    assert not activation_due(
        prepared, active, NOW + 5 * DAY - timedelta(seconds=1), refresh_hint=HINT
    )
    assert activation_due(prepared, active, NOW + 5 * DAY, refresh_hint=HINT)


def test_a_key_published_late_waits_for_one_refresh_hint():
    active = authority("a", state=ACTIVE, lifetime=6 * DAY)
    prepared = authority("b", created_at=NOW + 5 * DAY)
    assert activation_time(prepared, active, refresh_hint=HINT) == NOW + 5 * DAY + HINT


def test_a_key_published_very_late_takes_over_when_the_active_one_ends():
    active = authority("a", state=ACTIVE, lifetime=6 * DAY)
    prepared = authority("b", created_at=NOW + 6 * DAY - timedelta(seconds=1))
    assert activation_time(prepared, active, refresh_hint=HINT) == NOW + 6 * DAY


# --- the bundle ---------------------------------------------------------------------------------


def bundle_of(x509: AuthoritySet, jwt: AuthoritySet):
    return authority_bundle(x509, jwt, TRUST_DOMAIN, 3, HINT)


def test_the_bundle_holds_what_is_trusted_of_both_kinds():
    first, second, third = (der(root_certificate(nth=n)) for n in range(3))
    x509 = AuthoritySet(
        AuthorityKind.X509,
        (
            authority("x", AuthorityKind.X509, state=REVOKED, roots=(first,)),
            authority("y", AuthorityKind.X509, state=TAINTED, roots=(second,)),
            authority("z", AuthorityKind.X509, state=ACTIVE, roots=(third, second)),
        ),
    )
    jwt = AuthoritySet(
        AuthorityKind.JWT,
        (
            authority("j", state=REVOKED),
            authority("k", state=ACTIVE, key=signing_key(nth=1)),
            authority("l", state=PREPARED, key=signing_key(nth=2)),
        ),
    )
    bundle = bundle_of(x509, jwt)
    assert bundle.x509_authorities == (second, third)
    assert [key.key_id for key in bundle.jwt_keys] == ["k", "l"]
    assert bundle.jwt_keys[0].public_key_der == spki_der(signing_key(nth=1).public_key)
    assert bundle.jwt_keys[0].expires_at == NOW + DAY
    assert (bundle.sequence, bundle.refresh_hint) == (3, HINT)


def test_a_root_shared_with_a_trusted_authority_stays():
    root = der(root_certificate())
    shared = AuthoritySet(
        AuthorityKind.X509,
        (
            authority("x", AuthorityKind.X509, state=REVOKED, roots=(root,)),
            authority("y", AuthorityKind.X509, state=ACTIVE, roots=(root,)),
        ),
    )
    assert bundle_of(shared, AuthoritySet(AuthorityKind.JWT)).x509_authorities == (root,)


def test_the_order_in_the_set_does_not_change_the_bundle():
    jwt = AuthoritySet(
        AuthorityKind.JWT,
        (
            authority("b", state=OLD, created_at=NOW),
            authority("a", state=ACTIVE, created_at=NOW + DAY),
        ),
    )
    none = AuthoritySet(AuthorityKind.X509)
    turned = replace(jwt, authorities=jwt.authorities[::-1])
    assert bundle_of(none, jwt) == bundle_of(none, turned)
    assert [k.key_id for k in bundle_of(none, jwt).jwt_keys] == ["b", "a"]


def test_swapped_sets_make_no_bundle():
    with pytest.raises(AuthorityTransitionError, match="swapped"):
        bundle_of(AuthoritySet(AuthorityKind.JWT), AuthoritySet(AuthorityKind.X509))
