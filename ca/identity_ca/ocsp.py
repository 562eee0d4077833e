"""OCSP (RFC 6960): requests read strictly, answers encoded and signed; several of each at once.

- A request is at most 64 KiB and 100 certificates, in DER, with everything in its place. What is
  wrong with it is a `ResponseStatus` to answer with, never an exception.
- A signed request is read like any other: its signature proves nothing that is asked for here.
- A nonce has 1 to 128 octets and comes back as it was sent (RFC 9654).
- An answer holds each CertID byte for byte as it was asked, so that the asker finds it again.
- SHA-1 stands here for names of issuers and keys, not for anything that is signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import OCSPExtensionOID

from identity_ca.der import (
    BIT_STRING,
    GENERALIZED_TIME,
    INTEGER,
    OCTET_STRING,
    OID,
    SEQUENCE,
    DerError,
    Reader,
    element,
    encode_oid,
)
from identity_ca.errors import ProfileViolation
from identity_ca.keys import SigningKey, spki_der
from identity_ca.template import signature_algorithm_der

__all__ = [
    "MAX_REQUESTS",
    "MAX_REQUEST_OCTETS",
    "CertId",
    "CertStatus",
    "IssuerHash",
    "OcspRequest",
    "OcspSigner",
    "ResponseStatus",
    "SingleAnswer",
    "issuer_hashes",
    "parse_request",
    "refusal",
]

MAX_REQUEST_OCTETS: Final = 64 * 1024
MAX_REQUESTS: Final = 100
"""Certificates in one request: each may cost a look into the ledger."""
_MAX_NONCE: Final = 128
_MAX_SERIAL_OCTETS: Final = 20

_BOOLEAN: Final = 0x01
_VERSION: Final = 0xA0
_EXTENSIONS_OF_ONE: Final = 0xA0
_REQUESTOR: Final = 0xA1
_EXTENSIONS: Final = 0xA2
_SIGNATURE: Final = 0xA0
_V1: Final = b"\x02\x01\x00"


def _oid_content(dotted: str) -> bytes:
    return Reader(encode_oid(dotted)).content(OID, "an OID")


_NONCE: Final = _oid_content(OCSPExtensionOID.NONCE.dotted_string)
_HASHES: Final = {
    _oid_content("1.3.14.3.2.26"): "sha1",
    _oid_content("2.16.840.1.101.3.4.2.1"): "sha256",
}
_NO_PARAMETERS: Final = (b"", b"\x05\x00")

IssuerHash = tuple[str, bytes, bytes]
"""How a CertID names an issuer: "sha1" or "sha256", the hash of its name, the hash of its key."""


class ResponseStatus(IntEnum):
    """OCSPResponseStatus (RFC 6960 section 4.2.1)."""

    SUCCESSFUL = 0
    MALFORMED_REQUEST = 1
    INTERNAL_ERROR = 2
    TRY_LATER = 3
    UNAUTHORIZED = 6


class CertStatus(IntEnum):
    """CertStatus; the value is the tag of its CHOICE."""

    GOOD = 0
    REVOKED = 1
    UNKNOWN = 2


@dataclass(frozen=True, slots=True)
class CertId:
    """One certificate asked about.

    Attributes:
        issuer: whose it is; None when it is named by a hash nobody here computes.
        serial: as in the certificate; whoever asks may make it zero or negative.
        der: the CertID as it was sent.
    """

    issuer: IssuerHash | None
    serial: int
    der: bytes


@dataclass(frozen=True, slots=True)
class OcspRequest:
    """What is asked; `nonce` is None when none was sent."""

    cert_ids: tuple[CertId, ...]
    nonce: bytes | None = None


@dataclass(frozen=True, slots=True)
class SingleAnswer:
    """What is said about one certificate.

    Attributes:
        cert_id: the CertID as it was asked, DER.
        revoked_at: aware, in UTC; for REVOKED alone, and needed there.
        reason: CRLReason (RFC 5280 section 5.3.1), or None when there is none to give.
        this_update: when this was known to be so.
        next_update: when there will be newer word at the latest.
    """

    cert_id: bytes
    status: CertStatus
    this_update: datetime
    next_update: datetime
    revoked_at: datetime | None = None
    reason: int | None = None


# --- reading --------------------------------------------------------------------------------------


def parse_request(der: bytes) -> OcspRequest | ResponseStatus:
    """The request, or the status to refuse it with (RFC 6960 section 4.1.1)."""
    if len(der) > MAX_REQUEST_OCTETS:
        return ResponseStatus.MALFORMED_REQUEST
    try:
        return _request(der)
    except DerError:
        return ResponseStatus.MALFORMED_REQUEST


def _request(der: bytes) -> OcspRequest:
    outer = Reader(der)
    whole = outer.enter(SEQUENCE, "a request")
    outer.finish("the request")
    body = whole.enter(SEQUENCE, "a body")
    if whole.next_is(_SIGNATURE):
        signature = whole.enter(_SIGNATURE, "a signature")
        signature.enter(SEQUENCE, "a signature")
        signature.finish("the signature")
    whole.finish("the body")
    if body.next_is(_VERSION) and body.content(_VERSION, "a version") != _V1:
        raise DerError("only version 1 is known")
    if body.next_is(_REQUESTOR):
        body.enter(_REQUESTOR, "a requestor's name")
    requests = body.enter(SEQUENCE, "a list of requests")
    nonce = None
    if body.next_is(_EXTENSIONS):
        nonce = _known_extensions(body.enter(_EXTENSIONS, "extensions")).get(_NONCE)
    body.finish("the extensions")
    cert_ids: list[CertId] = []
    while not requests.at_end:
        if len(cert_ids) == MAX_REQUESTS:
            raise DerError("too many certificates are asked about")
        cert_ids.append(_one_request(requests.enter(SEQUENCE, "a request")))
    if not cert_ids:
        raise DerError("nothing is asked")
    return OcspRequest(tuple(cert_ids), None if nonce is None else _nonce(nonce))


def _one_request(request: Reader) -> CertId:
    start = request.position
    cert_id = request.enter(SEQUENCE, "a certificate's id")
    der = request.data[start : request.position]
    if request.next_is(_EXTENSIONS_OF_ONE):
        _known_extensions(request.enter(_EXTENSIONS_OF_ONE, "extensions"))
    request.finish("the request")
    algorithm = cert_id.enter(SEQUENCE, "a hash algorithm")
    hash_name = _HASHES.get(algorithm.content(OID, "a hash algorithm"))
    parameters = algorithm.data[algorithm.position : algorithm.end]
    name_hash = cert_id.content(OCTET_STRING, "a name's hash")
    key_hash = cert_id.content(OCTET_STRING, "a key's hash")
    serial = _integer(cert_id.content(INTEGER, "a serial number"))
    cert_id.finish("the certificate's id")
    if hash_name is None or parameters not in _NO_PARAMETERS:
        return CertId(None, serial, der)
    return CertId((hash_name, name_hash, key_hash), serial, der)


def _integer(content: bytes) -> int:
    if not 1 <= len(content) <= _MAX_SERIAL_OCTETS:
        raise DerError("a serial number has 1 to 20 octets")
    if len(content) > 1 and content[0] in (0x00, 0xFF) and content[0] >> 7 == content[1] >> 7:
        raise DerError("an integer is not DER")
    return int.from_bytes(content, "big", signed=True)


def _known_extensions(outer: Reader) -> dict[bytes, bytes]:
    """Extensions by OID content; one that must be understood and is not is refused."""
    extensions = outer.enter(SEQUENCE, "extensions")
    outer.finish("the extensions")
    found: dict[bytes, bytes] = {}
    while True:  # at least one (RFC 5280 section 4.1)
        extension = extensions.enter(SEQUENCE, "an extension")
        oid = extension.content(OID, "an extension's OID")
        critical = extension.next_is(_BOOLEAN)
        if critical and extension.content(_BOOLEAN, "a flag") != b"\xff":
            raise DerError("a flag is not DER")
        value = extension.content(OCTET_STRING, "an extension's value")
        extension.finish("the extension's value")
        if oid in found:
            raise DerError("an extension appears twice")
        if critical and oid != _NONCE:
            raise DerError("an extension that must be understood is not")
        found[oid] = value
        if extensions.at_end:
            return found


def _nonce(value: bytes) -> bytes:
    reader = Reader(value)
    nonce = reader.content(OCTET_STRING, "a nonce")
    reader.finish("the nonce")
    if not 1 <= len(nonce) <= _MAX_NONCE:
        raise DerError("a nonce has 1 to 128 octets (RFC 9654 section 2.1)")
    return nonce


def issuer_hashes(issuer: x509.Certificate) -> tuple[IssuerHash, IssuerHash]:
    """All the ways a CertID may name that issuer (RFC 6960 section 4.1.1)."""
    name = issuer.subject.public_bytes()
    key = _key_bits(spki_der(issuer.public_key()))
    sha1 = ("sha1", _sha1(name), _sha1(key))
    return sha1, ("sha256", hashlib.sha256(name).digest(), hashlib.sha256(key).digest())


def _sha1(octets: bytes) -> bytes:
    return hashlib.sha1(octets, usedforsecurity=False).digest()


def _key_bits(spki: bytes) -> bytes:
    """The public key's BIT STRING without its count of unused bits."""
    info = Reader(spki).enter(SEQUENCE, "key info")
    info.enter(SEQUENCE, "key algorithm")
    return info.content(BIT_STRING, "public key")[1:]


