"""DER as PEM (RFC 7468), without loading a cryptography library to do it."""

from __future__ import annotations

import base64
import textwrap


def certificate_pem(der: bytes) -> str:
    """A certificate as PEM."""
    return _pem("CERTIFICATE", der)


def public_key_pem(der: bytes) -> str:
    """A SubjectPublicKeyInfo as PEM."""
    return _pem("PUBLIC KEY", der)


def _pem(label: str, der: bytes) -> str:
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"
