"""`explain` and `entry` enforce the same rules, whatever the entries and the node look like."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.domain import names
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.grant import Grant, GrantKind, Seal
from identity_broker.domain.node import Node
from identity_broker.domain.selector import Selector
from identity_broker.errors import AuthorizationError, InvariantViolated
from identity_broker.lifecycle.authorize import Authorize, TtlPolicy
from identity_broker.lifecycle.denials import Denials
from identity_broker.lifecycle.directory import Directory
from identity_ca.spiffe_id import SpiffeId, TrustDomain

DOMAIN = TrustDomain.parse("example.org")
NOW = datetime(2030, 1, 1, tzinfo=UTC)
BROKER = names.broker_id(DOMAIN)
NODES = [names.node_id(DOMAIN, "join_token", name) for name in "ab"]
GROUPS = [SpiffeId.from_segments(DOMAIN, "group", name) for name in "xy"]
FACTS = [Selector("join_token", f"name:{name}") for name in "abc"]
POLICY = TtlPolicy(
    x509=timedelta(hours=1),
    jwt=timedelta(minutes=5),
    node=timedelta(hours=1),
    max_x509=timedelta(hours=2),
    max_jwt=timedelta(minutes=10),
)


class FixedClock:
    """Always the same moment."""

    def now(self) -> datetime:
        return NOW


@st.composite
def entries(draw: st.DrawFn) -> list[RegistrationEntry]:
    """A few entries that may or may not concern one another."""
    found = []
    for at in range(draw(st.integers(1, 6))):
        group = draw(st.booleans())
        found.append(
            RegistrationEntry(
                id=f"e{at}",
                spiffe_id=draw(st.sampled_from(GROUPS))
                if group
                else SpiffeId.from_segments(DOMAIN, "workload", str(at)),
                parent_id=BROKER if group else draw(st.sampled_from([*NODES, *GROUPS])),
                selectors=frozenset(draw(st.sets(st.sampled_from(FACTS), min_size=1))),
                disabled=draw(st.booleans()),
                held_by=draw(st.sampled_from(["", "", "freeze"])),
                expires_at=draw(
                    st.sampled_from([None, NOW - timedelta(1), NOW, NOW + timedelta(1)])
                ),
                x509_ttl=draw(st.sampled_from([None, timedelta(minutes=1), timedelta(hours=24)])),
            )
        )
    return found


@st.composite
def nodes(draw: st.DrawFn) -> list[Node]:
    """Some of the nodes, attested."""
    return [
        Node(
            spiffe_id=spiffe_id,
            attestor="join_token",
            selectors=frozenset(draw(st.sets(st.sampled_from(FACTS)))),
            attested_at=NOW,
            serial="00",
            expires_at=NOW + timedelta(hours=1),
            reattestable=False,
            banned=draw(st.booleans()),
        )
        for spiffe_id in NODES
        if draw(st.booleans())
    ]


def _build(found: list[RegistrationEntry], known: list[Node]) -> tuple[Directory, Authorize]:
    # The directory is filled by hand: no store is ever asked.
    directory = Directory(cast("Any", None), DOMAIN, FixedClock())
    directory.fill(1, found, known, Denials())
    return directory, Authorize(directory, DOMAIN, POLICY, FixedClock())


@given(found=entries(), known=nodes())
def test_explain_agrees_with_what_is_enforced(
    found: list[RegistrationEntry], known: list[Node]
) -> None:
    directory, authorize = _build(found, known)
    for node_id in NODES:
        for entry in found:
            checks = authorize.explain(entry, directory.node(node_id), node_id)
            try:
                grant = authorize.entry(node_id, entry.id)
            except AuthorizationError:
                granted = False
            else:
                granted = True
                assert grant.spiffe_id == entry.spiffe_id
                assert grant.x509_ttl <= POLICY.max_x509
            assert granted == all(check.held for check in checks), checks


@given(found=entries(), known=nodes())
def test_the_authorized_entries_are_those_that_are_granted(
    found: list[RegistrationEntry], known: list[Node]
) -> None:
    directory, authorize = _build(found, known)
    for node_id in NODES:
        node = directory.node(node_id)
        if node is None or node.banned:
            with pytest.raises(AuthorizationError):
                authorize.entries(node_id)
            continue
        listed = {entry.id for entry in authorize.entries(node_id)}
        for entry in found:
            try:
                authorize.entry(node_id, entry.id)
            except AuthorizationError:
                assert entry.id not in listed
            else:
                assert entry.id in listed


def test_a_grant_cannot_be_built_without_the_seal() -> None:
    with pytest.raises(InvariantViolated):
        Grant(
            seal=Seal(),
            kind=GrantKind.WORKLOAD,
            spiffe_id=GROUPS[0],
            node_id=NODES[0],
            x509_ttl=timedelta(hours=1),
            jwt_ttl=timedelta(minutes=5),
        )
