"""The broker's messages, turned into values; whatever cannot be used is a ProtocolViolation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from spiffe import JwtBundle, SpiffeId, TrustDomain

from identity_api.broker.v1 import types_pb2
from identity_client.credential import BundleSnapshot
from identity_client.errors import ProtocolViolation, SettingsInvalid
from identity_client.naming import parse_spiffe_id

__all__ = [
    "AuthorizedEntry",
    "bundle_from_wire",
    "entries_from_wire",
    "time_from_wire",
]

_VerifyKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class AuthorizedEntry:
    """An identity this machine may ask for."""

    id: str
    spiffe_id: SpiffeId
    hint: str


def bundle_from_wire(message: types_pb2.TrustBundle, trust_domain: TrustDomain) -> BundleSnapshot:
    """A trust bundle, which must be `trust_domain`'s and hold at least one CA certificate.

    Raises:
        ProtocolViolation.
    """
    if message.trust_domain != trust_domain.name:
        raise ProtocolViolation("the broker sent the bundle of another trust domain")
    try:
        authorities = tuple(x509.load_der_x509_certificate(c) for c in message.x509_authorities)
        jwt_keys = {key.key_id: _verify_key(key.public_key) for key in message.jwt_keys}
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as exc:
        raise ProtocolViolation("the broker's trust bundle cannot be read") from exc
    if not authorities:
        raise ProtocolViolation("the broker's trust bundle holds no CA certificate")
    return BundleSnapshot(
        trust_domain=trust_domain,
        x509_authorities=authorities,
        jwt_bundle=JwtBundle(trust_domain, {k: v for k, v in jwt_keys.items() if v is not None}),
        sequence=message.sequence,
    )


def entries_from_wire(
    messages: Iterable[types_pb2.RegistrationEntry], *, now: datetime
) -> tuple[AuthorizedEntry, ...]:
    """The entries that can be issued now, in the broker's order.

    Raises:
        ProtocolViolation.
    """
    usable = (m for m in messages if not m.disabled and not 0 < m.expires_at <= now.timestamp())
    try:
        return tuple(AuthorizedEntry(m.id, parse_spiffe_id(m.spiffe_id), m.hint) for m in usable)
    except SettingsInvalid as exc:
        raise ProtocolViolation("the broker sent an entry without a SPIFFE ID") from exc


def time_from_wire(seconds: int) -> datetime:
    """Seconds since the epoch as an aware time.

    Raises:
        ProtocolViolation: beyond what a calendar holds.
    """
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError) as exc:
        raise ProtocolViolation("the broker sent a time that is out of range") from exc


def _verify_key(der: bytes) -> _VerifyKey | None:
    key = serialization.load_der_public_key(der)
    # A kind of key this SDK does not know verifies nothing, and must not hide those it does know.
    return key if isinstance(key, _VerifyKey) else None
