"""No sequence of transitions, legal or not, breaks what must hold of a set of authorities."""

from __future__ import annotations

from datetime import datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from identity_ca.authority import (
    AuthorityKind,
    AuthoritySet,
    AuthorityState,
    activation_due,
    activation_time,
    authority_bundle,
    preparation_due,
)
from identity_ca.errors import AuthorityTransitionError
from support.ca_material import DAY, NOW, TRUST_DOMAIN, authority

HINT = timedelta(minutes=5)
VERBS = ("activate", "taint", "revoke", "drop")


class AuthorityLife(RuleBasedStateMachine):
    """A model with one dict of states beside the real thing."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.line = AuthoritySet(AuthorityKind.JWT)
        self.model: dict[str, AuthorityState] = {}
        self.ends: dict[str, datetime] = {}
        self.revoked: set[str] = set()
        self.made = 0

    @rule(target=ids, days=st.integers(1, 10))
    def prepare(self, days):
        new = f"key-{self.made}"
        self.made += 1
        made = authority(new, created_at=self.now, lifetime=days * DAY)
        before = self.line
        try:
            self.line = self.line.prepare(made)
        except AuthorityTransitionError:
            assert AuthorityState.PREPARED in self.model.values()
            assert self.line is before
        else:
            assert AuthorityState.PREPARED not in self.model.values()
            self.model[new] = AuthorityState.PREPARED
            self.ends[new] = made.not_after
        return new

    @rule(one=ids, verb=st.sampled_from(VERBS))
    def move(self, one, verb):
        before, state = self.line, self.model.get(one)
        legal = {
            "activate": {AuthorityState.PREPARED},
            "taint": {AuthorityState.ACTIVE, AuthorityState.OLD},
            "revoke": {AuthorityState.PREPARED, AuthorityState.TAINTED},
            "drop": {AuthorityState.PREPARED},
        }[verb]
        try:
            self.line = getattr(self.line, verb)(one)
        except AuthorityTransitionError:
            assert state not in legal
            assert self.line is before
            return
        assert state in legal
        if verb == "drop":
            del self.model[one]
            return
        if verb == "activate":
            for other, its in self.model.items():
                if its is AuthorityState.ACTIVE:
                    self.model[other] = AuthorityState.OLD
        self.model[one] = {
            "activate": AuthorityState.ACTIVE,
            "taint": AuthorityState.TAINTED,
            "revoke": AuthorityState.REVOKED,
        }[verb]
        if verb == "revoke":
            self.revoked.add(one)

    @rule(one=consumes(ids))
    def the_same_id_again(self, one):
        if one not in self.model or AuthorityState.PREPARED in self.model.values():
            return
        try:
            self.line.prepare(authority(one, created_at=self.now))
        except AuthorityTransitionError:
            return
        raise AssertionError("one id for two authorities")

    @rule(hours=st.integers(0, 100))
    def time_passes_and_prunes(self, hours):
        self.now += timedelta(hours=hours)
        self.line = self.line.prune(self.now)
        self.model = {
            one: state
            for one, state in self.model.items()
            if state is AuthorityState.ACTIVE or self.ends[one] > self.now
        }

    @invariant()
    def the_states_are_those_of_the_model(self):
        assert {a.id: a.state for a in self.line} == self.model

    @invariant()
    def at_most_one_is_prepared_and_one_active(self):
        found = [a.state for a in self.line]
        assert found.count(AuthorityState.PREPARED) <= 1
        assert found.count(AuthorityState.ACTIVE) <= 1
        active = [a for a in self.line if a.state is AuthorityState.ACTIVE]
        assert ([self.line.active] if self.line.active else []) == active

    @invariant()
    def revoked_is_for_ever_and_in_no_bundle(self):
        bundle = authority_bundle(
            AuthoritySet(AuthorityKind.X509), self.line, TRUST_DOMAIN, 1, HINT
        )
        published = {key.key_id for key in bundle.jwt_keys}
        assert not published & self.revoked
        assert published == {
            one for one, state in self.model.items() if state is not AuthorityState.REVOKED
        }
        assert published == {a.id for a in self.line.trusted}

    @invariant()
    def the_schedule_always_leads_on(self):
        """Whatever the state, time alone brings the next step: rotation can never get stuck."""
        active, prepared = self.line.active, self.line.prepared
        if prepared is None:
            assert preparation_due(active, active.not_after if active else self.now)
        elif active is None:
            assert activation_due(prepared, active, self.now, refresh_hint=HINT)
        else:
            assert activation_due(prepared, active, active.not_after, refresh_hint=HINT)
            assert activation_time(prepared, active, refresh_hint=HINT) <= active.not_after


TestAuthorityLife = AuthorityLife.TestCase
TestAuthorityLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
