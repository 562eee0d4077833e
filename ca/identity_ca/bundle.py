"""The keys a trust domain is verified with, and the formats they travel in.

- X.509 authorities verify X.509-SVIDs only, JWT keys JWT-SVIDs only; the two never mix (J-12).
- Written: SPIFFE JSON has both; JWKS has the JWT keys only, as any JOSE consumer reads them; PEM
  has the X.509 authorities only. Equal bundles are equal byte for byte.
- Read: what is unknown is skipped (key type, use, parameters), what is known and broken refuses the
  whole document, so that a damaged or tampered bundle never silently loses one of its keys.
- A bundle without a usable key is a bundle all the same: every SVID of its domain is then
  invalid (TB-5).
- Bundles of different trust domains are never merged; the domain is the caller's knowledge, never
  the document's.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.utils import CryptographyDeprecationWarning

from identity_ca.errors import BundleRejected, SpiffeIdError
from identity_ca.jose import (
    JwkPublicKey,
    JwtPublicKey,
    MalformedJose,
    jwk_of,
    parse_json_object,
    public_key_of,
    unsupported_reason,
)
from identity_ca.keys import spki_der
from identity_ca.spiffe_id import TrustDomain

__all__ = [
    "DEFAULT_REFRESH_HINT",
    "MAX_BUNDLE_BYTES",
    "JwtKey",
    "TrustBundle",
    "parse_bundle_map",
]

MAX_BUNDLE_BYTES: Final = 4 * 1024 * 1024
"""Longest document read."""

DEFAULT_REFRESH_HINT: Final = timedelta(minutes=5)
"""Where a bundle gives none (SPIFFE Trust Domain and Bundle, "SPIFFE Bundle Refresh Hint")."""

_MAX_SEQUENCE: Final = (1 << 64) - 1
_MAX_REFRESH_HINT: Final = timedelta(days=3650)
_MAX_KEY_ID: Final = 1024
_X509_USE: Final = "x509-svid"
_JWT_USE: Final = "jwt-svid"
_JWKS_USE: Final = "sig"
_EC_JWS_ALGORITHM: Final = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}


@dataclass(frozen=True, slots=True)
class JwtKey:
    """A public key that JWT-SVIDs are verified with.

    Attributes:
        key_id: its `kid`, unique in the bundle.
        public_key_der: SubjectPublicKeyInfo, DER.
        expires_at: when it stops counting, aware UTC; None where the bundle did not say.

    Raises:
        BundleRejected: the key ID is empty or longer than 1,024 characters.
    """

    key_id: str
    public_key_der: bytes
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.key_id) <= _MAX_KEY_ID:
            raise BundleRejected(f"a JWT key needs a key ID of 1 to {_MAX_KEY_ID} characters")

    @property
    def public_key(self) -> JwtPublicKey:
        """The key itself.

        Raises:
            BundleRejected: the DER is not a public key that could verify a JWT-SVID.
        """
        return _jwt_public_key(self.public_key_der)


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """One generation of a trust domain's keys.

    Attributes:
        trust_domain: whose they are.
        x509_authorities: CA certificates, DER.
        jwt_keys: in the order of publication.
        sequence: grows with every change of the content; 0 where the bundle gave none.
        refresh_hint: how often to ask for the next generation, in whole seconds.

    Raises:
        BundleRejected: a key ID appears twice, or a number is out of range.
    """

    trust_domain: TrustDomain
    x509_authorities: tuple[bytes, ...] = ()
    jwt_keys: tuple[JwtKey, ...] = ()
    sequence: int = 0
    refresh_hint: timedelta = field(default=DEFAULT_REFRESH_HINT)

    def __post_init__(self) -> None:
        if not 0 <= self.sequence <= _MAX_SEQUENCE:
            raise BundleRejected("the sequence number is not an unsigned 64-bit integer")
        if not timedelta(0) <= self.refresh_hint <= _MAX_REFRESH_HINT:
            raise BundleRejected("the refresh hint is not between zero and ten years")
        if len({key.key_id for key in self.jwt_keys}) != len(self.jwt_keys):
            raise BundleRejected("two JWT keys share one key ID")

    def jwt_key(self, key_id: str) -> JwtKey | None:
        """The JWT key of that ID, compared exactly."""
        return next((key for key in self.jwt_keys if key.key_id == key_id), None)

    def to_spiffe_json(self) -> bytes:
        """The SPIFFE bundle format: a JWK set with two parameters more (X-14, J-11, TB-2 to TB-6).

        Raises:
            BundleRejected: an authority is no CA certificate, or its key has no JWK.
        """
        document = {
            "keys": [
                *(_x509_jwk(der, place) for place, der in enumerate(self.x509_authorities)),
                *({"use": _JWT_USE, "kid": k.key_id, **_jwk(k.public_key)} for k in self.jwt_keys),
            ],
            "spiffe_sequence": self.sequence,
            "spiffe_refresh_hint": int(self.refresh_hint.total_seconds()),
        }
        return _json(document)

    def to_jwks(self) -> bytes:
        """A plain JWK set (RFC 7517) of the JWT keys.

        For consumers that know nothing of SPIFFE uses: the Workload API's JWT bundles ("no keys of
        other uses") and OpenID Connect (`use` is `sig`, and `alg` given where the key decides it).

        Raises:
            BundleRejected: a key cannot be read.
        """
        return _json({"keys": [_plain_jwk(key) for key in self.jwt_keys]})

    def to_pem(self) -> bytes:
        """The X.509 authorities as concatenated PEM; empty where there is none.

        Raises:
            BundleRejected: an authority is no CA certificate.
        """
        return b"".join(
            _ca_certificate(der, place).public_bytes(Encoding.PEM)
            for place, der in enumerate(self.x509_authorities)
        )

    @classmethod
    def from_spiffe_json(cls, trust_domain: TrustDomain, document: bytes) -> TrustBundle:
        """Read the SPIFFE bundle format (X-15, J-12, TB-1 to TB-6).

        Raises:
            BundleRejected: over 4 MiB, not strict JSON, no `keys`, or a key of a known type and use
                that is broken.
        """
        return _bundle_of(trust_domain, _parse(document))

    @classmethod
    def from_jwks(cls, trust_domain: TrustDomain, document: bytes) -> TrustBundle:
        """Read a plain JWK set: every signature key in it becomes a JWT key.

        A `use` of `sig` or `jwt-svid`, or none, counts; keys of any other use are skipped.

        Raises:
            BundleRejected: as for `from_spiffe_json`; also a signature key without `kid`.
        """
        keys: list[JwtKey] = []
        for place, jwk in _jwks(_parse(document)):
            if jwk.get("use") in (None, _JWKS_USE, _JWT_USE):
                keys.extend(_jwt_keys(jwk, place))
        return cls(trust_domain=trust_domain, jwt_keys=tuple(keys))

    @classmethod
    def from_pem(cls, trust_domain: TrustDomain, document: bytes) -> TrustBundle:
        """Read CA certificates in PEM; one that appears twice counts once.

        Raises:
            BundleRejected: over 4 MiB, no certificate, a private key among them, or a certificate
                that is not a CA's.
        """
        _check_size(document)
        if b"PRIVATE KEY-----" in document:
            raise BundleRejected(
                "the file holds a private key where only certificates belong",
                hint="take the key out, and treat it as disclosed if the file was shared",
            )
        try:
            certificates = x509.load_pem_x509_certificates(document)
        except _UNREADABLE as exc:
            raise BundleRejected("there is no readable PEM certificate") from exc
        ders = dict.fromkeys(c.public_bytes(Encoding.DER) for c in certificates)
        for place, der in enumerate(ders):
            _ca_certificate(der, place)
        return cls(trust_domain=trust_domain, x509_authorities=tuple(ders))


def parse_bundle_map(document: bytes) -> dict[TrustDomain, TrustBundle]:
    """Read a SPIFFE bundle map (TB-7, TB-8): `{"trust_domains": {"example.org": <bundle>, …}}`.

    A refresh hint inside the map says nothing about how often to read the map, so every bundle
    comes back with the default one.

    Raises:
        BundleRejected: as for `from_spiffe_json`; also no `trust_domains`, a name that is no trust
            domain or appears twice, and one bundle that is refused refuses the map.
    """
    trust_domains = _parse(document).get("trust_domains")
    if not isinstance(trust_domains, dict):
        raise BundleRejected('the bundle map has no "trust_domains" object')
    bundles = {}
    for name, members in trust_domains.items():
        try:
            trust_domain = TrustDomain(name)
        except SpiffeIdError as exc:
            raise BundleRejected(f"the bundle map names no trust domain: {exc.message}") from exc
        if not isinstance(members, dict):
            raise BundleRejected(f"the bundle of {trust_domain} is not a JSON object")
        without_hint = {k: v for k, v in members.items() if k != "spiffe_refresh_hint"}
        bundles[trust_domain] = _bundle_of(trust_domain, without_hint)
    return bundles


# --- reading --------------------------------------------------------------------------------


def _check_size(document: bytes) -> None:
    if len(document) > MAX_BUNDLE_BYTES:
        raise BundleRejected(f"the bundle is longer than {MAX_BUNDLE_BYTES} bytes")


def _parse(document: bytes) -> dict[str, Any]:
    _check_size(document)
    try:
        return parse_json_object(document)
    except MalformedJose as exc:
        raise BundleRejected(f"the bundle cannot be read: {exc}") from exc


def _bundle_of(trust_domain: TrustDomain, members: Mapping[str, Any]) -> TrustBundle:
    x509_authorities: dict[bytes, None] = {}
    jwt_keys: list[JwtKey] = []
    for place, jwk in _jwks(members):
        # TB-6: compared exactly; a missing or unknown use leaves the key out.
        use = jwk.get("use")
        if use == _X509_USE:
            x509_authorities |= dict.fromkeys(_x509_authorities(jwk, place))
        elif use == _JWT_USE:
            jwt_keys.extend(_jwt_keys(jwk, place))
    return TrustBundle(
        trust_domain=trust_domain,
        x509_authorities=tuple(x509_authorities),
        jwt_keys=tuple(jwt_keys),
        sequence=_integer(members, "spiffe_sequence", default=0),
        refresh_hint=_refresh_hint(members),
    )


def _jwks(members: Mapping[str, Any]) -> Iterable[tuple[int, dict[str, Any]]]:
    keys = members.get("keys")
    if not isinstance(keys, list):
        raise BundleRejected('the bundle has no "keys" array')
    for place, jwk in enumerate(keys):
        if not isinstance(jwk, dict):
            raise BundleRejected(f"key {place} of the bundle is not a JSON object")
        yield place, jwk


def _x509_authorities(jwk: Mapping[str, Any], place: int) -> Iterable[bytes]:
    """None or one (X-15): without `x5c` the key is left out, and only its first value counts."""
    public_key = _public_key(jwk, place)
    chain = jwk.get("x5c")
    if public_key is None or chain is None or chain == []:
        return
    if not isinstance(chain, list) or not isinstance(chain[0], str):
        raise BundleRejected(f'key {place} of the bundle: "x5c" is not an array of strings')
    try:
        # RFC 7517 section 4.7: standard base64, unlike everything else in a JWK.
        der = binascii.a2b_base64(chain[0].encode("ascii"), strict_mode=True)
    except ValueError as exc:
        raise BundleRejected(f'key {place} of the bundle: "x5c" is not base64') from exc
    # The library's strict mode still takes padding where none belongs, and stray last bits.
    if b64encode(der).decode("ascii") != chain[0]:
        raise BundleRejected(f'key {place} of the bundle: "x5c" is not base64')
    certificate = _ca_certificate(der, place)
    if spki_der(_certificate_key(certificate, place)) != spki_der(public_key):
        raise BundleRejected(f"key {place} of the bundle: the certificate is for another key")
    yield der


def _jwt_keys(jwk: Mapping[str, Any], place: int) -> Iterable[JwtKey]:
    """None or one: a key that could never verify a JWT-SVID is left out."""
    public_key = _public_key(jwk, place)
    if public_key is None or unsupported_reason(public_key) is not None:
        return
    key_id = jwk.get("kid")
    if not isinstance(key_id, str):
        raise BundleRejected(f'key {place} of the bundle: "kid" is missing or not a string')
    yield JwtKey(key_id=key_id, public_key_der=spki_der(public_key))


def _public_key(jwk: Mapping[str, Any], place: int) -> JwkPublicKey | None:
    try:
        return public_key_of(jwk)
    except MalformedJose as exc:
        raise BundleRejected(f"key {place} of the bundle: {exc}") from exc


def _refresh_hint(members: Mapping[str, Any]) -> timedelta:
    seconds = _integer(
        members, "spiffe_refresh_hint", default=int(DEFAULT_REFRESH_HINT.total_seconds())
    )
    if seconds > _MAX_REFRESH_HINT.total_seconds():
        raise BundleRejected("the refresh hint is not between zero and ten years")
    return timedelta(seconds=seconds)


def _integer(members: Mapping[str, Any], name: str, *, default: int) -> int:
    value = members.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_SEQUENCE:
        raise BundleRejected(f'"{name}" is not an unsigned 64-bit integer')
    return value


# --- keys and certificates ------------------------------------------------------------------

# All that `cryptography` raises for bytes that are no certificate or key; most are no ValueError.
# The warning is about serial numbers below 1, and an exception where warnings are errors.
_UNREADABLE: Final = (
    ValueError,
    UnsupportedAlgorithm,
    CryptographyDeprecationWarning,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@lru_cache(maxsize=512)
def _jwt_public_key(der: bytes) -> JwtPublicKey:
    try:
        public_key = load_der_public_key(der)
    except _UNREADABLE as exc:
        raise BundleRejected("a JWT key of the bundle cannot be read") from exc
    reason = unsupported_reason(public_key)
    if reason is not None or not isinstance(public_key, JwtPublicKey):
        raise BundleRejected(f"a JWT key of the bundle is {reason}")
    return public_key


def _ca_certificate(der: bytes, place: int) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound as exc:
        raise BundleRejected(f"X.509 authority {place} is not a CA certificate") from exc
    except _UNREADABLE as exc:
        raise BundleRejected(f"X.509 authority {place} is not a readable certificate") from exc
    if not constraints.ca:
        raise BundleRejected(f"X.509 authority {place} is not a CA certificate")
    if certificate.serial_number < 1:
        raise BundleRejected(f"X.509 authority {place} has no positive serial number")
    return certificate


def _certificate_key(certificate: x509.Certificate, place: int) -> PublicKeyTypes:
    try:
        return certificate.public_key()
    except _UNREADABLE as exc:
        raise BundleRejected(f"X.509 authority {place} holds a key that cannot be read") from exc


# --- writing --------------------------------------------------------------------------------


def _x509_jwk(der: bytes, place: int) -> dict[str, Any]:
    """X-14: no `kid`, and exactly one certificate in `x5c`."""
    members = _jwk(_certificate_key(_ca_certificate(der, place), place))
    return {"use": _X509_USE, **members, "x5c": [b64encode(der).decode("ascii")]}


def _plain_jwk(key: JwtKey) -> dict[str, str]:
    members = _jwk(key.public_key)
    algorithm = _EC_JWS_ALGORITHM.get(members.get("crv", ""))
    decided = {"alg": algorithm} if algorithm else {}
    return {"use": _JWKS_USE, "kid": key.key_id, **decided, **members}


def _jwk(public_key: PublicKeyTypes) -> dict[str, str]:
    try:
        return jwk_of(public_key)
    except MalformedJose as exc:
        raise BundleRejected(f"an authority cannot be written as a JWK: {exc}") from exc


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")
