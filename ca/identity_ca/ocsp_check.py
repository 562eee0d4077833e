"""The asker's side of OCSP: one request for one certificate, and the answer held against it.

- An answer counts when its issuer, or a responder that its issuer certified for this alone, signed
  it, it is about exactly this certificate, and now lies between this update and the next.
- There is no nonce: what is asked for is to be shown to others (stapled), who did not choose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from identity_ca.errors import AnswerRejected, CAError
from identity_ca.keys import PublicKey, algorithm_of, signature_hash, verify_signature
from identity_ca.ocsp import CertStatus

__all__ = [
    "MAX_ANSWER_OCTETS",
    "CheckedAnswer",
    "build_request",
    "check_answer",
    "check_signature",
]

MAX_ANSWER_OCTETS: Final = 64 * 1024
_SKEW: Final = timedelta(minutes=1)
_STATUS: Final = {
    ocsp.OCSPCertStatus.GOOD: CertStatus.GOOD,
    ocsp.OCSPCertStatus.REVOKED: CertStatus.REVOKED,
    ocsp.OCSPCertStatus.UNKNOWN: CertStatus.UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class CheckedAnswer:
    """What a responder said of one certificate, its signature verified.

    Attributes:
        der: the OCSPResponse.
        revoked_at: aware, in UTC; None unless it is revoked.
    """

    der: bytes
    status: CertStatus
    this_update: datetime
    next_update: datetime
    revoked_at: datetime | None = None


def build_request(leaf: x509.Certificate, issuer: x509.Certificate) -> bytes:
    """An OCSPRequest about `leaf`, DER, with the SHA-1 CertID that clients look for."""
    algorithm = hashes.SHA1()  # noqa: S303  # a name, not a signature (RFC 5019 section 2.1.1)
    return (
        ocsp.OCSPRequestBuilder()
        .add_certificate(leaf, issuer, algorithm)
        .build()
        .public_bytes(Encoding.DER)
    )


def check_answer(
    der: bytes, *, leaf: x509.Certificate, issuer: x509.Certificate, now: datetime
) -> CheckedAnswer:
    """The answer to `build_request(leaf, issuer)`, verified.

    Raises:
        AnswerRejected: it is none, refuses, is about something else, was signed by somebody else,
            or is not current.
    """
    try:
        answer = ocsp.load_der_ocsp_response(der)
        if answer.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise AnswerRejected(f"the responder says {answer.response_status.name}")
        return _checked(der, answer, leaf, issuer, now)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise AnswerRejected("what came is no OCSP answer", detail=str(exc)) from exc
    except InvalidSignature as exc:
        raise AnswerRejected("the signature of the OCSP answer is wrong") from exc


def _checked(
    der: bytes,
    answer: ocsp.OCSPResponse,
    leaf: x509.Certificate,
    issuer: x509.Certificate,
    now: datetime,
) -> CheckedAnswer:
    asked = ocsp.load_der_ocsp_request(build_request(leaf, issuer))
    if (
        not isinstance(answer.hash_algorithm, hashes.SHA1)
        or answer.issuer_name_hash != asked.issuer_name_hash
        or answer.issuer_key_hash != asked.issuer_key_hash
        or answer.serial_number != leaf.serial_number
    ):
        raise AnswerRejected("the OCSP answer is about another certificate")
    next_update = answer.next_update_utc
    if next_update is None or not answer.this_update_utc - _SKEW <= now < next_update:
        raise AnswerRejected("the OCSP answer is not current")
    check_signature(answer, issuer, now)
    return CheckedAnswer(
        der=der,
        status=_STATUS[answer.certificate_status],
        this_update=answer.this_update_utc,
        next_update=next_update,
        revoked_at=answer.revocation_time_utc,
    )


def check_signature(answer: ocsp.OCSPResponse, issuer: x509.Certificate, now: datetime) -> None:
    """Returns when the issuer, or a responder it certified, signed the answer.

    Raises:
        AnswerRejected: nobody who may answer for the issuer signed it.
        InvalidSignature: the signature does not hold.
    """
    candidates = [issuer, *(one for one in answer.certificates if _may_answer(one, issuer, now))]
    named = [one for one in candidates if _is_named(answer, one)]
    if not named:
        raise AnswerRejected("the OCSP answer is signed by nobody whom the issuer certified")
    key: PublicKey = named[0].public_key()  # type: ignore[assignment]
    try:
        algorithm = algorithm_of(key)
    except CAError as exc:
        raise AnswerRejected("the responder's key is too weak", detail=str(exc)) from exc
    if type(answer.signature_hash_algorithm) is not type(signature_hash(algorithm)):
        raise AnswerRejected("the OCSP answer is signed with an unexpected algorithm")
    verify_signature(key, answer.signature, answer.tbs_response_bytes)


def _is_named(answer: ocsp.OCSPResponse, certificate: x509.Certificate) -> bool:
    if answer.responder_name is not None:
        return answer.responder_name == certificate.subject
    key_id = x509.SubjectKeyIdentifier.from_public_key(certificate.public_key())
    return answer.responder_key_hash == key_id.digest


def _may_answer(certificate: x509.Certificate, issuer: x509.Certificate, now: datetime) -> bool:
    """Whether the issuer certified it for OCSP answers (RFC 6960 section 4.2.2.2), and it is valid.

    Raises:
        InvalidSignature: it only claims to be the issuer's.
    """
    if certificate.issuer != issuer.subject:
        return False
    certificate.verify_directly_issued_by(issuer)
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    valid = certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc
    return valid and ExtendedKeyUsageOID.OCSP_SIGNING in usage
