from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.errors import Unauthenticated
from identity_broker.server.rpc.peer_certificate import PeerCertificates, parse_peer_certificate
from support.tls_material import LEAF_USAGE, TestAuthority, key_usage

AUTHORITY = TestAuthority()


def test_parsed_once_and_forgotten_in_order() -> None:
    pems = [AUTHORITY.issue(f"spiffe://example.org/{n}").chain_pem for n in range(4)]
    certificates = PeerCertificates(capacity=3)
    first = certificates.of(pems[0])
    assert str(first.spiffe_id) == "spiffe://example.org/0"
    assert certificates.of(bytes(bytearray(pems[0]))) is first
    for pem in pems[1:3]:
        certificates.of(pem)
    certificates.of(pems[0])
    certificates.of(pems[3])
    assert len(certificates) == 3
    assert certificates.of(pems[0]) is first  # used lately
    assert len(certificates) == 3


@pytest.mark.parametrize(
    "uris",
    [
        (),
        ("spiffe://example.org/a", "spiffe://example.org/b"),
        ("spiffe://example.org",),
        ("spiffe://Example.org/a",),
        ("spiffe://example.org/a/../b",),
        ("spiffe://example.org/%2e%2e",),
        ("https://example.org/a",),
        ("spiffe://example.org/" + "a" * 2048,),
    ],
)
def test_what_is_no_svid_is_refused_and_not_remembered(uris: tuple[str, ...]) -> None:
    certificates = PeerCertificates()
    with pytest.raises(Unauthenticated):
        certificates.of(AUTHORITY.issue(*uris).chain_pem)
    assert len(certificates) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"ca": True},
        {"ca": True, "usage": key_usage("key_cert_sign", "crl_sign")},
        {"usage": key_usage("digital_signature", "key_cert_sign")},
        {"ca": None, "usage": key_usage("digital_signature", "crl_sign")},
        {"usage": key_usage("key_encipherment")},
        {"usage": None},
    ],
)
def test_only_a_leaf_that_may_sign_is_an_identity(options: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        parse_peer_certificate(AUTHORITY.issue("spiffe://example.org/a", **options).chain_pem)


@pytest.mark.parametrize("ca", [False, None])
def test_the_leaf_says_which_authority_signed(ca: bool | None) -> None:
    leaf = AUTHORITY.issue("spiffe://example.org/a", ca=ca, usage=LEAF_USAGE)
    assert parse_peer_certificate(leaf.chain_pem).authority_key_id == AUTHORITY.key_id
    mute = AUTHORITY.issue("spiffe://example.org/a", names_issuer=False)
    assert parse_peer_certificate(mute.chain_pem).authority_key_id == ""


@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser(pem: bytes) -> None:
    with pytest.raises(Unauthenticated):
        parse_peer_certificate(pem)


@given(st.integers(0, 600), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_read(position: int, value: int) -> None:
    pem = bytearray(AUTHORITY_LEAF)
    pem[position % len(pem)] = value
    with suppress(Unauthenticated):
        assert parse_peer_certificate(bytes(pem)).spiffe_id.path


AUTHORITY_LEAF = AUTHORITY.issue("spiffe://example.org/a").chain_pem
