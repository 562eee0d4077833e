"""How this machine proves what it is: the client halves of the node attestors.

- `join_token`: the payload is the token in UTF-8; no challenge follows.
- `x509_pop`: the payload is JSON {"certificates": [base64 DER, leaf first]}; the broker's
  challenge is JSON {"nonce": base64, "context": text}; the answer is JSON {"signature": base64,
  "client_nonce": base64}. Signed is what `pop_message` returns, with the certificate's key:
  ECDSA with SHA-256 (P-256) or SHA-384 (P-384), RSA-PSS with SHA-256 and a 32-byte salt, Ed25519.
- The signed bytes bind the key in the CSR and the trust domain, so that an answer cannot be used
  for another key or at another broker; our own nonce keeps the broker from choosing what we sign.
- A token or key never appears in a representation, log or error.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from identity_client.errors import ProtocolViolation, SettingsInvalid
from identity_client.keys import spki_der

__all__ = ["CertificateAttestor", "JoinTokenAttestor", "NodeAttestor", "pop_message"]

_POP_PREFIX = b"identity-broker x509_pop v1\0"
_NONCE_BYTES = 32
_MAX_TOKEN_BYTES = 4096

_PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class NodeAttestor(Protocol):
    """The client half of one attestor. Its methods block: they may read files."""

    @property
    def name(self) -> str:
        """As the broker knows it."""
        ...

    @property
    def renewable(self) -> bool:
        """Whether a later `payload()` may succeed after one was refused or spent."""
        ...

    def payload(self) -> bytes:
        """What opens the attestation; secret.

        Raises:
            SettingsInvalid: a file cannot be read or used.
        """
        ...

    def respond(self, challenge: bytes, *, public_key_der: bytes, trust_domain: str) -> bytes:
        """The answer to the broker's challenge.

        Raises:
            ProtocolViolation: the challenge is not one of this attestor's.
        """
        ...


class JoinTokenAttestor:
    """Joins with a single-use token, given directly or as a file that is read when it is needed."""

    name = "join_token"

    def __init__(self, token: str | None = None, *, token_file: str | Path | None = None) -> None:
        if bool(token) == bool(token_file):
            raise SettingsInvalid(
                "exactly one of token and token_file is needed",
                hint="make a token: idb token generate",
            )
        self._token = token
        self._file = Path(token_file) if token_file else None

    def __repr__(self) -> str:
        return f"JoinTokenAttestor({'a file' if self._file else 'a token'})"

    @property
    def renewable(self) -> bool:
        """A file may hold another token next time."""
        return self._file is not None

    def payload(self) -> bytes:
        """The token."""
        if self._file is None:
            return (self._token or "").encode()
        token = _read(self._file, "the join token file").strip()
        if not token or len(token) > _MAX_TOKEN_BYTES:
            raise SettingsInvalid(
                f'the join token file "{self._file}" holds no token',
                hint="make a token: idb token generate",
            )
        return token

    def respond(self, challenge: bytes, *, public_key_der: bytes, trust_domain: str) -> bytes:
        """Refuses: a join token is never challenged."""
        raise ProtocolViolation("the broker sent a challenge to a join token")


class CertificateAttestor:
    """Joins with a certificate this machine already has (x509_pop)."""

    name = "x509_pop"
    renewable = True

    def __init__(self, cert_file: str | Path, key_file: str | Path) -> None:
        self._cert_file = Path(cert_file)
        self._key_file = Path(key_file)

    def __repr__(self) -> str:
        return f"CertificateAttestor({str(self._cert_file)!r})"

    def payload(self) -> bytes:
        """The certificate chain."""
        try:
            chain = x509.load_pem_x509_certificates(_read(self._cert_file, "the certificate file"))
        except ValueError as exc:
            raise SettingsInvalid(
                f'the certificate file "{self._cert_file}" holds no PEM certificate'
            ) from exc
        if spki_der(chain[0].public_key()) != spki_der(self._private_key().public_key()):
            raise SettingsInvalid(
                f'the key in "{self._key_file}" is not that of the first certificate '
                f'in "{self._cert_file}"'
            )
        encoded = [_base64(one.public_bytes(serialization.Encoding.DER)) for one in chain]
        return json.dumps({"certificates": encoded}).encode()

    def respond(self, challenge: bytes, *, public_key_der: bytes, trust_domain: str) -> bytes:
        """A signature over both nonces, the CSR's key and the trust domain."""
        nonce = _nonce(challenge)
        client_nonce = secrets.token_bytes(_NONCE_BYTES)
        message = pop_message(
            public_key_der=public_key_der,
            trust_domain=trust_domain,
            nonce=nonce,
            client_nonce=client_nonce,
        )
        signature = _sign(self._private_key(), message)
        answer = {"signature": _base64(signature), "client_nonce": _base64(client_nonce)}
        return json.dumps(answer).encode()

    def _private_key(self) -> _PrivateKey:
        pem = _read(self._key_file, "the key file")
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            # "from None": the parser's message could quote the file, and the file is a key.
            raise SettingsInvalid(
                f'the key file "{self._key_file}" holds no unencrypted PEM private key'
            ) from None
        if not isinstance(key, _PrivateKey):
            raise SettingsInvalid(
                f'the key in "{self._key_file}" is of a kind that x509_pop does not know',
                hint="use an EC P-256 or P-384, RSA or Ed25519 key",
            )
        return key


def pop_message(
    *, public_key_der: bytes, trust_domain: str, nonce: bytes, client_nonce: bytes
) -> bytes:
    """The bytes an x509_pop answer signs.

    Args:
        public_key_der: SubjectPublicKeyInfo of the key in the CSR.
        trust_domain: name, without scheme.
        nonce: the broker's, 32 bytes.
        client_nonce: ours, 32 bytes.
    """
    return b"".join(
        (
            _POP_PREFIX,
            hashlib.sha256(public_key_der).digest(),
            trust_domain.encode(),
            b"\0",
            nonce,
            client_nonce,
        )
    )


def _nonce(challenge: bytes) -> bytes:
    try:
        nonce = base64.b64decode(json.loads(challenge)["nonce"], validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error) as exc:
        raise ProtocolViolation("the broker's challenge cannot be read") from exc
    if len(nonce) != _NONCE_BYTES:
        raise ProtocolViolation(f"the broker's challenge must hold {_NONCE_BYTES} bytes")
    return nonce


def _sign(key: _PrivateKey, message: bytes) -> bytes:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message)
    if isinstance(key, rsa.RSAPrivateKey):
        pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)
        return key.sign(message, pss, hashes.SHA256())
    digest = hashes.SHA384() if isinstance(key.curve, ec.SECP384R1) else hashes.SHA256()
    return key.sign(message, ec.ECDSA(digest))


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise SettingsInvalid(
            f'{what} "{path}" cannot be read: {exc.strerror or type(exc).__name__}'
        ) from exc


def _base64(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")
