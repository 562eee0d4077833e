"""A leaked key in whatever file it is found: always the same fingerprint, never a word of it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from identity_broker.cli.errors import FileMalformed, FileUnusable
from identity_broker.cli.key_document import fingerprint_in
from support.tls_material import TestAuthority

KEY = ec.generate_private_key(ec.SECP256R1())
SPKI = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
FINGERPRINT = hashlib.sha256(SPKI).hexdigest()
PKCS8 = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
CSR = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(KEY, hashes.SHA256())
OTHER = ec.generate_private_key(ec.SECP384R1())


def _certificate() -> x509.Certificate:
    name = x509.Name([])
    start = datetime(2030, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(7)
    builder = builder.public_key(KEY.public_key()).not_valid_before(start)
    return builder.not_valid_after(start + timedelta(days=1)).sign(OTHER, hashes.SHA256())


CERTIFICATE = _certificate()
FILES = {
    "PKCS #8, PEM": PKCS8,
    "PKCS #8, DER": KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    "SEC 1, PEM": KEY.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
    "SEC 1, DER": KEY.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
    "OpenSSH": KEY.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    "public key, PEM": KEY.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    ),
    "public key, DER": SPKI,
    "certificate, PEM": CERTIFICATE.public_bytes(Encoding.PEM),
    "certificate, DER": CERTIFICATE.public_bytes(Encoding.DER),
    "signing request, PEM": CSR.public_bytes(Encoding.PEM),
    "signing request, DER": CSR.public_bytes(Encoding.DER),
    "a chain": CERTIFICATE.public_bytes(Encoding.PEM) + TestAuthority("example.org").pem,
    "a certificate before its key": CERTIFICATE.public_bytes(Encoding.PEM) + PKCS8,
    "the key after somebody else's certificate": TestAuthority("example.org").pem + PKCS8,
    "the key after what openssl writes before it": (
        b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" + PKCS8
    ),
    "with line ends of Windows and words around it": (
        b"found in a public repository\r\n" + PKCS8.replace(b"\n", b"\r\n") + b"\r\nthat is all"
    ),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_the_fingerprint_of_a_key_in_any_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "found"
    file.write_bytes(content)
    assert fingerprint_in(file) == FINGERPRINT


def test_an_rsa_key_of_the_traditional_form(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    file = tmp_path / "key.pem"
    for shape in (PrivateFormat.TraditionalOpenSSL, PrivateFormat.PKCS8):
        file.write_bytes(key.private_bytes(Encoding.PEM, shape, NoEncryption()))
        assert fingerprint_in(file) == hashlib.sha256(spki).hexdigest()
    file.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1))
    assert fingerprint_in(file) == hashlib.sha256(spki).hexdigest()


@pytest.mark.parametrize("shape", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_is_said_to_be_one(tmp_path: Path, shape: PrivateFormat) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(KEY.private_bytes(Encoding.PEM, shape, BestAvailableEncryption(b"s3cr3t")))
    with pytest.raises(FileMalformed, match="encrypted") as caught:
        fingerprint_in(file)
    assert "idb compromised --fingerprint" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"s3cr3t",
        b"-----BEGIN PRIVATE KEY-----\nczNjcjN0\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n",
        b"-----BEGIN SOMETHING ELSE-----\nczNjcjN0\n-----END SOMETHING ELSE-----\n",
        b"-----BEGIN PRIVATE KEY-----\n" * 2000,
        SPKI[:-1],
        b"\x30\x82\xff\xff",
    ],
)
def test_what_holds_no_key_is_refused_without_a_word_of_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "found"
    file.write_bytes(content)
    with pytest.raises(FileMalformed) as caught:
        fingerprint_in(file)
    said = f"{caught.value.public} {caught.value.hint} {caught.value.__cause__}"
    assert "s3cr3t" not in said
    assert "czNjcjN0" not in said


def test_several_private_keys_in_one_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.pem"
    file.write_bytes(PKCS8 + OTHER.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(FileMalformed, match="several"):
        fingerprint_in(file)
    file.write_bytes(PKCS8 * 2)
    assert fingerprint_in(file) == FINGERPRINT


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileUnusable):
        fingerprint_in(tmp_path / "none")
