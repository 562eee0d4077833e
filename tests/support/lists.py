"""Revocation lists as others see them: parsed by `cryptography`, checked by OpenSSL, over HTTP."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.config.settings import Settings
from support.ca_material import foreign_ca, key_pem, pem, signing_key, write_private
from support.line import settings_in


def parsed(lists: Iterable[bytes]) -> list[x509.CertificateRevocationList]:
    return [x509.load_der_x509_crl(der) for der in lists]


def number_of(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def base_of(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.DeltaCRLIndicator).value.crl_number


def serials(crl: x509.CertificateRevocationList) -> list[str]:
    return sorted(f"{item.serial_number:040x}" for item in crl)


def reasons(crl: x509.CertificateRevocationList) -> dict[str, x509.ReasonFlags]:
    return {
        f"{item.serial_number:040x}": item.extensions.get_extension_for_class(
            x509.CRLReason
        ).value.reason
        for item in crl
    }


def signed_by(crl: x509.CertificateRevocationList, certificate: x509.Certificate) -> bool:
    return crl.is_signature_valid(certificate.public_key())  # type: ignore[arg-type]


def list_url(leaf: x509.Certificate) -> str:
    """Where the certificate says that its list is."""
    [point] = leaf.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert point.full_name is not None
    [name] = point.full_name
    return str(name.value)


def openssl(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("openssl")
    assert program
    return subprocess.run(
        [program, *map(str, arguments)], input=stdin, capture_output=True, check=False, timeout=30
    )


@dataclass(frozen=True)
class Chain:
    """An SVID's certificates and the roots, as files for OpenSSL."""

    folder: Path
    leaf: x509.Certificate

    @classmethod
    def of(cls, folder: Path, cert_chain: Sequence[bytes], roots_pem: bytes) -> Chain:
        folder.mkdir()
        leaf, *above = [x509.load_der_x509_certificate(der) for der in cert_chain]
        (folder / "leaf.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
        (folder / "above.pem").write_bytes(
            b"".join(one.public_bytes(Encoding.PEM) for one in above) + roots_pem
        )
        (folder / "roots.pem").write_bytes(roots_pem)
        return cls(folder, leaf)

    @property
    def serial(self) -> str:
        return f"{self.leaf.serial_number:040x}"

    def verdict(self, *crls: bytes, options: Sequence[str] = ("-crl_check",)) -> str:
        """ "" when OpenSSL takes the certificate with these lists, else what it says."""
        file = self.folder / "crls.pem"
        file.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in parsed(crls)))
        roots, above = self.folder / "roots.pem", self.folder / "above.pem"
        done = openssl(
            *("verify", *options, "-CAfile", str(roots), "-untrusted", str(above)),
            *("-CRLfile", str(file), str(self.folder / "leaf.pem")),
        )
        return "" if done.returncode == 0 else done.stderr.decode() or "refused"


def public_settings(directory: Path, **tables: dict[str, Any]) -> Settings:
    """Settings of a broker whose certificates say where its lists are."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    revocation = {"public_url": f"http://{address}", **tables.pop("revocation", {})}
    server = {"http_address": address, **tables.pop("server", {})}
    return settings_in(directory, server=server, revocation=revocation, **tables)


async def fetched(url: str, **headers: str) -> httpx.Response:
    """What is at an address, on a connection of its own."""
    async with httpx.AsyncClient() as client:
        return await client.get(url, headers=headers)


def below_a_file(folder: Path) -> dict[str, Any]:
    """Tables of settings: an authority above ours, whose key is a file."""
    key = signing_key(nth=55)
    now = datetime.now(UTC)
    root = foreign_ca(
        "Acme Root", key, not_before=now - timedelta(days=1), not_after=now + timedelta(days=90)
    )
    folder.mkdir()
    (folder / "root.pem").write_bytes(pem(root))
    write_private(folder / "root.key", key_pem(key))
    files = {"cert_file": str(folder / "root.pem"), "key_file": str(folder / "root.key")}
    return {"ca": {"key_manager": "memory", "upstream": "disk", "disk": files}}
