"""SVIDs in files: certificates (PEM or DER) and JWTs, taken apart for people and programs.

- What is shown of a JWT is not verified unless `svid verify` did so; a token itself is never
  printed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.cli.errors import FileMalformed
from identity_broker.cli.files import read_input
from identity_broker.cli.output import Style, Text, facts, moment
from identity_broker.cli.svid_staple import responder_urls
from identity_ca.errors import CAError
from identity_ca.keys import algorithm_of
from identity_ca.serial import serial_hex

# Where to ask whether it is revoked, if the certificate says so.
_WHERE = (("revocation lists", "crl_urls"), ("ocsp responders", "ocsp_urls"))
_JWT = re.compile(rb"\s*([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*)\s*")


def read_svid(path: Path) -> list[x509.Certificate] | str:
    """The certificates of a file, leaf first, or the token in it.

    Raises:
        FileUnusable: it cannot be read, or holds neither.
    """
    content = read_input(path)
    if token := _JWT.fullmatch(content):
        return token.group(1).decode("ascii")
    try:
        if b"-----BEGIN" in content:
            return x509.load_pem_x509_certificates(content)
        return [x509.load_der_x509_certificate(content)]
    except ValueError as exc:
        raise FileMalformed(
            f'"{path}" holds no certificate (PEM or DER) and no JWT',
            hint="an SVID comes from idb svid fetch --write DIR",
        ) from exc


def certificate_document(certificate: x509.Certificate) -> dict[str, Any]:
    """What a certificate says."""
    der = certificate.public_bytes(Encoding.DER)
    return {
        "spiffe_ids": _names(certificate, x509.UniformResourceIdentifier),
        "dns_names": _names(certificate, x509.DNSName),
        "serial": serial_hex(certificate.serial_number),
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "is_ca": _is_ca(certificate),
        "key": _key(certificate),
        "not_before": certificate.not_valid_before_utc,
        "expires_at": certificate.not_valid_after_utc,
        "crl_urls": _crl_urls(certificate),
        "ocsp_urls": responder_urls(certificate),
        "digest": sha256(der).hexdigest(),
    }


def render_certificate(document: dict[str, Any], now: datetime) -> str:
    """A certificate for a person."""
    expired = document["expires_at"] <= now
    expires = moment(document["expires_at"], now=now)
    return facts(
        [
            ("spiffe id", "\n".join(document["spiffe_ids"]) or "-"),
            ("serial", document["serial"]),
            ("key", document["key"]),
            ("certificate authority", "yes" if document["is_ca"] else "no"),
            ("dns names", "\n".join(document["dns_names"]) or "-"),
            ("subject", document["subject"] or "-"),
            ("issuer", document["issuer"] or "-"),
            ("not before", moment(document["not_before"], now=now)),
            ("expires", Text(expires, Style.BAD) if expired else expires),
            *((name, "\n".join(document[key])) for name, key in _WHERE if document[key]),
            ("sha-256", document["digest"]),
        ]
    )


def token_document(token: str, path: Path) -> dict[str, Any]:
    """What a JWT says, unverified.

    Raises:
        FileMalformed: its header or claims are no JSON objects.
    """
    header, claims = (_part(part, path) for part in token.split(".")[:2])
    return {"header": header, "claims": claims, "verified": False}


def render_token(document: dict[str, Any], now: datetime) -> str:
    """A JWT for a person."""
    header, claims = document["header"], document["claims"]
    rows: list[tuple[str, str | Text]] = [
        ("kind", "JWT-SVID" if document["verified"] else "JWT, not verified"),
        ("algorithm", str(header.get("alg", "-"))),
        ("key id", str(header.get("kid", "-"))),
    ]
    for name, value in claims.items():
        rows.append((name, _claim(name, value, now)))
    return facts(rows)


def _claim(name: str, value: object, now: datetime) -> str:
    if name in ("exp", "iat", "nbf") and isinstance(value, (int, float)):
        try:
            return moment(datetime.fromtimestamp(value, UTC), now=now)
        except (OverflowError, OSError, ValueError):
            return str(value)
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return str(value)


def _part(part: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise FileMalformed(f'"{path}" looks like a JWT and is none') from None
    return document


def _names(certificate: x509.Certificate, kind: Any) -> list[str]:
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return list(san.get_values_for_type(kind))


def _crl_urls(certificate: x509.Certificate) -> list[str]:
    try:
        points = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    names = [name for point in points for name in point.full_name or ()]
    return [each.value for each in names if isinstance(each, x509.UniformResourceIdentifier)]


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return constraints.value.ca


def _key(certificate: x509.Certificate) -> str:
    try:
        return algorithm_of(certificate.public_key()).value
    except CAError as exc:
        return f"not accepted: {exc.message}"
