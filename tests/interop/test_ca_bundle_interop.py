"""Our bundles, read by py-spiffe and PyJWT; both kinds of key, every format."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
import spiffe
from cryptography import x509
from spiffe.bundle.jwt_bundle.jwt_bundle import JwtBundle
from spiffe.bundle.x509_bundle.x509_bundle import X509Bundle

from identity_ca.bundle import JwtKey, TrustBundle
from identity_ca.keys import KeyAlgorithm, spki_der
from support.ca_material import TRUST_DOMAIN, der, root_certificate, signing_key

ALGORITHMS = (KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048)
SPIFFE_DOMAIN = spiffe.TrustDomain("example.org")


@pytest.fixture
def bundle() -> TrustBundle:
    return TrustBundle(
        TRUST_DOMAIN,
        x509_authorities=tuple(der(root_certificate(a)) for a in ALGORITHMS),
        jwt_keys=tuple(JwtKey(a.value, spki_der(signing_key(a).public_key)) for a in ALGORITHMS),
        sequence=4,
    )


def test_py_spiffe_reads_the_x509_bundle_as_pem(bundle):
    read = X509Bundle.parse(SPIFFE_DOMAIN, bundle.to_pem())
    assert {der(c) for c in read.x509_authorities} == set(bundle.x509_authorities)


def test_py_spiffe_reads_the_x509_bundle_as_the_workload_api_sends_it(bundle):
    read = X509Bundle.parse_raw(SPIFFE_DOMAIN, b"".join(bundle.x509_authorities))
    assert {der(c) for c in read.x509_authorities} == set(bundle.x509_authorities)


def test_py_spiffe_reads_the_jwt_bundle(bundle):
    read = JwtBundle.parse(SPIFFE_DOMAIN, bundle.to_jwks())
    assert {
        key_id: spki_der(public_key) for key_id, public_key in read.jwt_authorities.items()
    } == {key.key_id: key.public_key_der for key in bundle.jwt_keys}


def test_py_spiffe_reads_an_empty_jwt_bundle():
    assert JwtBundle.parse(SPIFFE_DOMAIN, TrustBundle(TRUST_DOMAIN).to_jwks()).jwt_authorities == {}


def test_pyjwt_reads_the_jwks(bundle):
    read = jwt.PyJWKSet.from_json(bundle.to_jwks().decode())
    assert [(k.key_id, k.algorithm_name) for k in read.keys] == [
        ("ec-p256", "ES256"),
        ("ec-p384", "ES384"),
        ("rsa-2048", "RS256"),
    ]


def test_pyjwt_reads_every_key_of_the_spiffe_document(bundle):
    """An independent JWK reader finds the same numbers, in X.509 and JWT keys alike."""
    document = json.loads(bundle.to_spiffe_json())
    wanted = [
        *(x509.load_der_x509_certificate(a).public_key() for a in bundle.x509_authorities),
        *(signing_key(a).public_key for a in ALGORITHMS),
    ]
    for jwk, public_key in zip(document["keys"], wanted, strict=True):
        assert spki_der(jwt.PyJWK.from_dict(jwk).key) == spki_der(public_key)


def test_we_read_a_jwks_written_by_pyjwt():
    writers: dict[KeyAlgorithm, Any] = {
        KeyAlgorithm.EC_P256: jwt.algorithms.ECAlgorithm,
        KeyAlgorithm.RSA_2048: jwt.algorithms.RSAAlgorithm,
    }
    jwks = {
        "keys": [
            json.loads(writer.to_jwk(signing_key(kind).public_key)) | {"kid": kind.value}
            for kind, writer in writers.items()
        ]
    }
    read = TrustBundle.from_jwks(TRUST_DOMAIN, json.dumps(jwks).encode())
    assert [(k.key_id, k.public_key_der) for k in read.jwt_keys] == [
        (a.value, spki_der(signing_key(a).public_key))
        for a in (KeyAlgorithm.EC_P256, KeyAlgorithm.RSA_2048)
    ]
