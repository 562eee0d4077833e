"""Hostile bundles: whatever the bytes, the answer is a bundle or a `BundleRejected`."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from identity_ca.bundle import JwtKey, TrustBundle, parse_bundle_map
from identity_ca.errors import BundleRejected
from identity_ca.keys import KeyAlgorithm, spki_der
from support.ca_material import TRUST_DOMAIN, der, pem, root_certificate, signing_key

T = TypeVar("T")
EXAMPLES = 200
GOOD = TrustBundle(
    TRUST_DOMAIN,
    x509_authorities=(der(root_certificate()),),
    jwt_keys=(
        JwtKey("key-1", spki_der(signing_key().public_key)),
        JwtKey("key-2", spki_der(signing_key(KeyAlgorithm.RSA_2048).public_key)),
    ),
).to_spiffe_json()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
members = st.sampled_from(["kty", "use", "kid", "crv", "x", "y", "n", "e", "d", "x5c", "alg"])


def read(document: bytes) -> None:
    """Every reader on every input; what one reads, it can write and read again."""
    for reader in (TrustBundle.from_spiffe_json, TrustBundle.from_jwks, TrustBundle.from_pem):
        bundle = unless_rejected(partial(reader, TRUST_DOMAIN, document))
        if bundle is not None:
            again = TrustBundle.from_spiffe_json(TRUST_DOMAIN, bundle.to_spiffe_json())
            assert again == bundle
    unless_rejected(partial(parse_bundle_map, document))


def unless_rejected(reading: Callable[[], T]) -> T | None:
    try:
        return reading()
    except BundleRejected as rejection:
        sentence = rejection.message
    assert 0 < len(sentence) < 300
    return None


@given(st.binary(max_size=300))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_bytes(document):
    read(document)


@given(json_values)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_json(value):
    for document in (value, {"keys": value}, {"keys": [value]}, {"trust_domains": value}):
        read(json.dumps(document).encode())


@given(st.integers(0, 2), st.dictionaries(members | st.text(), json_values, max_size=3))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_good_key_with_any_members_replaced(which, changes):
    document = json.loads(GOOD)
    document["keys"][which] |= changes
    read(json.dumps(document).encode())


@given(
    st.integers(0, 2),
    members,
    st.text("ABCDEFabcdef0189-_", max_size=700) | st.lists(st.text(), max_size=2),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_good_key_with_one_plausible_member(which, member, value):
    document = json.loads(GOOD)
    document["keys"][which][member] = value
    read(json.dumps(document).encode())


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_good_bundle_mangled(data):
    source = data.draw(st.sampled_from([GOOD, pem(root_certificate())]))
    start = data.draw(st.integers(0, len(source)))
    end = data.draw(st.integers(start, min(len(source), start + 30)))
    read(source[:start] + data.draw(st.binary(max_size=10)) + source[end:])


@given(st.integers(0, 2**31), st.integers(1, 255))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_certificate_with_one_octet_changed(position, flip):
    certificate = bytearray(der(root_certificate()))
    certificate[position % len(certificate)] ^= flip
    document = json.loads(GOOD)
    document["keys"][0]["x5c"] = [b64encode(certificate).decode()]
    read(json.dumps(document).encode())


@given(st.integers(0, 2**31), st.integers(1, 255))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_stored_key_with_one_octet_changed(position, flip):
    public_key = bytearray(spki_der(signing_key().public_key))
    public_key[position % len(public_key)] ^= flip
    bundle = TrustBundle(TRUST_DOMAIN, jwt_keys=(JwtKey("key-1", bytes(public_key)),))
    try:
        bundle.to_jwks()
    except BundleRejected:
        return
    TrustBundle.from_jwks(TRUST_DOMAIN, bundle.to_jwks())
