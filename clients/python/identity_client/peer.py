"""Who is at the other end of a TLS connection, read once per certificate.

- Only what the TLS library has verified against the bundle may be given to these functions; they
  read names and dates and check no signature.
- A certificate without exactly one canonical SPIFFE ID, or that could sign, names nobody
  (X509-SVID sections 2, 4 and 5.2).
- Parsed certificates are kept in a bounded cache: on an open connection a check costs a
  dictionary look-up and not an ASN.1 parse.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from spiffe import SpiffeId

from identity_client.errors import PeerExpired, PeerRejected, PeerRevoked, SettingsInvalid
from identity_client.naming import parse_spiffe_id
from identity_client.revocation import DenySet, Issuer
from identity_client.staleness import StalenessPolicy

__all__ = ["Peer", "check_current", "is_refused", "peer_from_der", "peer_from_pem", "serial_text"]

_CACHED = 4096
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A verified peer certificate.

    Attributes:
        spiffe_id: its only URI SAN.
        id: the same as a string; what policies compare.
        trust_domain: its trust domain's name.
        serial: lower-case hexadecimal, as the broker's ledger writes it.
        expires_at: seconds since the epoch.
        issuer: who signed it; None where that is not known.
    """

    spiffe_id: SpiffeId
    id: str
    trust_domain: str = field(repr=False)
    serial: str
    expires_at: float = field(repr=False)
    issuer: Issuer | None = field(default=None, repr=False)


def serial_text(number: int) -> str:
    """A serial number as the ledger writes it: lower-case hexadecimal, whole octets."""
    text = f"{number:x}"
    return text if len(text) % 2 == 0 else f"0{text}"


@lru_cache(maxsize=_CACHED)
def peer_from_pem(pem: bytes) -> Peer:
    """The peer a PEM certificate names.

    Raises:
        PeerRejected: it is not an X.509-SVID.
    """
    try:
        return _read(x509.load_pem_x509_certificate(pem))
    except _UNREADABLE as exc:
        raise PeerRejected("the peer's certificate cannot be read") from exc


@lru_cache(maxsize=_CACHED)
def peer_from_der(der: bytes) -> Peer:
    """The peer a DER certificate names.

    Raises:
        PeerRejected: it is not an X.509-SVID.
    """
    try:
        return _read(x509.load_der_x509_certificate(der))
    except _UNREADABLE as exc:
        raise PeerRejected("the peer's certificate cannot be read") from exc


def check_current(
    peer: Peer,
    denied: DenySet,
    *,
    now: float | None = None,
    staleness: StalenessPolicy | None = None,
) -> None:
    """Refuses a peer whose certificate is revoked or has expired since the handshake.

    Args:
        peer: whose certificate was verified.
        denied: what is revoked.
        now: seconds since the epoch; the clock's when None.
        staleness: what silence about revocations means; the source's policy when None.

    Raises:
        PeerRevoked, PeerExpired: the peer must go.
        PeerRejected: an authority is denied, and nobody can say whether it signed this one.
        RevocationsStale: nobody can say.
    """
    if denied.denies(peer.serial, peer.issuer):
        raise PeerRevoked(f'the certificate of peer "{peer.id}" is revoked')
    if denied.cannot_place(peer.issuer):
        raise PeerRejected(
            f'the certificate of peer "{peer.id}" does not say which authority\'s key signed it, '
            "and one of them is revoked"
        )
    denied.check_fresh(staleness)
    if (time.time() if now is None else now) >= peer.expires_at:
        raise PeerExpired(f'the certificate of peer "{peer.id}" has expired')


def is_refused(peer: Peer, denied: DenySet) -> bool:
    """Whether a peer must go for what is denied."""
    return denied.denies(peer.serial, peer.issuer) or denied.cannot_place(peer.issuer)


def _read(certificate: x509.Certificate) -> Peer:
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound as exc:
        raise PeerRejected("the peer's certificate holds no SPIFFE ID") from exc
    uris = san.value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise PeerRejected("the peer's certificate must hold exactly one URI: its SPIFFE ID")
    try:
        spiffe_id = parse_spiffe_id(uris[0])
    except SettingsInvalid as exc:
        raise PeerRejected("the URI in the peer's certificate is not a SPIFFE ID") from exc
    if certificate.serial_number <= 0:
        # It could not be named in a revocation (RFC 5280, section 4.1.2.2).
        raise PeerRejected("the peer's certificate has no positive serial number")
    if not spiffe_id.path or _may_sign(certificate):
        raise PeerRejected("the peer's certificate is an authority's and names no workload")
    return Peer(
        spiffe_id=spiffe_id,
        id=str(spiffe_id),
        trust_domain=spiffe_id.trust_domain.name,
        serial=serial_text(certificate.serial_number),
        expires_at=certificate.not_valid_after_utc.timestamp(),
        issuer=Issuer.of(certificate),
    )


def _may_sign(certificate: x509.Certificate) -> bool:
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.BasicConstraints) and extension.value.ca:
            return True
        if isinstance(extension.value, x509.KeyUsage) and (
            extension.value.key_cert_sign or extension.value.crl_sign
        ):
            return True
    return False
