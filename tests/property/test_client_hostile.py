"""Whatever the broker or a peer sends, only errors of the SDK come out of its readers."""

from __future__ import annotations

from contextlib import suppress

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from spiffe import TrustDomain

from identity_api.broker.v1 import types_pb2
from identity_client._wire.convert import (
    bundle_from_wire,
    entries_from_wire,
)
from identity_client._wire.status import error_from_item, error_from_rpc
from identity_client.clock import utc_now
from identity_client.credential import X509Material
from identity_client.errors import IdentityError
from identity_client.keys import KeyPair
from identity_client.peer import peer_from_der, peer_from_pem
from identity_client.testing import FakeTrustDomain

DOMAIN = FakeTrustDomain("example.org")
SNAPSHOT = DOMAIN.source("spiffe://example.org/web").snapshot()
LEAF = SNAPSHOT.svid.leaf.public_bytes(Encoding.DER)
ROOT = DOMAIN.bundle.x509_authorities[0].public_bytes(Encoding.DER)
NAME = TrustDomain("example.org")
KEY = KeyPair()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A certificate with a few octets changed, inserted or cut: what parsers trip over."""
    octets = bytearray(draw(st.sampled_from([LEAF, ROOT])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(octets) - 1))
        match draw(st.sampled_from(["set", "insert", "cut"])):
            case "set":
                octets[at] = draw(st.integers(0, 255))
            case "insert":
                octets[at:at] = draw(st.binary(min_size=1, max_size=3))
            case "cut":
                del octets[at : at + draw(st.integers(1, 8))]
        if not octets:
            octets.append(0)
    return bytes(octets)


# cryptography warns of what it will refuse one day; the SDK refuses it already.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")

certificates = st.one_of(st.binary(max_size=40), mutated())


@given(certificates)
def test_certificates_of_peers(der: bytes) -> None:
    with suppress(IdentityError):
        peer = peer_from_der(der)
        assert peer.id.startswith(f"spiffe://{peer.trust_domain}/")
        assert str(peer.spiffe_id) == peer.id
        assert not peer.serial.startswith("-")
    with suppress(IdentityError):
        peer_from_pem(b"-----BEGIN CERTIFICATE-----\n" + der + b"\n-----END CERTIFICATE-----\n")


@given(st.lists(certificates, max_size=3))
def test_chains(chain: list[bytes]) -> None:
    with suppress(IdentityError):
        X509Material.from_chain(
            chain, private_key=KEY.private_key, bundle=DOMAIN.bundle, received=utc_now()
        )
        raise AssertionError("a chain for somebody else's key was accepted")


@given(
    name=st.sampled_from(["example.org", "", "other.org"]),
    authorities=st.lists(certificates, max_size=3),
    keys=st.lists(st.binary(max_size=100), max_size=3),
    sequence=st.integers(0, 2**64 - 1),
)
def test_bundles(name: str, authorities: list[bytes], keys: list[bytes], sequence: int) -> None:
    message = types_pb2.TrustBundle(
        trust_domain=name,
        x509_authorities=authorities,
        jwt_keys=[types_pb2.JwtKey(key_id=str(n), public_key=k) for n, k in enumerate(keys)],
        sequence=sequence,
    )
    with suppress(IdentityError):
        bundle = bundle_from_wire(message, NAME)
        assert bundle.x509_authorities
        assert name == "example.org"


@given(st.text(max_size=40), st.integers(-(2**63), 2**63 - 1))
def test_entries(text: str, moment: int) -> None:
    with suppress(IdentityError):
        entries_from_wire(
            [types_pb2.RegistrationEntry(spiffe_id=text, expires_at=moment)], now=utc_now()
        )


@given(
    code=st.integers(-(2**31), 2**31 - 1),
    reason=st.text(max_size=10),
    retry=st.integers(-(2**31), 2**31 - 1),
)
def test_statuses_of_items(code: int, reason: str, retry: int) -> None:
    error = error_from_item(types_pb2.Status(code=code, reason=reason, retry_after_seconds=retry))
    assert (error is None) == (code == 0)


class Ended(grpc.RpcError):
    def __init__(self, details: bytes) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.PERMISSION_DENIED

    def details(self) -> str:
        return "no"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:  # type: ignore[override]
        return (("grpc-status-details-bin", self._details),)


@given(st.binary(max_size=200))
def test_details_of_refusals(details: bytes) -> None:
    assert error_from_rpc(Ended(details)).reason
