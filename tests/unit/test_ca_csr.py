"""What is taken from a signing request, and which are refused."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from identity_ca.csr import MAX_CSR_BYTES, parse_csr
from identity_ca.der import element
from identity_ca.errors import CsrRejected, KeyTooWeak
from identity_ca.keys import KeyAlgorithm, key_fingerprint, spki_der
from identity_ca.profile import WORKLOAD
from support.ca import SIGNING_ALGORITHMS, csr_der, request_by, weak_requests, workload_key
from support.ca_material import signing_key

ALL = frozenset(KeyAlgorithm)


@pytest.mark.parametrize("algorithm", SIGNING_ALGORITHMS)
def test_the_key_is_taken(algorithm: KeyAlgorithm) -> None:
    request = parse_csr(csr_der(algorithm), allowed=ALL)
    key = workload_key(algorithm).public_key
    assert request.algorithm is algorithm
    assert request.spki_der == spki_der(key)
    assert request.key_fingerprint == key_fingerprint(key)
    assert spki_der(request.public_key) == spki_der(key)


def test_names_are_ignored() -> None:
    asked = csr_der(subject="root", sans=("spiffe://example.org/admin",))
    assert parse_csr(asked, allowed=ALL).spki_der == parse_csr(csr_der(), allowed=ALL).spki_der


def test_ed25519_only_where_the_profile_allows() -> None:
    with pytest.raises(KeyTooWeak, match="ed25519"):
        parse_csr(csr_der(KeyAlgorithm.ED25519), allowed=WORKLOAD.key_algorithms)


@pytest.mark.parametrize("kind", sorted(weak_requests()))
def test_weak_and_unknown_keys_are_refused(kind: str) -> None:
    with pytest.raises((KeyTooWeak, CsrRejected)) as caught:
        parse_csr(weak_requests()[kind], allowed=ALL)
    if kind != "p-224":  # OpenSSL may not know the curve at all
        assert caught.value.reason == "KEY_TOO_WEAK"


def test_too_long() -> None:
    with pytest.raises(CsrRejected, match=str(MAX_CSR_BYTES)):
        parse_csr(csr_der() + bytes(MAX_CSR_BYTES), allowed=ALL)
    long = request_by(
        workload_key().as_private_key(),
        hashes.SHA256(),
        sans=[f"https://example.org/{number:04d}" for number in range(700)],
    )
    assert len(long) > MAX_CSR_BYTES
    with pytest.raises(CsrRejected, match=str(MAX_CSR_BYTES)):
        parse_csr(long, allowed=ALL)


@pytest.mark.parametrize(
    "damage",
    [
        lambda der: b"",
        lambda der: der[:-1],
        lambda der: der + b"\x00",
        lambda der: b"\x00" + der,
        lambda der: der[: len(der) // 2],
        lambda der: b"-----BEGIN CERTIFICATE REQUEST-----",
        # The version, which is always 0.
        lambda der: der.replace(b"\x02\x01\x00", b"\x02\x01\x05", 1),
    ],
)
def test_not_a_request(damage: object) -> None:
    with pytest.raises(CsrRejected) as caught:
        parse_csr(damage(csr_der()), allowed=ALL)  # type: ignore[operator]
    assert caught.value.hint


def test_possession_must_be_proven() -> None:
    ours = csr_der()
    spki, others = spki_der(workload_key().public_key), spki_der(signing_key(nth=17).public_key)
    with pytest.raises(CsrRejected, match="not signed by the key"):
        parse_csr(ours.replace(spki, others), allowed=ALL)


def test_a_changed_request_is_refused() -> None:
    named = csr_der(subject="name")
    with pytest.raises(CsrRejected, match="not signed by the key"):
        parse_csr(named.replace(b"name", b"nome"), allowed=ALL)


def test_weak_signatures_prove_nothing() -> None:
    key = workload_key(KeyAlgorithm.RSA_2048).as_private_key()
    assert isinstance(key, rsa.RSAPrivateKey)
    good = csr_der(KeyAlgorithm.RSA_2048)
    # sha256WithRSAEncryption -> sha1WithRSAEncryption, and a signature that really is one.
    tbs = x509.load_der_x509_csr(good).tbs_certrequest_bytes
    signature = key.sign(tbs, padding.PKCS1v15(), hashes.SHA1())
    oid, sha1 = bytes.fromhex("2a864886f70d01010b"), bytes.fromhex("2a864886f70d010105")
    forged = good[:4] + tbs + good[4 + len(tbs) : -256].replace(oid, sha1) + signature
    assert isinstance(x509.load_der_x509_csr(forged).signature_hash_algorithm, hashes.SHA1)
    with pytest.raises(CsrRejected, match="proves nothing"):
        parse_csr(forged, allowed=ALL)


def test_the_longest_request_is_read() -> None:
    ours = csr_der()
    parse_csr(ours, allowed=ALL, max_bytes=len(ours))
    with pytest.raises(CsrRejected, match="longer than"):
        parse_csr(ours, allowed=ALL, max_bytes=len(ours) - 1)


@pytest.mark.parametrize("digest", [hashes.SHA256(), hashes.SHA384(), hashes.SHA512()])
@pytest.mark.parametrize(
    "algorithm", [KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048]
)
def test_every_strong_signature_proves_possession(
    algorithm: KeyAlgorithm, digest: hashes.HashAlgorithm
) -> None:
    key = workload_key(algorithm)
    request = parse_csr(request_by(key.as_private_key(), digest), allowed=ALL)
    assert request.spki_der == spki_der(key.public_key)


@pytest.mark.parametrize(
    ("key", "signature_algorithm"),
    [
        (KeyAlgorithm.EC_P256, "300506032b6570"),  # Ed25519
        (KeyAlgorithm.EC_P256, "300d06092a864886f70d01010b0500"),  # RSA with SHA-256
        (KeyAlgorithm.ED25519, "300a06082a8648ce3d040302"),  # ECDSA with SHA-256
        (KeyAlgorithm.RSA_2048, "300a06082a8648ce3d040302"),
        (KeyAlgorithm.RSA_2048, "300506032b6570"),
    ],
)
def test_a_signature_of_another_kind_than_the_key_is_refused(
    key: KeyAlgorithm, signature_algorithm: str
) -> None:
    info = x509.load_der_x509_csr(csr_der(key)).tbs_certrequest_bytes
    signature = workload_key(key).sign(info)
    mixed = element(
        0x30, info + bytes.fromhex(signature_algorithm) + element(0x03, b"\0" + signature)
    )
    with pytest.raises(CsrRejected, match=r"cannot be checked|not signed by"):
        parse_csr(mixed, allowed=ALL)


def test_a_key_nobody_knows_is_too_weak_and_no_accident() -> None:
    # The curve's OID: prime256v1 -> prime239v2.
    p256, unknown = bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030105")
    changed = csr_der().replace(p256, unknown)
    with pytest.raises(KeyTooWeak, match="cannot be used"):
        parse_csr(changed, allowed=ALL)
