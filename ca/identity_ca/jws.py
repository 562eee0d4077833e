"""How a JWS is signed and verified: the nine algorithms of JWT-SVID section 2.1 and no other.

- An algorithm knows which keys it fits; a key of another kind or curve verifies nothing with it.
- A key of ours signs with one algorithm, the one its kind decides.
- A signature has one spelling: ECDSA as r and s, each of the curve's full length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from identity_ca.errors import ProfileViolation
from identity_ca.jose import JwtPublicKey
from identity_ca.keys import KeyAlgorithm

__all__ = ["JWS_ALGORITHMS", "JwsAlgorithm", "jws_signature", "signing_algorithm"]

_SIGNING: Final = {
    KeyAlgorithm.EC_P256: "ES256",
    KeyAlgorithm.EC_P384: "ES384",
    KeyAlgorithm.RSA_2048: "RS256",
    KeyAlgorithm.RSA_3072: "RS256",
    KeyAlgorithm.RSA_4096: "RS256",
}
_ES_OCTETS: Final = {KeyAlgorithm.EC_P256: 32, KeyAlgorithm.EC_P384: 48}

_Check = Callable[[JwtPublicKey, bytes, bytes], None]


@dataclass(frozen=True, slots=True)
class JwsAlgorithm:
    """One value of `alg`: which keys it fits and how they verify (RFC 7518 section 3)."""

    name: str
    check: _Check

    def verifies(self, public_key: JwtPublicKey, signature: bytes, message: bytes) -> bool:
        """Whether the key fits the algorithm and the signature holds."""
        try:
            self.check(public_key, signature, message)
        except InvalidSignature:
            return False
        return True


def _rs(hash_: hashes.HashAlgorithm) -> _Check:
    def check(public_key: JwtPublicKey, signature: bytes, message: bytes) -> None:
        if not isinstance(public_key, rsa.RSAPublicKey):
            raise InvalidSignature
        public_key.verify(signature, message, padding.PKCS1v15(), hash_)

    return check


def _ps(hash_: hashes.HashAlgorithm) -> _Check:
    # RFC 7518 section 3.5: MGF1 with the same hash, a salt as long as the hash.
    scheme = padding.PSS(mgf=padding.MGF1(hash_), salt_length=hash_.digest_size)

    def check(public_key: JwtPublicKey, signature: bytes, message: bytes) -> None:
        if not isinstance(public_key, rsa.RSAPublicKey):
            raise InvalidSignature
        public_key.verify(signature, message, scheme, hash_)

    return check


def _es(hash_: hashes.HashAlgorithm, curve: type[ec.EllipticCurve]) -> _Check:
    octets = (curve().key_size + 7) // 8

    def check(public_key: JwtPublicKey, signature: bytes, message: bytes) -> None:
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        if not isinstance(public_key.curve, curve) or len(signature) != 2 * octets:
            raise InvalidSignature
        r = int.from_bytes(signature[:octets], "big")
        s = int.from_bytes(signature[octets:], "big")
        public_key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hash_))

    return check


def _table(algorithms: Iterable[JwsAlgorithm]) -> Mapping[str, JwsAlgorithm]:
    return MappingProxyType({algorithm.name: algorithm for algorithm in algorithms})


JWS_ALGORITHMS: Final = _table(
    (
        JwsAlgorithm("RS256", _rs(hashes.SHA256())),
        JwsAlgorithm("RS384", _rs(hashes.SHA384())),
        JwsAlgorithm("RS512", _rs(hashes.SHA512())),
        JwsAlgorithm("ES256", _es(hashes.SHA256(), ec.SECP256R1)),
        JwsAlgorithm("ES384", _es(hashes.SHA384(), ec.SECP384R1)),
        JwsAlgorithm("ES512", _es(hashes.SHA512(), ec.SECP521R1)),
        JwsAlgorithm("PS256", _ps(hashes.SHA256())),
        JwsAlgorithm("PS384", _ps(hashes.SHA384())),
        JwsAlgorithm("PS512", _ps(hashes.SHA512())),
    )
)
"""The nine algorithms of JWT-SVID section 2.1, by name; no other exists."""


def signing_algorithm(key: KeyAlgorithm) -> str:
    """The `alg` that a key of this kind signs with.

    Raises:
        ProfileViolation: an Ed25519 key, for which JWT-SVID has no algorithm (J-3).
    """
    algorithm = _SIGNING.get(key)
    if algorithm is None:
        raise ProfileViolation(
            f"a key of kind {key.value} cannot sign for JOSE here (J-3)",
            hint="use an EC P-256 key",
        )
    return algorithm


def jws_signature(signature: bytes, key: KeyAlgorithm) -> bytes:
    """A `SigningKey`'s signature as JOSE wants it: ECDSA as r and s (RFC 7518 section 3.4)."""
    octets = _ES_OCTETS.get(key)
    if octets is None:
        return signature
    r, s = decode_dss_signature(signature)
    return r.to_bytes(octets, "big") + s.to_bytes(octets, "big")
