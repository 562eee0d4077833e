"""What a key may be, and who holds it.

- `algorithm_of` is the only place that decides which keys are strong enough.
- Whoever signs sees a `SigningKey`; the private half of a remote one is never in this process.
- `sign` takes the message, not its digest, and answers in X.509 encoding: ECDSA as DER with
  SHA-256 (P-256) or SHA-384 (P-384), RSA as PKCS #1 v1.5 with SHA-256, Ed25519 as is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final, Protocol

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificateIssuerPrivateKeyTypes,
    PublicKeyTypes,
)

from identity_ca.errors import KeyTooWeak

__all__ = [
    "KeyAlgorithm",
    "KeyManager",
    "LocalSigningKey",
    "SigningKey",
    "algorithm_of",
    "generate_private_key",
    "key_fingerprint",
    "signature_hash",
    "spki_der",
    "verify_signature",
]

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey

# FIPS 186-5 section A.1.1: odd and between 2^16 and 2^256. Large exponents cost verifiers time.
_MIN_RSA_EXPONENT: Final = 65537
_MAX_RSA_EXPONENT: Final = 1 << 256
_HINT: Final = "use an EC P-256 key"


class KeyAlgorithm(StrEnum):
    """Kinds of keys this library knows; a profile allows some of them."""

    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"
    ED25519 = "ed25519"


_RSA_BY_SIZE: Final = {
    2048: KeyAlgorithm.RSA_2048,
    3072: KeyAlgorithm.RSA_3072,
    4096: KeyAlgorithm.RSA_4096,
}
_RSA_SIZES: Final = {algorithm: size for size, algorithm in _RSA_BY_SIZE.items()}
_SHA256: Final = hashes.SHA256()
_SHA384: Final = hashes.SHA384()
_ECDSA_SHA256: Final = ec.ECDSA(_SHA256)
_ECDSA_SHA384: Final = ec.ECDSA(_SHA384)
_PKCS1V15: Final = padding.PKCS1v15()


class SigningKey(Protocol):
    """One version of one key, able to sign. Safe to use from several threads.

    Attributes:
        key_id: `<manager>:<name>@<version>`.
        remote: True when every signature costs a round trip and is verified here on return.
    """

    @property
    def key_id(self) -> str: ...

    @property
    def algorithm(self) -> KeyAlgorithm: ...

    @property
    def remote(self) -> bool: ...

    @property
    def public_key(self) -> PublicKey: ...

    def sign(self, message: bytes) -> bytes:
        """The signature over `message`, in X.509 encoding.

        Raises:
            BackendUnavailable, BackendMisconfigured, KeyNotFound: remote keys only.
        """
        ...

    def sign_many(self, messages: Sequence[bytes]) -> list[bytes]:
        """Signatures in the order of the messages; one round trip for a remote key."""
        ...

    def as_private_key(self) -> CertificateIssuerPrivateKeyTypes:
        """An object the certificate, CSR and CRL builders of `cryptography` can sign with."""
        ...


class KeyManager(Protocol):
    """Makes and finds signing keys; one plugin kind, see `backends/`."""

    @property
    def name(self) -> str: ...

    def create(self, purpose: str, algorithm: KeyAlgorithm) -> SigningKey:
        """A new key, or a new version of the key for `purpose` (`x509` or `jwt`).

        Raises:
            BackendUnavailable, BackendMisconfigured
        """
        ...

    def load(self, key_id: str) -> SigningKey:
        """The key of that id.

        Raises:
            KeyNotFound, BackendUnavailable, BackendMisconfigured
        """
        ...

    def check(self) -> None:
        """Returns when the backend can be used; signs nothing.

        Raises:
            BackendUnavailable, BackendMisconfigured
        """
        ...

    def close(self) -> None:
        """Gives back connections and wipes what can be wiped; twice is harmless."""
        ...


class LocalSigningKey:
    """A `SigningKey` whose private half is in this process."""

    __slots__ = ("_private_key", "_sign", "algorithm", "key_id", "public_key")

    remote: Final = False

    def __init__(self, key_id: str, private_key: PrivateKey) -> None:
        self.key_id: Final[str] = key_id
        self.public_key: Final[PublicKey] = private_key.public_key()
        self.algorithm: Final[KeyAlgorithm] = algorithm_of(self.public_key)
        self._private_key = private_key
        # Decided once: asking what kind of key it is costs a tenth of a signature.
        self._sign: Final = _signer(private_key, self.algorithm)

    def sign(self, message: bytes) -> bytes:
        """See `SigningKey.sign`."""
        return self._sign(message)

    def sign_many(self, messages: Sequence[bytes]) -> list[bytes]:
        """See `SigningKey.sign_many`."""
        return [self.sign(message) for message in messages]

    def as_private_key(self) -> CertificateIssuerPrivateKeyTypes:
        """See `SigningKey.as_private_key`."""
        return self._private_key

    def __repr__(self) -> str:
        return f"LocalSigningKey({self.key_id!r}, {self.algorithm.value})"


def _signer(private_key: PrivateKey, algorithm: KeyAlgorithm) -> Callable[[bytes], bytes]:
    if isinstance(private_key, ec.EllipticCurvePrivateKey):
        scheme = _ECDSA_SHA256 if algorithm is KeyAlgorithm.EC_P256 else _ECDSA_SHA384
        sign_ec = private_key.sign
        return lambda message: sign_ec(message, scheme)
    if isinstance(private_key, rsa.RSAPrivateKey):
        sign_rsa = private_key.sign
        return lambda message: sign_rsa(message, _PKCS1V15, _SHA256)
    return private_key.sign


def generate_private_key(algorithm: KeyAlgorithm) -> PrivateKey:
    """A fresh private key from the operating system's random source."""
    if algorithm is KeyAlgorithm.EC_P256:
        return ec.generate_private_key(ec.SECP256R1())
    if algorithm is KeyAlgorithm.EC_P384:
        return ec.generate_private_key(ec.SECP384R1())
    if algorithm is KeyAlgorithm.ED25519:
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, _RSA_SIZES[algorithm])


