"""The admin client's values survive the way to the wire and back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_api.broker.v1 import credential_pb2, revocation_pb2, types_pb2
from identity_client.admin import Entry, Subject, SubjectKind
from identity_client.admin import _convert as convert
from identity_client.admin import _convert_revocations as convert_revocations
from identity_client.errors import ProtocolViolation

EPOCH = datetime.fromtimestamp(0, UTC)
TEXTS = st.text(max_size=20)
TTLS = st.none() | st.integers(1, 2**31 - 1).map(lambda seconds: timedelta(seconds=seconds))
TIMES = st.none() | st.integers(1, 32_503_680_000).map(lambda s: datetime.fromtimestamp(s, UTC))
SELECTORS = st.lists(
    st.tuples(st.from_regex(r"[a-z]{1,5}", fullmatch=True), TEXTS).map(":".join),
    max_size=4,
    unique=True,
)
ENTRIES = st.builds(
    Entry,
    id=TEXTS,
    spiffe_id=TEXTS,
    parent_id=TEXTS,
    selectors=SELECTORS.map(lambda found: tuple(sorted(found))),
    x509_ttl=TTLS,
    jwt_ttl=TTLS,
    dns_names=st.lists(TEXTS, max_size=3).map(tuple),
    hint=TEXTS,
    federates_with=st.lists(TEXTS, max_size=3).map(tuple),
    admin=st.booleans(),
    downstream=st.booleans(),
    disabled=st.booleans(),
    expires_at=TIMES,
    owner=TEXTS,
    labels=st.dictionaries(TEXTS, TEXTS, max_size=3),
    per_process=st.booleans(),
    key_algorithm=TEXTS,
    revision=st.integers(0, 2**63),
)


@given(ENTRIES)
def test_an_entry_comes_back_as_it_was(entry: Entry) -> None:
    sent = convert.entry_to_wire(entry).SerializeToString()
    assert convert.entry_from_wire(types_pb2.RegistrationEntry.FromString(sent)) == entry


@given(st.binary(max_size=300))
def test_any_message_is_read_or_refused(content: bytes) -> None:
    kinds: tuple[tuple[Any, Callable[[Any], object]], ...] = (
        (types_pb2.RegistrationEntry(), convert.entry_from_wire),
        (credential_pb2.CredentialRecord(), convert.credential_from_wire),
        (types_pb2.TrustBundle(), convert.bundle_from_wire),
        (revocation_pb2.PlanRevocationResponse(), convert_revocations.plan_from_wire),
        (revocation_pb2.RevocationRecord(), convert_revocations.revocation_from_wire),
        (revocation_pb2.Propagation(), convert_revocations.propagation_from_wire),
        (revocation_pb2.HoldRecord(), convert_revocations.hold_from_wire),
    )
    for message, read in kinds:
        try:
            message.ParseFromString(content)
        except Exception:  # not a message: protobuf's to refuse
            continue
        try:
            read(message)
        except ProtocolViolation:
            continue


@given(st.sampled_from(list(SubjectKind)[1:]), TEXTS)
def test_a_subject_comes_back_as_it_was(kind: SubjectKind, value: str) -> None:
    subject = Subject(kind, value)
    assert convert_revocations.subject_from_wire(convert_revocations.subject_to_wire(subject)) == (
        subject
    )


@given(st.integers(-(2**63), 2**63 - 1))
def test_milliseconds_are_read_or_refused(milliseconds: int) -> None:
    try:
        moment = convert.time_from_wire_ms(milliseconds)
    except ProtocolViolation:
        return
    if moment is None:
        assert milliseconds == 0
    else:
        assert (moment - EPOCH) // timedelta(milliseconds=1) == milliseconds


@given(st.integers(-(2**63), 2**63 - 1))
def test_times_are_read_or_refused(seconds: int) -> None:
    try:
        moment = convert.time_from_wire(seconds)
    except ProtocolViolation:
        return
    assert (moment is None) == (seconds == 0)
    assert convert.time_to_wire(moment) == seconds


@pytest.mark.parametrize(
    ("enum", "prefix", "known"),
    [
        (credential_pb2.CredentialState, "CREDENTIAL_STATE_", convert._STATES),
        (credential_pb2.CredentialKind, "CREDENTIAL_KIND_", convert._KINDS),
        (revocation_pb2.SubjectKind, "SUBJECT_KIND_", convert_revocations.SUBJECT_KINDS),
        (revocation_pb2.RevocationState, "REVOCATION_STATE_", convert_revocations.STATES),
        (revocation_pb2.VerifierState, "VERIFIER_STATE_", convert_revocations.VERIFIER_STATES),
    ],
)
def test_every_number_of_the_api_has_a_name(enum, prefix, known) -> None:
    numbers = {number for name, number in enum.items() if name != f"{prefix}UNSPECIFIED"}
    assert set(known) == numbers


def test_a_number_of_a_newer_broker_reads_as_unknown() -> None:
    numbers: dict[str, Any] = {"state": 99, "kind": 98, "reason": 97}
    newer: dict[str, Any] = {"state": 99, "subject": {"kind": 96, "value": "x"}, "reason": 95}
    order = convert_revocations.revocation_from_wire(revocation_pb2.RevocationRecord(**newer))
    assert (order.state, order.subject.kind, order.reason) == ("unknown", "unknown", "unspecified")
    record = credential_pb2.CredentialRecord(id="a", revoked_at=1, **numbers)
    found = convert.credential_from_wire(record)
    assert (found.state, found.kind, found.reason) == ("unknown", "unknown", "unspecified")


def test_every_reason_of_the_api_has_a_name() -> None:
    assert set(convert._REASONS) == set(credential_pb2.RevocationReason.values())


def test_a_selector_without_colon_is_left_to_the_broker() -> None:
    assert convert.selector_to_wire("nocolon") == types_pb2.Selector(type="nocolon")
