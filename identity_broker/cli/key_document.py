"""The public key of whatever file is at hand: key, certificate or signing request, PEM or DER.

- A private key is read to compute its public key's fingerprint and goes nowhere else.
- Nothing of the file is shown, whatever becomes of reading it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    load_der_private_key,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
)

from identity_broker.cli.errors import FileMalformed
from identity_broker.cli.files import read_input
from identity_ca.keys import key_fingerprint

_BLOCK = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]{1,64})-----\r?\n.{0,65536}?-----END \1-----", re.DOTALL
)
_READERS: dict[bytes, Callable[[bytes], PublicKeyTypes]] = {
    b"PRIVATE KEY": lambda pem: load_pem_private_key(pem, None).public_key(),
    b"ENCRYPTED PRIVATE KEY": lambda pem: load_pem_private_key(pem, None).public_key(),
    b"EC PRIVATE KEY": lambda pem: load_pem_private_key(pem, None).public_key(),
    b"RSA PRIVATE KEY": lambda pem: load_pem_private_key(pem, None).public_key(),
    b"OPENSSH PRIVATE KEY": lambda pem: load_ssh_private_key(pem, None).public_key(),
    b"PUBLIC KEY": load_pem_public_key,
    b"RSA PUBLIC KEY": load_pem_public_key,
    b"CERTIFICATE": lambda pem: x509.load_pem_x509_certificate(pem).public_key(),
    b"CERTIFICATE REQUEST": lambda pem: x509.load_pem_x509_csr(pem).public_key(),
    b"NEW CERTIFICATE REQUEST": lambda pem: x509.load_pem_x509_csr(pem).public_key(),
}
_DER: tuple[Callable[[bytes], Any], ...] = (
    lambda der: load_der_private_key(der, None).public_key(),
    load_der_public_key,
    lambda der: x509.load_der_x509_certificate(der).public_key(),
    lambda der: x509.load_der_x509_csr(der).public_key(),
)
_HINT = "or name the key itself: idb compromised --fingerprint HEX"


def fingerprint_in(path: Path) -> str:
    """SHA-256 of the SubjectPublicKeyInfo of the key in a file, hexadecimal.

    A file with a private key stands for that key, one with a chain for its first certificate.

    Raises:
        FileUnusable: it cannot be read, or holds no key, an encrypted one, or several.
    """
    content = read_input(path)
    blocks = [(match[1], match[0] + b"\n") for match in _BLOCK.finditer(content)]
    if not blocks:
        return _of_der(content, path)
    private = [block for block in blocks if block[0].endswith(b"PRIVATE KEY")]
    found = list(_fingerprints(private or blocks, path))
    if not found:
        raise FileMalformed(f'"{path}" holds no key, certificate or signing request', hint=_HINT)
    if private and len(set(found)) > 1:
        raise FileMalformed(f'"{path}" holds several private keys', hint="one file for each key")
    return found[0]


def _fingerprints(blocks: list[tuple[bytes, bytes]], path: Path) -> Iterator[str]:
    for label, pem in blocks:
        if label in _READERS:
            yield _read(_READERS[label], pem, path)


def _of_der(content: bytes, path: Path) -> str:
    for reader in _DER:
        try:
            return key_fingerprint(reader(content))
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
    raise FileMalformed(
        f'"{path}" holds no key, certificate or signing request (PEM or DER)', hint=_HINT
    )


def _read(reader: Callable[[bytes], PublicKeyTypes], pem: bytes, path: Path) -> str:
    try:
        return key_fingerprint(reader(pem))
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        # Not `from exc`: what a parser says may quote what it read.
        encrypted = isinstance(exc, TypeError)
        raise FileMalformed(
            f'"{path}" holds {"an encrypted key" if encrypted else "a key that cannot be read"}',
            hint=_HINT,
        ) from None
