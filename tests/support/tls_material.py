"""TLS material for tests of listeners: a CA, a broker certificate, client SVIDs; all P-256."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from identity_broker.server.rpc.listener import TlsMaterial

ONE_HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class KeyPair:
    key_pem: bytes
    chain_pem: bytes


def key_usage(*granted: str) -> x509.KeyUsage:
    """The key usage with the purposes named."""
    purposes = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{purpose: purpose in granted for purpose in purposes})


LEAF_USAGE = key_usage("digital_signature")


class TestAuthority:
    """A root that issues whatever it is asked to."""

    __test__ = False

    def __init__(self, name: str = "test root") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - ONE_HOUR)
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def key_id(self) -> str:
        """What leaves name as their authority key, hexadecimal."""
        return x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()).digest.hex()

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        *uris: str,
        server: bool = False,
        not_after: datetime | None = None,
        serial: int | None = None,
        ca: bool | None = False,
        usage: x509.KeyUsage | None = LEAF_USAGE,
        names_issuer: bool = True,
    ) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        if server:
            names += [
                x509.DNSName("localhost"),
                x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SPIRE")]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(not_after or now + ONE_HOUR)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        if usage is not None:
            builder = builder.add_extension(usage, critical=True)
        if names_issuer:
            builder = builder.add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        return KeyPair(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            certificate.public_bytes(serialization.Encoding.PEM),
        )

    def broker(self, roots: bytes = b"") -> TlsMaterial:
        pair = self.issue("spiffe://example.org/idb/broker", server=True)
        return TlsMaterial(pair.key_pem, pair.chain_pem, roots or self.pem)
