"""Whatever a Workload API sends, the SDK's readers either understand it or say that they do not."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import suppress
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from identity_client import IdentitySource, IdentityWithdrawn, SettingsInvalid, SourceState
from identity_client._wire.workload import (
    JWTBundlesResponse,
    JWTSVIDResponse,
    X509SVIDResponse,
)
from identity_client._wire.workload_values import (
    authorities_from_der,
    jwt_bundles_from_wire,
    split_der,
    token_from_wire,
    x509_state_from_wire,
)
from identity_client.clock import utc_now
from identity_client.errors import NotPermitted, ProtocolViolation
from identity_client.holder import IdentityHolder
from identity_client.revocation import DenySet, Issuer, RevocationList
from identity_client.testing import FakeIdentitySource
from identity_client.workload_api.endpoint import Endpoint
from identity_client.workload_api.engine import WorkloadApiEngine
from identity_client.workload_api.revocation_lists import ListReader
from identity_client.workload_api.settings import WorkloadApiSettings
from support.workload_server import ScriptedDomain

DOMAIN = ScriptedDomain("example.org")
MATERIAL = DOMAIN.svid("/web")
GOOD = X509SVIDResponse(svids=[DOMAIN.offer(MATERIAL)], crl=[DOMAIN.crl([MATERIAL.serial])])
GOOD_ALONE = X509SVIDResponse(svids=[DOMAIN.offer(MATERIAL)])
RENEWED = X509SVIDResponse(svids=[DOMAIN.offer(DOMAIN.svid("/web"))])
DER = DOMAIN.bundle_der()


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_der_is_split_where_it_was_joined(contents: list[bytes]) -> None:
    def wrapped(content: bytes) -> bytes:
        size = len(content)
        if size < 0x80:
            return b"\x30" + bytes([size]) + content
        return b"\x30\x82" + size.to_bytes(2) + content

    parts = tuple(wrapped(one) for one in contents)
    assert split_der(b"".join(parts)) == parts


@given(st.binary(max_size=64))
def test_what_is_no_der_is_not_split(data: bytes) -> None:
    try:
        parts = split_der(data)
    except ProtocolViolation:
        return
    assert b"".join(parts) == data
    assert all(one[0] == 0x30 for one in parts)


@pytest.mark.parametrize(
    "data", [b"", b"\x30", b"\x30\x80", b"\x30\x85\x01\x01\x01\x01\x01", DER[:-1]]
)
def test_bundles_that_are_none(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        authorities_from_der(data)
    assert len(authorities_from_der(DER + DER)) == 2


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.data())
def test_a_damaged_message_is_understood_or_refused(data: st.DataObject) -> None:
    wire = bytearray(GOOD.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        state = x509_state_from_wire(X509SVIDResponse.FromString(bytes(wire)))
    except (ProtocolViolation, DecodeError):
        return
    assert state.svids
    ListReader().read(state.crls)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.data())
def test_a_damaged_message_changes_nothing_or_is_taken_whole(data: st.DataObject) -> None:
    settings = WorkloadApiSettings(Endpoint.parse("unix:///nowhere"))
    holder = IdentityHolder()
    engine = WorkloadApiEngine(settings, holder)
    engine._jwt_known.set()
    asyncio.run(engine._take_x509(GOOD_ALONE))
    before = holder.snapshot()
    wire = bytearray(RENEWED.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        asyncio.run(engine._take_x509(X509SVIDResponse.FromString(bytes(wire))))
    except (ProtocolViolation, NotPermitted, DecodeError):
        assert holder.snapshot() is before


@given(st.binary(max_size=200), st.text(max_size=40))
def test_any_jwt_bundle(document: bytes, name: str) -> None:
    message = JWTBundlesResponse(bundles={name: document, "spiffe://example.org": DOMAIN.jwks()})
    found = jwt_bundles_from_wire(message)
    assert DOMAIN.trust_domain in found


@pytest.mark.parametrize(
    "document",
    [
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": [1]}',
        b'{"keys": [{"kty": "EC", "kid": "x"}]}',
        b"\xff",
    ],
)
def test_jwt_bundles_that_cannot_be_are_left_out(document: bytes) -> None:
    name = "spiffe://partner.org"
    found = jwt_bundles_from_wire(
        JWTBundlesResponse(bundles={name: document, "spiffe://example.org": DOMAIN.jwks()})
    )
    keys = [one.jwt_authorities for domain, one in found.items() if domain.name == "partner.org"]
    assert keys in ([], [{}])
    with pytest.raises(ProtocolViolation):
        jwt_bundles_from_wire(JWTBundlesResponse())


@given(st.text(max_size=60))
def test_any_token(token: str) -> None:
    answer = JWTSVIDResponse()
    answer.svids.add(spiffe_id="spiffe://example.org/web", svid=token.encode("utf-8", "ignore"))
    with pytest.raises(ProtocolViolation) as refused:
        token_from_wire(
            answer, spiffe_id="spiffe://example.org/web", audiences=["a"], received=utc_now()
        )
    assert len(token) < 8 or token not in str(refused.value)


def test_a_token_of_somebody_else_is_refused() -> None:
    from spiffe import SpiffeId

    web, api = "spiffe://example.org/web", "spiffe://example.org/api"
    token = DOMAIN.issue_jwt(SpiffeId(api), ["a"], timedelta(minutes=1)).token
    for said, wanted, audience in ((api, web, "a"), (web, web, "a"), (api, api, "b")):
        answer = JWTSVIDResponse()
        answer.svids.add(spiffe_id=said, svid=token)
        with pytest.raises(ProtocolViolation):
            token_from_wire(answer, spiffe_id=wanted, audiences=[audience], received=utc_now())
    answer = JWTSVIDResponse()
    answer.svids.add(spiffe_id=api, svid=token)
    assert token_from_wire(answer, spiffe_id=api, audiences=["a"], received=utc_now()).jti


@given(st.text(max_size=80))
def test_any_address(uri: str) -> None:
    with suppress(SettingsInvalid):
        endpoint = Endpoint.parse(uri)
        assert endpoint.target.startswith(("unix:/", "ipv4:", "ipv6:["))


# --- revocation lists --------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=100), max_size=4))
def test_any_list(crls: list[bytes]) -> None:
    assert ListReader().read(crls) == ()


def _list(*extensions: tuple[x509.ExtensionType, bool], name: str = "ca") -> bytes:
    now = utc_now()
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .last_update(now)
        .next_update(now + timedelta(hours=1))
        .add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(0x01AB).revocation_date(now).build()
        )
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    key = ec.generate_private_key(ec.SECP256R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _point(*, indirect: bool) -> x509.IssuingDistributionPoint:
    return x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_contains_user_certs=not indirect,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=indirect,
        only_contains_attribute_certs=False,
    )


def test_a_list_of_a_kind_that_is_not_understood_says_nothing() -> None:
    reader = ListReader()
    assert len(reader.read([_list()])) == 1
    assert len(reader.read([_list((_point(indirect=False), True))])) == 1
    assert reader.read([_list((_point(indirect=True), True))]) == ()
    assert reader.read([_list((x509.DeltaCRLIndicator(1), True))]) == ()
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    assert reader.read([_list((unknown, True))]) == ()
    assert len(reader.read([_list((unknown, False))])) == 1


def test_a_list_of_a_version_that_there_is_not_says_nothing() -> None:
    good = DOMAIN.crl(["01ab"])
    assert len(ListReader().read([good])) == 1
    version = b"\x02\x01\x01"
    assert good.count(version, 0, 16) == 1
    assert ListReader().read([good.replace(version, b"\x02\x01\x00", 1)]) == ()


def test_a_list_denies_by_name_and_key() -> None:
    denied = DenySet()
    ours = Issuer(b"name", b"key")
    denied.replace_lists([RevocationList.of(ours, ["01ab"])], now=utc_now())
    assert denied.denies("01ab", ours)
    assert denied.denies("01ab", Issuer(b"name", b""))
    assert not denied.denies("01ac", ours)
    assert not denied.denies("01ab", Issuer(b"name", b"other"))
    assert not denied.denies("01ab", Issuer(b"other", b"key"))
    assert not denied.denies("01ab", None)
    assert len(denied) == 1
    denied.replace_lists([], now=utc_now())
    assert not denied.denies("01ab", ours)


# --- the fake source ---------------------------------------------------------------------------


def test_a_fake_source_has_everything_that_a_source_has() -> None:
    def public(kind: type) -> dict[str, object]:
        return {
            name: value
            for name, value in inspect.getmembers(kind)
            if not name.startswith(("_", "from_")) and name != "settings"
        }

    real, fake = public(IdentitySource), public(FakeIdentitySource)
    assert real.keys() <= fake.keys()
    for name, method in real.items():
        if inspect.isfunction(method):
            stands_in = fake[name]
            assert inspect.isfunction(stands_in)
            assert inspect.signature(method) == inspect.signature(stands_in), name


def test_a_fake_source_can_be_withdrawn() -> None:
    source = ScriptedDomain("example.org").source("spiffe://example.org/web")
    source.withdraw()
    assert source.status().state is SourceState.WITHDRAWN
    with pytest.raises(IdentityWithdrawn):
        source.snapshot()
    source.rotate()
    assert source.status().ready