def algorithm_of(public_key: object) -> KeyAlgorithm:
    """The algorithm of a public key that is strong enough to be used at all.

    Accepts a `cryptography` public key: EC on P-256 or P-384, Ed25519, and RSA of exactly 2048,
    3072 or 4096 bits with an odd exponent of at least 65537 (other sizes buy nothing and are a
    cheap way to make verifiers slow).

    Raises:
        KeyTooWeak: anything else.
    """
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        if public_key.curve.name == "secp256r1":
            return KeyAlgorithm.EC_P256
        if public_key.curve.name == "secp384r1":
            return KeyAlgorithm.EC_P384
        raise KeyTooWeak("an EC key must be on the curve P-256 or P-384", hint=_HINT)
    if isinstance(public_key, ed25519.Ed25519PublicKey):
        return KeyAlgorithm.ED25519
    if isinstance(public_key, rsa.RSAPublicKey):
        algorithm = _RSA_BY_SIZE.get(public_key.key_size)
        if algorithm is None:
            raise KeyTooWeak("an RSA key must have 2048, 3072 or 4096 bits", hint=_HINT)
        exponent = public_key.public_numbers().e
        if not (_MIN_RSA_EXPONENT <= exponent < _MAX_RSA_EXPONENT and exponent % 2 == 1):
            raise KeyTooWeak(
                "the public exponent of an RSA key must be odd and at least 65537", hint=_HINT
            )
        return algorithm
    raise KeyTooWeak("only EC, RSA and Ed25519 keys can be used", hint=_HINT)


def signature_hash(algorithm: KeyAlgorithm) -> hashes.SHA256 | hashes.SHA384 | None:
    """The hash that goes with a signing key of that kind; None for Ed25519, which has its own."""
    if algorithm is KeyAlgorithm.ED25519:
        return None
    return _SHA384 if algorithm is KeyAlgorithm.EC_P384 else _SHA256


def verify_signature(public_key: PublicKey, signature: bytes, message: bytes) -> None:
    """Checks a signature in the encoding `SigningKey.sign` answers with.

    Raises:
        cryptography.exceptions.InvalidSignature: it does not verify.
        KeyTooWeak: the key itself is not acceptable.
    """
    algorithm = algorithm_of(public_key)
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        public_key.verify(
            signature,
            message,
            _ECDSA_SHA256 if algorithm is KeyAlgorithm.EC_P256 else _ECDSA_SHA384,
        )
    elif isinstance(public_key, rsa.RSAPublicKey):
        public_key.verify(signature, message, _PKCS1V15, _SHA256)
    else:
        public_key.verify(signature, message)


def spki_der(public_key: PublicKeyTypes) -> bytes:
    """The DER of the key's SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7)."""
    return public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_fingerprint(public_key: PublicKeyTypes) -> str:
    """SHA-256 of `spki_der`, as 64 lower-case hex digits."""
    return hashlib.sha256(spki_der(public_key)).hexdigest()
