"""A CA that certifies machines, and the SDK's half of attesting with its certificates."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from identity_client.attestation import CertificateAttestor


class MachineCa:
    """The CA that certified the machines before any broker came."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "machines")])
        self.certificate = self._build(name, name, self.key, self.key, ca=True)

    def machine(
        self,
        key: Any = None,
        *,
        name: str = "web-1.internal",
        days: int = 30,
        ca: bool = False,
        purposes: Sequence[x509.ObjectIdentifier] = (),
    ) -> tuple[Any, x509.Certificate]:
        """A machine's key and certificate."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._build(
            subject,
            self.certificate.subject,
            key,
            self.key,
            ca=ca,
            days=days,
            dns=name,
            purposes=purposes,
        )
        return key, certificate

    def _build(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: Any,
        signer: Any,
        *,
        ca: bool,
        days: int = 30,
        dns: str = "",
        purposes: Sequence[x509.ObjectIdentifier] = (),
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=60))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
        )
        if ca:
            builder = builder.add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
        if dns:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False
            )
        if purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        return builder.sign(signer, hashes.SHA256())


def client_half(directory: Path, key: Any, certificate: x509.Certificate) -> CertificateAttestor:
    """The SDK's half, reading files as a node would."""
    directory.mkdir(exist_ok=True)
    cert_file, key_file = directory / "machine.pem", directory / "machine.key"
    cert_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key_file.chmod(0o600)
    return CertificateAttestor(cert_file, key_file)
