"""The certificate of a delegated OCSP responder (RFC 6960 section 4.2.2.2): prepare, then sign.

- The same order as for SVIDs: encoded and linted before any key, so that it can be recorded first.
- It says one thing, that its key may sign OCSP answers of the authority that certified it: it has
  no SPIFFE ID, no other name of a host, and no use in TLS.
- It is short-lived and says that nobody need ask whether it is revoked (id-pkix-ocsp-nocheck).
- The bytes are read back by `cryptography`, which shares nothing with the encoder, before a key
  may sign them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from identity_ca.authority_certificate import issuer_facts
from identity_ca.crl import CrlIssuer
from identity_ca.der import OCTET_STRING, SEQUENCE, element, encode_integer, encode_oid, encode_time
from identity_ca.errors import LintFailed, ProfileViolation
from identity_ca.keys import PublicKey, SigningKey, key_fingerprint, spki_der
from identity_ca.lint import BACKDATE, IssuerFacts
from identity_ca.serial import new_serial, serial_hex
from identity_ca.spiffe_id import TrustDomain
from identity_ca.template import (
    assemble,
    authority_key_id_extension,
    encode_extension,
    subject_key_id,
)

__all__ = ["RESPONDER_TTL", "PreparedResponder", "prepare_responder", "sign_responder"]

RESPONDER_TTL: Final = timedelta(days=1)
"""How long a responder's key may speak: nobody can revoke it."""

_V3: Final = b"\xa0\x03\x02\x01\x02"
_UB_ORGANIZATION_NAME: Final = 64
_OCSP_SIGNING: Final = element(SEQUENCE, encode_oid(ExtendedKeyUsageOID.OCSP_SIGNING.dotted_string))
_FIXED_EXTENSIONS: Final = (
    encode_extension(ExtensionOID.BASIC_CONSTRAINTS, b"\x30\x00", critical=True)
    + encode_extension(ExtensionOID.KEY_USAGE, b"\x03\x02\x07\x80", critical=True)
    + encode_extension(ExtensionOID.EXTENDED_KEY_USAGE, _OCSP_SIGNING, critical=False)
    + encode_extension(ExtensionOID.OCSP_NO_CHECK, b"\x05\x00", critical=False)
)
_EXPECTED: Final = (
    x509.BasicConstraints(ca=False, path_length=None),
    x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING]),
    x509.OCSPNoCheck(),
    x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    ),
)


@dataclass(frozen=True, slots=True)
class PreparedResponder:
    """A responder's certificate that is decided, encoded and linted, and not yet signed.

    Attributes:
        serial: 40 lower-case hex digits.
        tbs: the to-be-signed bytes, DER.
        tbs_digest: SHA-256 of `tbs`, hex.
        key_fingerprint: SHA-256 of the responder's SubjectPublicKeyInfo, hex.
        signature_algorithm: AlgorithmIdentifier of the authority's key, DER.
    """

    serial: str
    tbs: bytes
    tbs_digest: str
    key_fingerprint: str
    not_before: datetime
    not_after: datetime
    signature_algorithm: bytes


def prepare_responder(
    *,
    issuer: CrlIssuer,
    trust_domain: TrustDomain,
    public_key: PublicKey,
    now: datetime,
    ttl: timedelta = RESPONDER_TTL,
) -> PreparedResponder:
    """The certificate for `public_key`, up to but without its signature.

    It is valid from `now` - 10 s for `ttl`, and never when its issuer is not.

    Raises:
        ProfileViolation: the issuer has expired, or is not valid yet.
        UpstreamRejected: the issuer's certificate is no CA's or does not belong to its key.
        LintFailed: a bug in this library, caught before it was signed.
    """
    facts = issuer_facts(issuer.certificate, issuer.key)
    not_before = max(now.replace(microsecond=0) - BACKDATE, facts.not_before)
    not_after = min((now + ttl).replace(microsecond=0), facts.not_after)
    if not not_before <= now < not_after:
        raise ProfileViolation("the issuing authority is not valid now")
    spki = spki_der(public_key)
    fingerprint = key_fingerprint(public_key)
    serial = new_serial(now)
    tbs = element(
        SEQUENCE,
        b"".join(
            (
                _V3,
                encode_integer(serial),
                facts.signature_algorithm,
                facts.name,
                element(SEQUENCE, encode_time(not_before) + encode_time(not_after)),
                _subject(trust_domain, fingerprint),
                spki,
                element(0xA3, element(SEQUENCE, _extensions(spki, facts))),
            )
        ),
    )
    _lint(tbs, facts, spki, not_before, not_after)
    return PreparedResponder(
        serial=serial_hex(serial),
        tbs=tbs,
        tbs_digest=hashlib.sha256(tbs).hexdigest(),
        key_fingerprint=fingerprint,
        not_before=not_before,
        not_after=not_after,
        signature_algorithm=facts.signature_algorithm,
    )


def sign_responder(prepared: PreparedResponder, key: SigningKey) -> x509.Certificate:
    """The certificate, signed by the authority's key.

    Raises:
        LintFailed: the bytes changed since they were linted.
        BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
    """
    if hashlib.sha256(prepared.tbs).hexdigest() != prepared.tbs_digest:
        raise LintFailed("the bytes to be signed are not the ones that were linted")
    signature = key.sign(prepared.tbs)
    return x509.load_der_x509_certificate(
        assemble(prepared.tbs, prepared.signature_algorithm, signature)
    )


def _subject(trust_domain: TrustDomain, fingerprint: str) -> bytes:
    return x509.Name(
        [
            x509.NameAttribute(
                NameOID.ORGANIZATION_NAME, trust_domain.name[:_UB_ORGANIZATION_NAME]
            ),
            x509.NameAttribute(NameOID.COMMON_NAME, f"broker-ocsp-{fingerprint[:32]}"),
        ]
    ).public_bytes()


def _extensions(spki: bytes, facts: IssuerFacts) -> bytes:
    return (
        _FIXED_EXTENSIONS
        + encode_extension(
            ExtensionOID.SUBJECT_KEY_IDENTIFIER,
            element(OCTET_STRING, subject_key_id(spki)),
            critical=False,
        )
        + authority_key_id_extension(facts.key_id)
    )


def _lint(
    tbs: bytes, facts: IssuerFacts, spki: bytes, not_before: datetime, not_after: datetime
) -> None:
    try:
        # A certificate needs some signature to be read; this one is nobody's.
        read = x509.load_der_x509_certificate(assemble(tbs, facts.signature_algorithm, b"\x00"))
        found = [extension.value for extension in read.extensions]
    except ValueError as exc:
        raise LintFailed(
            "the responder's certificate is not DER of the expected structure", detail=str(exc)
        ) from exc
    key_ids = (
        x509.SubjectKeyIdentifier(subject_key_id(spki)),
        x509.AuthorityKeyIdentifier(facts.key_id, None, None),
    )
    if set(found) != {*_EXPECTED, *key_ids} or len(found) != len(_EXPECTED) + len(key_ids):
        raise LintFailed("the extensions of a responder's certificate must be its profile's")
    if (
        read.tbs_certificate_bytes != tbs
        or read.issuer.public_bytes() != facts.name
        or spki_der(read.public_key()) != spki
        or (read.not_valid_before_utc, read.not_valid_after_utc) != (not_before, not_after)
    ):
        raise LintFailed("a responder's certificate must say what was decided")
