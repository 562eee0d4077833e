"""Mapping: a value comes back from its row as it went in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.domain.credential import (
    Credential,
    CredentialIntent,
    CredentialKind,
    CredentialState,
    RevocationReason,
)
from identity_broker.domain.entry import (
    KEY_ALGORITHMS,
    MAX_JWT_TTL,
    MAX_X509_TTL,
    MIN_TTL,
    RegistrationEntry,
)
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.node import JoinToken, Node
from identity_broker.domain.revocation import (
    BlockedKey,
    Hold,
    IdentityEpoch,
    OrderState,
    RevocationOrder,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.domain.selector import Selector
from identity_broker.store import mapping, order_mapping, order_tables, tables
from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain

TD = TrustDomain("example.org")
segments = st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True).filter(
    lambda s: s not in (".", "..")
)
workloads = st.lists(segments, min_size=1, max_size=4).map(
    lambda parts: SpiffeId.from_segments(TD, "w", *parts)
)
parents = st.lists(segments, min_size=1, max_size=3).map(
    lambda parts: SpiffeId.from_segments(TD, "idb", "node", *parts)
)
# The whole range a certificate can name, in any time zone.
instants = st.datetimes(
    datetime(1950, 1, 1),
    datetime(9999, 1, 1),
    timezones=st.sampled_from(
        [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-11))]
    ),
)
# Printable: what the domain lets in.
printable = st.characters(exclude_categories=["C", "Z"]) | st.just(" ")
texts = st.text(printable, max_size=40)
words = st.text(printable, min_size=1, max_size=40)
selectors = st.builds(Selector, st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True), words)
hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
ders = st.binary(max_size=200)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


entries = st.builds(
    RegistrationEntry,
    id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    spiffe_id=workloads,
    parent_id=parents,
    selectors=st.frozensets(selectors, min_size=1, max_size=6),
    x509_ttl=optional(st.timedeltas(MIN_TTL, MAX_X509_TTL)),
    jwt_ttl=optional(st.timedeltas(MIN_TTL, MAX_JWT_TTL)),
    dns_names=st.lists(
        st.from_regex(r"[a-z0-9]{1,10}\.[a-z]{2,3}", fullmatch=True), unique=True, max_size=4
    ).map(tuple),
    hint=texts,
    federates_with=st.lists(
        st.from_regex(r"[a-z0-9]{1,9}\.test", fullmatch=True).map(TrustDomain),
        unique=True,
        max_size=3,
    ).map(tuple),
    admin=st.booleans(),
    downstream=st.booleans(),
    disabled=st.booleans(),
    expires_at=optional(instants),
    owner=texts,
    labels=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,10}", fullmatch=True), texts, max_size=4
    ).map(MappingProxyType),
    per_process=st.booleans(),
    key_algorithm=optional(st.sampled_from(KEY_ALGORITHMS)),
    held_by=texts,
    revision=st.integers(1, 2**62),
    created_at=instants,
    updated_at=instants,
)
nodes = st.builds(
    Node,
    spiffe_id=parents,
    attestor=words,
    selectors=st.frozensets(selectors, max_size=6),
    attested_at=instants,
    serial=hexes,
    expires_at=instants,
    reattestable=st.booleans(),
    banned=st.booleans(),
    ban_reason=texts,
)
tokens = st.builds(
    JoinToken,
    token_hash=hexes,
    node_id=parents,
    expires_at=instants,
    created_at=instants,
    used_at=optional(instants),
)
credentials = st.builds(
    Credential,
    intent=st.builds(
        CredentialIntent,
        id=hexes,
        kind=st.sampled_from(CredentialKind),
        spiffe_id=workloads,
        entry_id=texts,
        entry_revision=st.integers(0, 2**62),
        node_id=optional(parents),
        authority_id=words,
        key_fingerprint=hexes,
        tbs_digest=hexes,
        not_before=instants,
        not_after=instants,
        recorded_at=instants,
        correlation_id=texts,
        instance=texts,
    ),
    state=st.sampled_from(CredentialState),
    digest=texts,
    revoked_at=optional(instants),
    reason=optional(st.sampled_from(RevocationReason)),
    comment=texts,
    order_id=texts,
)
subjects = st.builds(RevocationSubject, kind=st.sampled_from(SubjectKind), value=words)
reasons = st.sampled_from(RevocationReason)
counts = st.integers(0, 2**62)
orders = st.builds(
    RevocationOrder,
    id=words,
    subject=subjects,
    reason=reasons,
    comment=texts,
    actor=texts,
    ordered_at=instants,
    state=st.sampled_from(OrderState),
    committed_at=optional(instants),
    revoked=counts,
    already_revoked=counts,
    expired=counts,
    released=counts,
    hold=texts,
    sequence=counts,
    swept=st.booleans(),
    statement=texts,
)
holds = st.builds(
    Hold,
    name=words,
    subject=subjects,
    order_id=words,
    reason=reasons,
    actor=texts,
    created_at=instants,
    until=optional(instants),
    lifted_at=optional(instants),
    lifted_by=texts,
)
blocked_keys = st.builds(
    BlockedKey, fingerprint=hexes, order_id=words, reason=reasons, blocked_at=instants
)
epochs = st.builds(IdentityEpoch, spiffe_id=workloads, not_before=instants, expires_at=instants)
authorities = st.builds(
    Authority,
    id=words,
    kind=st.sampled_from(AuthorityKind),
    state=st.sampled_from(AuthorityState),
    key_id=words,
    algorithm=st.sampled_from(KeyAlgorithm),
    public_key_der=ders,
    chain=st.lists(ders, max_size=3).map(tuple),
    roots=st.lists(ders, max_size=3).map(tuple),
    upstream=words,
    created_at=instants,
    not_before=instants,
    not_after=instants,
)
events = st.builds(
    AuditEvent,
    at=instants,
    kind=st.sampled_from(AuditKind),
    actor=texts,
    subject=texts,
    reason=texts,
    correlation_id=texts,
    facts=st.dictionaries(texts, texts, max_size=4).map(MappingProxyType),
)


@given(entries)
def test_entries_come_back(entry: RegistrationEntry) -> None:
    row = tables.EntryRow(**mapping.entry_values(entry))
    selected = [
        mapping.selector_from(v["type"], v["value"]) for v in mapping.selector_values(entry)
    ]
    assert mapping.entry_from_row(row, selected) == entry


@given(nodes)
def test_nodes_come_back(node: Node) -> None:
    assert mapping.node_from_row(tables.NodeRow(**mapping.node_values(node))) == node


@given(tokens)
def test_join_tokens_come_back(token: JoinToken) -> None:
    row = tables.JoinTokenRow(**mapping.join_token_values(token))
    assert mapping.join_token_from_row(row) == token


@given(credentials)
def test_credentials_come_back(credential: Credential) -> None:
    row = tables.CredentialRow(**mapping.credential_values(credential))
    assert mapping.credential_from_row(row) == credential


@given(orders, holds, blocked_keys, epochs)
def test_what_belongs_to_revoking_comes_back(
    order: RevocationOrder, hold: Hold, key: BlockedKey, epoch: IdentityEpoch
) -> None:
    order_row = order_tables.RevocationOrderRow(**order_mapping.order_values(order))
    assert order_mapping.order_from_row(order_row) == order
    assert (
        order_mapping.hold_from_row(order_tables.HoldRow(**order_mapping.hold_values(hold))) == hold
    )
    key_row = order_tables.BlockedKeyRow(**order_mapping.blocked_key_values(key))
    assert order_mapping.blocked_key_from_row(key_row) == key
    epoch_row = order_tables.IdentityEpochRow(**order_mapping.epoch_values(epoch))
    assert order_mapping.epoch_from_row(epoch_row) == epoch


@given(authorities, st.integers(0, 100))
def test_authorities_come_back(authority: Authority, position: int) -> None:
    row = tables.AuthorityRow(**mapping.authority_values(authority, position))
    assert mapping.authority_from_row(row) == authority


@given(events)
def test_audit_events_come_back(event: AuditEvent) -> None:
    assert mapping.audit_from_row(tables.AuditRow(**mapping.audit_values(event))) == event


@given(instants)
def test_instants_come_back_in_utc_to_the_microsecond(instant: datetime) -> None:
    back = mapping.from_micros(mapping.to_micros(instant))
    assert back == instant
    assert back.tzinfo is UTC


def test_an_instant_without_a_zone_is_refused() -> None:
    with pytest.raises(TypeError):
        mapping.to_micros(datetime(2030, 1, 1))


@given(entries, entries)
def test_identity_keys_tell_apart_what_may_be_registered_once(
    one: RegistrationEntry, other: RegistrationEntry
) -> None:
    def identity(entry: RegistrationEntry) -> tuple[object, ...]:
        return entry.spiffe_id, entry.parent_id, entry.selectors

    same = mapping.identity_key(one) == mapping.identity_key(other)
    assert same == (identity(one) == identity(other))


def test_identity_keys_are_not_fooled_by_separators() -> None:
    def with_selectors(*texts: str) -> str:
        chosen = frozenset(Selector.parse(text) for text in texts)
        return mapping.identity_key(
            RegistrationEntry(
                id="x",
                spiffe_id=SpiffeId.from_segments(TD, "w"),
                parent_id=SpiffeId.from_segments(TD, "n"),
                selectors=chosen,
            )
        )

    assert with_selectors('a:b","c:d') != with_selectors("a:b", "c:d")
    assert with_selectors("a:b:c") == with_selectors("a:b:c")
