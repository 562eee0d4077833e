"""Whatever a local process says to secret discovery is answered or refused, never a bug."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.agent.identity import WorkloadState, X509Identity
from identity_broker.agent.sds import messages
from identity_broker.agent.sds.resources import ClientWishes, resources_of
from identity_broker.agent.sds.subscription import Incremental, StateOfTheWorld
from identity_broker.errors import MalformedRequest
from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import TrustDomain

OWN = TrustDomain("example.org")
STATE = WorkloadState(
    identities=(
        X509Identity(
            entry_id="e",
            spiffe_id="spiffe://example.org/a",
            hint="",
            chain=(b"leaf",),
            key=b"key",
            serial="0" * 40,
            not_after=datetime(2030, 1, 1, tzinfo=UTC),
        ),
    ),
    bundle=TrustBundle(OWN, x509_authorities=(b"root",)),
    federated={},
    crls=(b"crl",),
    revision=1,
)
NAMES = ["default", "ROOTCA", "ALL", "*", "spiffe://example.org", "spiffe://example.org/a"]
names = st.lists(st.one_of(st.sampled_from(NAMES), st.text(max_size=50)), max_size=8)
values = st.one_of(st.booleans(), st.text(max_size=5), st.none(), st.floats(), st.just([True]))
metadata = st.dictionaries(
    st.sampled_from([messages.PLAIN_KEY, messages.CRL_KEY, "other"]), values, max_size=3
)
short = st.text(max_size=20)
nonces = st.one_of(st.sampled_from(["", "1", "2", "3"]), short)


@st.composite
def requests(draw: Any) -> Any:
    request = discovery_pb2.DiscoveryRequest(
        resource_names=draw(names), response_nonce=draw(nonces), version_info=draw(short)
    )
    if draw(st.booleans()):
        request.node.metadata.update(draw(metadata))
    if draw(st.booleans()):
        request.error_detail.message = draw(short)
    return request


@st.composite
def delta_requests(draw: Any) -> Any:
    request = discovery_pb2.DeltaDiscoveryRequest(
        resource_names_subscribe=draw(names),
        resource_names_unsubscribe=draw(names),
        initial_resource_versions=draw(st.dictionaries(short, short, max_size=4)),
        response_nonce=draw(nonces),
    )
    if draw(st.booleans()):
        request.node.metadata.update(draw(metadata))
    if draw(st.booleans()):
        request.error_detail.message = draw(short)
    return request


def resolver(message: Any) -> Any:
    wishes = messages.wishes_of(message) or ClientWishes()
    return lambda asked, everything: resources_of(STATE, asked, wildcard=everything, wishes=wishes)


@given(said=st.lists(requests(), min_size=1, max_size=5))
def test_any_conversation_of_the_first_variant_ends_quietly(said: list[Any]) -> None:
    server = StateOfTheWorld()
    for message in said:
        server.receive(messages.request_of(message))
        if answer := server.owed(resolver(said[0])):
            sent = messages.response_of(answer)
            assert sent.ByteSize() < 100_000
            assert len({secret.name for secret in answer.resources}) == len(answer.resources)
        assert server.owed(resolver(said[0])) is None


@given(said=st.lists(delta_requests(), min_size=1, max_size=5))
def test_any_conversation_of_the_second_variant_ends_quietly(said: list[Any]) -> None:
    server = Incremental()
    for message in said:
        server.receive(messages.delta_request_of(message))
        if answer := server.owed(resolver(said[0])):
            assert messages.delta_response_of(answer).ByteSize() < 100_000
            assert not {secret.name for secret in answer.resources} & {*answer.removed}
        assert server.owed(resolver(said[0])) is None


@given(raw=st.binary(max_size=200))
def test_bytes_are_a_request_or_are_none(raw: bytes) -> None:
    for kind, read in (
        (discovery_pb2.DiscoveryRequest, messages.request_of),
        (discovery_pb2.DeltaDiscoveryRequest, messages.delta_request_of),
    ):
        with suppress(DecodeError, MalformedRequest):
            read(kind.FromString(raw))
