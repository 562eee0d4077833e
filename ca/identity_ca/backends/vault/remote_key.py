"""A Transit key as a `cryptography` private key, for its CSR, CRL and certificate builders.

- Subclasses of the abstract private keys whose `sign` asks the server; every signature is checked
  against the pinned public key before it is returned.
- The private half is not here: asking for it raises `TypeError`.
- Digests are made here; the server sees a digest, never the message (Ed25519 excepted, whose
  signature is over the message).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Self

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric import utils as asym_utils

from identity_ca.errors import BackendMisconfigured

__all__ = ["RemoteEcKey", "RemoteEd25519Key", "RemoteRsaKey", "digest_of"]

Octets = bytes | bytearray | memoryview
DigestSigner = Callable[[bytes, hashes.HashAlgorithm], bytes]


def digest_of(message: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    """The message's digest."""
    digest = hashes.Hash(algorithm)
    digest.update(message)
    return digest.finalize()


class RemoteEcKey(ec.EllipticCurvePrivateKey):
    """An EC key held by the server.

    Args:
        public_key: of the pinned version.
        sign_digest: asks the server, checks, returns ECDSA as DER.
    """

    def __init__(self, public_key: ec.EllipticCurvePublicKey, sign_digest: DigestSigner) -> None:
        self._public_key = public_key
        self._sign_digest = sign_digest

    def sign(self, data: Octets, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        algorithm = getattr(signature_algorithm, "algorithm", None)
        return _signed(self._sign_digest, data, algorithm)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public_key.curve

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        _not_here()

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        _not_here()

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        _not_here()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[object, object]) -> Self:
        return self


class RemoteRsaKey(rsa.RSAPrivateKey):
    """An RSA key held by the server; PKCS #1 v1.5 signatures only."""

    def __init__(self, public_key: rsa.RSAPublicKey, sign_digest: DigestSigner) -> None:
        self._public_key = public_key
        self._sign_digest = sign_digest

    def sign(
        self,
        data: Octets,
        padding: padding.AsymmetricPadding,
        algorithm: asym_utils.Prehashed | hashes.HashAlgorithm | asym_utils.NoDigestInfo,
    ) -> bytes:
        if padding.name != "EMSA-PKCS1-v1_5":
            raise BackendMisconfigured("remote RSA keys sign with PKCS #1 v1.5 only")
        return _signed(self._sign_digest, data, algorithm)

    def public_key(self) -> rsa.RSAPublicKey:
        return self._public_key

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def decrypt(self, ciphertext: bytes, padding: padding.AsymmetricPadding) -> bytes:
        _not_here()

    def private_numbers(self) -> rsa.RSAPrivateNumbers:
        _not_here()

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        _not_here()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[object, object]) -> Self:
        return self


class RemoteEd25519Key(ed25519.Ed25519PrivateKey):
    """An Ed25519 key held by the server."""

    def __init__(
        self, public_key: ed25519.Ed25519PublicKey, sign_message: Callable[[bytes], bytes]
    ) -> None:
        self._public_key = public_key
        self._sign_message = sign_message

    def sign(self, data: Octets) -> bytes:
        return self._sign_message(bytes(data))

    def public_key(self) -> ed25519.Ed25519PublicKey:
        return self._public_key

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        _not_here()

    def private_bytes_raw(self) -> bytes:
        _not_here()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[object, object]) -> Self:
        return self


def _signed(sign_digest: DigestSigner, data: Octets, algorithm: object) -> bytes:
    if isinstance(algorithm, asym_utils.Prehashed):
        hashed: hashes.HashAlgorithm = algorithm._algorithm  # noqa: SLF001  (no public accessor)
        return sign_digest(bytes(data), hashed)
    if isinstance(algorithm, hashes.HashAlgorithm):
        return sign_digest(digest_of(bytes(data), algorithm), algorithm)
    raise BackendMisconfigured("a remote key needs to know the hash to sign with")


def _not_here() -> NoReturn:
    raise TypeError("the private half of this key is in OpenBao and cannot be used that way")
