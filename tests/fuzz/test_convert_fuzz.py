"""Every converter: whatever bytes arrive, the answer is a value or a refusal with a reason."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from identity_api.broker.v1 import credential_pb2, entry_pb2, node_pb2, revocation_pb2, types_pb2
from identity_broker.domain import names
from identity_broker.domain.entry import UPDATABLE_FIELDS, RegistrationEntry
from identity_broker.domain.selector import Selector
from identity_broker.errors import BrokerError, Kind
from identity_broker.server.rpc.convert import credentials as convert_credential
from identity_broker.server.rpc.convert import entries as convert_entry
from identity_broker.server.rpc.convert import nodes as convert_node
from identity_broker.server.rpc.convert import revocations as convert_revocation
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.convert import trust as convert_trust
from identity_ca.spiffe_id import SpiffeId, TrustDomain

DOMAIN = TrustDomain.parse("example.org")
NOW = datetime(2030, 1, 1, tzinfo=UTC)
STORED = RegistrationEntry(
    id="stored",
    spiffe_id=SpiffeId.parse("spiffe://example.org/payments/api"),
    parent_id=names.node_id(DOMAIN, "join_token", "web-1"),
    selectors=frozenset({Selector("unix", "uid:1000")}),
)
# Half sense, half nonsense: what is near the limits of what is allowed.
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "",
            "spiffe://example.org/payments/api",
            "spiffe://example.org/idb/broker",
            "spiffe://example.org/payments/../admin",
            "spiffe://example.org/%2e%2e/admin",
            "spiffe://example.org//admin",
            "spiffe://EXAMPLE.org/admin",
            "spiffe://other.org/admin",
            "spiffe://example.org",
            "spiffe://example.org/" + "a" * 2048,
            "unix",
            "uid:1000",
            "\x00",
            "pay.internal",
            "x.svid.example.org",
        ]
    ),
)
NUMBERS = st.one_of(st.sampled_from([0, 1, -1, 10, 3600, 2**31 - 1]), st.integers(0, 10**6))
SELECTORS = st.builds(types_pb2.Selector, type=TEXTS, value=TEXTS)
ENTRIES = st.builds(
    types_pb2.RegistrationEntry,
    id=TEXTS,
    spiffe_id=TEXTS,
    parent_id=TEXTS,
    selectors=st.lists(SELECTORS, max_size=3),
    x509_ttl_seconds=NUMBERS,
    jwt_ttl_seconds=NUMBERS,
    dns_names=st.lists(TEXTS, max_size=3),
    hint=TEXTS,
    federates_with=st.lists(TEXTS, max_size=2),
    admin=st.booleans(),
    disabled=st.booleans(),
    expires_at=st.one_of(st.sampled_from([0, -1, 2**63 - 1, 253402300800]), NUMBERS),
    owner=TEXTS,
    labels=st.dictionaries(TEXTS, TEXTS, max_size=3),
    per_process=st.booleans(),
    key_algorithm=st.one_of(st.sampled_from(["", "ec-p256", "rsa-2048", "rsa-4096"]), TEXTS),
    revision=st.integers(0, 2**64 - 1),
)
FIELDS = st.lists(st.one_of(st.sampled_from(sorted(UPDATABLE_FIELDS)), TEXTS), max_size=4)


def _refused_well(error: BrokerError) -> None:
    assert error.kind in (Kind.INVALID, Kind.NOT_FOUND)
    assert error.reason not in ("", "INTERNAL")
    assert error.public
    assert "\x00" not in error.public


@given(message=ENTRIES)
def test_an_entry_is_stored_as_sent_or_refused(message: types_pb2.RegistrationEntry) -> None:
    try:
        entry = convert_entry.from_entry(message, message.id or "chosen")
    except BrokerError as error:
        _refused_well(error)
        return
    assert convert_entry.from_entry(convert_entry.to_entry(entry), entry.id) == entry
    assert not names.is_reserved(entry.spiffe_id)
    assert ".." not in entry.spiffe_id.path.split("/")


SUBJECTS = st.builds(
    revocation_pb2.RevocationSubject,
    kind=st.integers(-1, 9),
    value=st.one_of(
        TEXTS,
        st.sampled_from(
            [
                "0" * 40,
                "AB:cd:0" + "1" * 35,
                "f" * 64,
                "spiffe-id=/shop/* kind=x509",
                'owner="a b" label.env=test issued-after=2h',
                "issued-before=2029-01-01T00:00:00Z",
                "kind=x509 kind=jwt",
                "issued-after=999999d",
            ]
        ),
    ),
)


@given(message=SUBJECTS)
def test_a_subject_is_canonical_or_refused(message: revocation_pb2.RevocationSubject) -> None:
    try:
        found = convert_revocation.from_subject(message, DOMAIN, NOW)
    except BrokerError as error:
        _refused_well(error)
        return
    again = convert_revocation.to_subject(found)
    assert again.kind == message.kind
    assert convert_revocation.from_subject(again, DOMAIN, NOW) == found


@given(message=ENTRIES, fields=FIELDS)
def test_an_update_changes_the_named_fields_alone(
    message: types_pb2.RegistrationEntry, fields: list[str]
) -> None:
    try:
        changed = convert_entry.from_update(STORED, message, fields)
    except BrokerError as error:
        _refused_well(error)
        return
    before, after = convert_entry.to_entry(STORED), convert_entry.to_entry(changed)
    for field in types_pb2.RegistrationEntry.DESCRIPTOR.fields_by_name:
        if field not in fields:
            assert getattr(before, field) == getattr(after, field), field


PARSERS: list[tuple[type[Message], Callable[[Any], object]]] = [
    (entry_pb2.ListEntriesRequest, convert_entry.from_entry_filter),
    (node_pb2.ListNodesRequest, convert_node.from_node_filter),
    (credential_pb2.ListCredentialsRequest, convert_credential.from_credential_filter),
    (types_pb2.RegistrationEntry, lambda message: convert_entry.from_entry(message, "id")),
    (
        entry_pb2.BatchUpdateEntryRequest.Item,
        lambda item: convert_entry.from_update(STORED, item.entry, item.fields),
    ),
    (
        entry_pb2.ListEntriesRequest,
        lambda message: scalars.from_page_token(message.page_token, "scope"),
    ),
    (entry_pb2.ListEntriesRequest, lambda message: scalars.from_page_size(message.page_size)),
    (
        revocation_pb2.PlanRevocationRequest,
        lambda m: convert_revocation.from_subject(m.subject, DOMAIN, NOW),
    ),
    (revocation_pb2.RevokeRequest, lambda m: convert_revocation.from_revoke(m, DOMAIN, NOW)),
    (revocation_pb2.GetRevocationRequest, lambda m: convert_revocation.from_wait(m.wait_ms)),
    (
        node_pb2.CreateJoinTokenRequest,
        lambda m: scalars.from_seconds(m.ttl_seconds, "ttl_seconds"),
    ),
    (types_pb2.RegistrationEntry, lambda m: scalars.from_epoch(m.expires_at, "expires_at")),
    (types_pb2.JwtSvid, lambda m: convert_trust.from_authority_kind(m.issued_at)),
]


@pytest.mark.parametrize(("kind", "parse"), PARSERS, ids=[str(at) for at in range(len(PARSERS))])
@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_are_a_value_or_a_refusal(
    kind: type[Message], parse: Callable[[Any], object], raw: bytes
) -> None:
    try:
        message = kind.FromString(raw)
    except DecodeError:
        return
    try:
        parse(message)
    except BrokerError as error:
        _refused_well(error)


@given(key=st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=80))
def test_a_page_token_comes_back_as_it_went(key: str) -> None:
    assert scalars.from_page_token(scalars.to_page_token(key, "scope"), "scope") == key


@given(token=st.text(max_size=60))
def test_a_made_up_page_token_is_refused(token: str) -> None:
    try:
        scalars.from_page_token(token, "scope")
    except BrokerError as error:
        _refused_well(error)


@given(
    seconds=st.integers(0, 253402300799),
    labels=st.dictionaries(st.sampled_from("abc"), st.text("xyz", max_size=3)),
)
def test_times_and_labels_survive_the_wire(seconds: int, labels: dict[str, str]) -> None:
    entry = RegistrationEntry(
        id="e",
        spiffe_id=STORED.spiffe_id,
        parent_id=STORED.parent_id,
        selectors=STORED.selectors,
        expires_at=datetime.fromtimestamp(seconds, UTC) if seconds else None,
        labels=MappingProxyType(labels),
        x509_ttl=timedelta(seconds=10 + seconds % 1000),
    )
    assert convert_entry.from_entry(convert_entry.to_entry(entry), "e") == entry
