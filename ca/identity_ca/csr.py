"""A certificate signing request, reduced to the one thing taken from it: a proven public key.

- DER only, at most 16 KiB, and the key is judged before its signature is computed with, so that
  an absurd key costs nothing.
- The signature must verify: proof of possession.
- Subject, SANs and every other attribute are ignored, never granted. What a certificate says
  about its holder comes from the registration entry alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass
from typing import Final, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import SignatureAlgorithmOID

from identity_ca.errors import CsrRejected, KeyTooWeak
from identity_ca.keys import KeyAlgorithm, PublicKey, algorithm_of, spki_der

__all__ = ["MAX_CSR_BYTES", "CertificateRequest", "parse_csr", "require_allowed"]

MAX_CSR_BYTES: Final = 16384

_SIGNATURES: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.ED25519,
    }
)
_HINT: Final = (
    "send one PKCS #10 request in DER; openssl req -new -key KEY -subj / -outform DER makes one"
)


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """A public key whose holder proved possession of the private half.

    Attributes:
        algorithm: what kind of key it is.
        key_fingerprint: SHA-256 of `spki_der`, lower-case hex.
        spki_der: the key as SubjectPublicKeyInfo, re-encoded here and so canonical.
    """

    public_key: PublicKey
    algorithm: KeyAlgorithm
    key_fingerprint: str
    spki_der: bytes


def require_allowed(algorithm: KeyAlgorithm, allowed: Set[KeyAlgorithm]) -> None:
    """Returns when a profile that allows these kinds of keys allows this one.

    Raises:
        KeyTooWeak: it does not.
    """
    if algorithm not in allowed:
        raise KeyTooWeak(
            f"the profile does not allow {algorithm.value} keys",
            hint=f"it allows: {', '.join(sorted(allowed))}",
        )


def parse_csr(
    der: bytes, *, allowed: Set[KeyAlgorithm], max_bytes: int = MAX_CSR_BYTES
) -> CertificateRequest:
    """Reads a request and verifies its signature (RFC 2986).

    Raises:
        CsrRejected: too long, not DER, signed with a weak algorithm or by another key.
        KeyTooWeak: the key is weak, or its algorithm is not among `allowed`.
    """
    if len(der) > max_bytes:
        raise CsrRejected(f"the signing request is longer than {max_bytes} bytes", hint=_HINT)
    try:
        request = x509.load_der_x509_csr(der)
        public_key = request.public_key()
    except (ValueError, TypeError, x509.InvalidVersion) as exc:
        raise CsrRejected(
            "the signing request is not valid DER of PKCS #10", hint=_HINT, detail=str(exc)
        ) from exc
    except UnsupportedAlgorithm as exc:
        raise KeyTooWeak(
            "the key in the signing request is of a kind that cannot be used",
            hint="use an EC P-256 key",
            detail=str(exc),
        ) from exc
    algorithm = algorithm_of(public_key)
    require_allowed(algorithm, allowed)
    if request.signature_algorithm_oid not in _SIGNATURES:
        raise CsrRejected(
            "the signing request is signed with an algorithm that proves nothing",
            hint="sign it with SHA-256 or better",
        )
    try:
        proven = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise CsrRejected(
            "the signature of the signing request cannot be checked", hint=_HINT, detail=str(exc)
        ) from exc
    if not proven:
        raise CsrRejected(
            "the signing request is not signed by the key it holds",
            hint="sign it with the private key that belongs to the public key in it",
        )
    spki = spki_der(public_key)
    return CertificateRequest(
        public_key=cast("PublicKey", public_key),  # algorithm_of lets no other kind through
        algorithm=algorithm,
        key_fingerprint=hashlib.sha256(spki).hexdigest(),
        spki_der=spki,
    )
