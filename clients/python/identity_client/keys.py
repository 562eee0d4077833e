"""Private keys, made where they are used: EC P-256, and the CSR that proves we hold one.

- A key never leaves this process but into `state_dir` (the node's own) when the caller asks.
- The CSR carries the key alone: the broker takes the names from the registration entry.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

__all__ = ["KeyPair", "spki_der"]


class KeyPair:
    """A fresh EC P-256 key; its representation shows nothing."""

    __slots__ = ("private_key",)

    def __init__(self, private_key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self.private_key = private_key or ec.generate_private_key(ec.SECP256R1())

    def __repr__(self) -> str:
        return "KeyPair(EC P-256)"

    def csr(self) -> bytes:
        """PKCS #10 in DER, with an empty subject (RFC 2986)."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        request = builder.sign(self.private_key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.DER)

    def public_der(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return spki_der(self.private_key.public_key())


def spki_der(public_key: PublicKeyTypes) -> bytes:
    """SubjectPublicKeyInfo in DER, by which keys are compared."""
    return public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
