"""Which keys are strong enough, and what a local signing key answers with."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa, x25519

from identity_ca.errors import KeyTooWeak
from identity_ca.keys import (
    KeyAlgorithm,
    LocalSigningKey,
    algorithm_of,
    generate_private_key,
    key_fingerprint,
    signature_hash,
    spki_der,
    verify_signature,
)
from support.ca import SIGNING_ALGORITHMS
from support.ca_material import signing_key

CURVES = {KeyAlgorithm.EC_P256: "secp256r1", KeyAlgorithm.EC_P384: "secp384r1"}


@pytest.mark.parametrize("algorithm", SIGNING_ALGORITHMS)
def test_a_generated_key_is_of_its_algorithm(algorithm: KeyAlgorithm) -> None:
    assert signing_key(algorithm).algorithm is algorithm
    assert algorithm_of(signing_key(algorithm).public_key) is algorithm


@pytest.mark.parametrize(("bits", "algorithm"), [(3072, "rsa-3072"), (4096, "rsa-4096")])
def test_larger_rsa_keys_have_their_names(bits: int, algorithm: str) -> None:
    modulus = (1 << (bits - 1)) + 1
    public_key = rsa.RSAPublicNumbers(65537, modulus).public_key()
    assert algorithm_of(public_key).value == algorithm


@pytest.mark.parametrize(
    ("bits", "exponent"),
    [(1024, 65537), (2047, 65537), (2056, 65537), (8192, 65537), (2048, 3), (2048, 257)],
)
def test_rsa_keys_of_odd_sizes_or_small_exponents_are_refused(bits: int, exponent: int) -> None:
    public_key = rsa.RSAPublicNumbers(exponent, (1 << (bits - 1)) + 1).public_key()
    with pytest.raises(KeyTooWeak):
        algorithm_of(public_key)


def test_a_huge_rsa_exponent_is_refused() -> None:
    public_key = rsa.RSAPublicNumbers((1 << 256) + 1, (1 << 2047) + 1).public_key()
    with pytest.raises(KeyTooWeak, match="exponent"):
        algorithm_of(public_key)


@pytest.mark.parametrize(
    "public_key",
    [
        ec.generate_private_key(ec.SECP521R1()).public_key(),
        ec.generate_private_key(ec.SECP256K1()).public_key(),
        ed448.Ed448PrivateKey.generate().public_key(),
        x25519.X25519PrivateKey.generate().public_key(),
        dsa.DSAPublicNumbers(
            3, dsa.DSAParameterNumbers(p=(1 << 2047) + 1, q=(1 << 255) + 1, g=2)
        ).public_key(),
        "not a key",
    ],
    ids=["p521", "secp256k1", "ed448", "x25519", "dsa", "str"],
)
def test_other_kinds_of_keys_are_refused(public_key: object) -> None:
    with pytest.raises(KeyTooWeak) as caught:
        algorithm_of(public_key)
    assert caught.value.reason == "KEY_TOO_WEAK"


@pytest.mark.parametrize("algorithm", SIGNING_ALGORITHMS)
def test_signatures_are_in_x509_encoding(algorithm: KeyAlgorithm) -> None:
    key = signing_key(algorithm)
    first, second = key.sign_many([b"one", b"two"])
    verify_signature(key.public_key, first, b"one")
    verify_signature(key.public_key, second, b"two")
    with pytest.raises(InvalidSignature):
        verify_signature(key.public_key, first, b"two")
    if isinstance(key.public_key, ec.EllipticCurvePublicKey):
        digest = {"ec-p256": hashes.SHA256(), "ec-p384": hashes.SHA384()}[algorithm.value]
        key.public_key.verify(key.sign(b"m"), b"m", ec.ECDSA(digest))
        assert key.public_key.curve.name == CURVES[algorithm]


def test_hashes_follow_the_key() -> None:
    assert signature_hash(KeyAlgorithm.ED25519) is None
    assert isinstance(signature_hash(KeyAlgorithm.EC_P384), hashes.SHA384)
    assert isinstance(signature_hash(KeyAlgorithm.RSA_4096), hashes.SHA256)


def test_a_fingerprint_is_the_digest_of_the_key_info() -> None:
    key = signing_key().public_key
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki_der(key))
    assert key_fingerprint(key) == digest.finalize().hex()


def test_a_signing_key_does_not_print_its_private_half() -> None:
    private_key = generate_private_key(KeyAlgorithm.EC_P256)
    assert isinstance(private_key, ec.EllipticCurvePrivateKey)
    key = LocalSigningKey("memory:x@1", private_key)
    secret = private_key.private_numbers().private_value
    assert f"{secret:x}" not in repr(key)
    assert str(secret) not in repr(key)
    assert "memory:x@1" in repr(key)