# --- answering ------------------------------------------------------------------------------------


def refusal(status: ResponseStatus) -> bytes:
    """The answer that says that there is none, DER; unsigned, as RFC 6960 has it."""
    return element(SEQUENCE, bytes((0x0A, 1, status)))


_NONCE_OID: Final = encode_oid(OCSPExtensionOID.NONCE.dotted_string)
_BASIC: Final = encode_oid("1.3.6.1.5.5.7.48.1.1")
_GOOD: Final = b"\x80\x00"
_UNKNOWN: Final = b"\x82\x00"


@lru_cache(maxsize=256)
def _time(moment: datetime) -> bytes:
    """A GeneralizedTime of whole seconds in UTC, in every year (RFC 6960 section 4.2.2.1)."""
    text = f"{moment:%Y%m%d%H%M%SZ}".rjust(15, "0")
    return element(GENERALIZED_TIME, text.encode("ascii"))


class OcspSigner:
    """Signs answers with one responder's key; built once, safe to share between threads.

    Args:
        certificate: the responder's own; it goes with every answer.
        key: its private key.
    """

    __slots__ = ("_algorithm", "_certificates", "_key", "_responder_id")

    def __init__(self, *, certificate: x509.Certificate, key: SigningKey) -> None:
        self._key: Final = key
        self._algorithm: Final = signature_algorithm_der(key.algorithm)
        key_hash = _sha1(_key_bits(spki_der(certificate.public_key())))
        self._responder_id: Final = element(0xA2, element(OCTET_STRING, key_hash))
        der = certificate.public_bytes(Encoding.DER)
        self._certificates: Final = element(0xA0, element(SEQUENCE, der))

    def sign(
        self, answers: Iterable[SingleAnswer], *, produced_at: datetime, nonce: bytes | None = None
    ) -> bytes:
        """The OCSPResponse, DER, with the answers in their order.

        Raises:
            ProfileViolation: an answer says revoked and not since when.
            BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
        """
        extensions = b""
        if nonce is not None:
            value = element(OCTET_STRING, element(OCTET_STRING, nonce))
            extension = element(SEQUENCE, _NONCE_OID + value)
            extensions = element(0xA1, element(SEQUENCE, extension))
        data = element(
            SEQUENCE,
            self._responder_id
            + _time(produced_at.replace(microsecond=0))
            + element(SEQUENCE, b"".join(map(_single, answers)))
            + extensions,
        )
        signature = element(BIT_STRING, b"\x00" + self._key.sign(data))
        basic = element(SEQUENCE, data + self._algorithm + signature + self._certificates)
        body = element(SEQUENCE, _BASIC + element(OCTET_STRING, basic))
        return element(SEQUENCE, b"\x0a\x01\x00" + element(0xA0, body))


def _single(answer: SingleAnswer) -> bytes:
    if answer.status is CertStatus.GOOD:
        status = _GOOD
    elif answer.status is CertStatus.UNKNOWN:
        status = _UNKNOWN
    elif answer.revoked_at is None:
        raise ProfileViolation("an answer that says revoked must say since when")
    else:
        # Reason 0, unspecified, is better left out (RFC 5280 section 5.3.1).
        reason = element(0xA0, bytes((0x0A, 1, answer.reason))) if answer.reason else b""
        status = element(0xA1, _time(answer.revoked_at.replace(microsecond=0)) + reason)
    return element(
        SEQUENCE,
        answer.cert_id
        + status
        + _time(answer.this_update.replace(microsecond=0))
        + element(0xA0, _time(answer.next_update.replace(microsecond=0))),
    )
