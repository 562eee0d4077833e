"""What a Workload API sent, turned into values; a message that lacks anything is discarded whole.

- A mandatory field that is empty makes the whole message unusable (Workload API, section 4.5):
  the caller keeps what it had.
- The bundle of one foreign trust domain that cannot be read is left out, and named in the log: it
  must not keep the others from us.
- X.509 bundles speak for X.509-SVIDs and JWT bundles for JWT-SVIDs: of a key set, only what is
  meant for JWT-SVIDs is taken (JWT-SVID, section 6.2).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from spiffe import JwtBundle, JwtSvid, SpiffeId, TrustDomain
from spiffe.errors import PySpiffeError

from identity_client._wire.workload import (
    X509SVID,
    JWTBundlesResponse,
    JWTSVIDResponse,
    X509SVIDResponse,
)
from identity_client.errors import ProtocolViolation, SettingsInvalid
from identity_client.jwt_cache import CachedToken
from identity_client.naming import parse_spiffe_id, parse_trust_domain

__all__ = [
    "Authorities",
    "OfferedState",
    "OfferedSvid",
    "authorities_from_der",
    "jwt_bundles_from_wire",
    "split_der",
    "token_from_wire",
    "x509_state_from_wire",
]

_logger = logging.getLogger(__name__)

Authorities = tuple[x509.Certificate, ...]
_SEQUENCE = 0x30
_CACHED_BUNDLES = 64
# A standard key set (Workload API, section 6.2.2): "sig" is RFC 7517's word, SPIRE leaves it out,
# and a SPIFFE bundle has its own.
_JWT_USES = (None, "", "sig", "jwt-svid")
_JWT_KEY_TYPES = ("RSA", "EC")


@dataclass(frozen=True, slots=True)
class OfferedSvid:
    """One X.509-SVID as it was offered; its chain and key are not checked yet.

    Attributes:
        chain: DER certificates, leaf first.
        key: private key, PKCS #8, DER; secret.
        bundle: DER certificates of its trust domain's authorities, one after the other.
    """

    spiffe_id: SpiffeId
    hint: str
    chain: tuple[bytes, ...] = field(repr=False)
    key: bytes = field(repr=False)
    bundle: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class OfferedState:
    """One message of the stream: the full state, in place of any before."""

    svids: tuple[OfferedSvid, ...]
    federated: Mapping[TrustDomain, Authorities]
    crls: tuple[bytes, ...] = field(repr=False)


def x509_state_from_wire(message: X509SVIDResponse) -> OfferedState:
    """The SVIDs in the order sent, without any whose hint was there before (section 5.2.1).

    Raises:
        ProtocolViolation: there is none, or one lacks a mandatory field.
    """
    if not message.svids:
        raise ProtocolViolation("the Workload API sent a message without an SVID")
    svids, hints = [], set()
    for offered in message.svids:
        svid = _svid(offered)
        if svid.hint and svid.hint in hints:
            continue
        hints.add(svid.hint)
        svids.append(svid)
    federated: dict[TrustDomain, Authorities] = {}
    for name, der in message.federated_bundles.items():
        try:
            federated[parse_trust_domain(name)] = authorities_from_der(der)
        except (ProtocolViolation, SettingsInvalid) as exc:
            _logger.warning("the X.509 bundle of %.100r is left out: %s", name, exc)
    return OfferedState(tuple(svids), MappingProxyType(federated), tuple(message.crl))


def jwt_bundles_from_wire(message: JWTBundlesResponse) -> Mapping[TrustDomain, JwtBundle]:
    """The JWT bundles, by trust domain.

    Raises:
        ProtocolViolation: there is none.
    """
    if not message.bundles:
        raise ProtocolViolation("the Workload API sent a message without a JWT bundle")
    bundles: dict[TrustDomain, JwtBundle] = {}
    for name, document in message.bundles.items():
        try:
            trust_domain = parse_trust_domain(name)
            bundles[trust_domain] = _jwt_bundle(trust_domain, document)
        except (ProtocolViolation, SettingsInvalid) as exc:
            _logger.warning("the JWT bundle of %.100r is left out: %s", name, exc)
    return MappingProxyType(bundles)


def token_from_wire(
    message: JWTSVIDResponse, *, spiffe_id: str, audiences: Sequence[str], received: datetime
) -> CachedToken:
    """The first JWT-SVID for `spiffe_id` in an answer, which must be for `audiences`.

    Raises:
        ProtocolViolation: there is none, or it cannot be read.
    """
    if not message.svids or not all(one.spiffe_id and one.svid for one in message.svids):
        raise ProtocolViolation("the Workload API's answer lacks a JWT-SVID")
    token = next((one.svid for one in message.svids if one.spiffe_id == spiffe_id), None)
    if token is None:
        raise ProtocolViolation("the Workload API sent a JWT-SVID of somebody else")
    try:
        svid = JwtSvid.parse_insecure(token, set(audiences))
    except PySpiffeError:
        # "from None": the parser's message could quote the token.
        raise ProtocolViolation(
            "the Workload API sent a JWT-SVID that cannot be read or is for another audience"
        ) from None
    if str(svid.spiffe_id) != spiffe_id:
        raise ProtocolViolation("the Workload API sent a JWT-SVID of somebody else")
    return CachedToken(
        svid=svid,
        # py-spiffe keeps the claims but does not publish them.
        jti=str(svid._claims.get("jti", "")),  # noqa: SLF001
        received=received,
        expires_at=datetime.fromtimestamp(svid.expiry, UTC),
    )


@lru_cache(maxsize=_CACHED_BUNDLES)
def authorities_from_der(der: bytes) -> Authorities:
    """The CA certificates of a bundle: DER, one after the other.

    Raises:
        ProtocolViolation: there is none, or one cannot be read.
    """
    try:
        found = tuple(x509.load_der_x509_certificate(one) for one in split_der(der))
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as exc:
        raise ProtocolViolation("an X.509 bundle cannot be read") from exc
    if not found:
        raise ProtocolViolation("an X.509 bundle holds no certificate")
    return found


def split_der(data: bytes) -> tuple[bytes, ...]:
    """The ASN.1 sequences that stand in `data`, one after the other (X.690, section 8.1.3).

    Raises:
        ProtocolViolation: something else stands there, or the last one is cut off.
    """
    found, start = [], 0
    while start < len(data):
        end = _element_end(data, start)
        if data[start] != _SEQUENCE or end > len(data):
            raise ProtocolViolation("certificates in DER cannot be told apart")
        found.append(data[start:end])
        start = end
    return tuple(found)


def _element_end(data: bytes, start: int) -> int:
    first = data[start + 1] if start + 1 < len(data) else 0x80
    if first < 0x80:
        return start + 2 + first
    octets = first & 0x7F
    length = data[start + 2 : start + 2 + octets]
    if not 1 <= octets <= 4 or len(length) < octets:
        return len(data) + 1
    return start + 2 + octets + int.from_bytes(length)


def _svid(offered: X509SVID) -> OfferedSvid:
    if not (offered.spiffe_id and offered.x509_svid and offered.x509_svid_key and offered.bundle):
        raise ProtocolViolation("the Workload API sent an X.509-SVID with a field left out")
    try:
        spiffe_id = parse_spiffe_id(offered.spiffe_id)
    except SettingsInvalid as exc:
        raise ProtocolViolation("the Workload API sent an SVID without a SPIFFE ID") from exc
    return OfferedSvid(
        spiffe_id=spiffe_id,
        hint=offered.hint,
        chain=split_der(offered.x509_svid),
        key=offered.x509_svid_key,
        bundle=offered.bundle,
    )


def _jwt_bundle(trust_domain: TrustDomain, document: bytes) -> JwtBundle:
    try:
        keys = json.loads(document)["keys"]
        wanted = [
            key
            for key in keys
            if key.get("use") in _JWT_USES and key.get("kty") in _JWT_KEY_TYPES and key.get("kid")
        ]
        return JwtBundle.parse(trust_domain, json.dumps({"keys": wanted}).encode())
    except (ValueError, KeyError, TypeError, AttributeError, PySpiffeError) as exc:
        raise ProtocolViolation("a JWT bundle cannot be read") from exc
