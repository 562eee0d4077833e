"""OCSP as others ask: OpenSSL, GET and POST over HTTP, caches, and whoever sends rubbish."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from random import Random
from urllib.parse import quote

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from identity_broker.domain.credential import RevocationReason
from identity_ca.ocsp import MAX_REQUEST_OCTETS, CertStatus, ResponseStatus, refusal
from identity_ca.ocsp_check import build_request, check_answer
from identity_ca.serial import new_serial
from support.line import AttestedClient, RunningBroker

STOLEN = RevocationReason.KEY_COMPROMISE
POSTED = {"content-type": "application/ocsp-request"}


@dataclass
class Site:
    """A broker, certificates of it, and files for OpenSSL."""

    broker: RunningBroker
    node: AttestedClient
    entry_id: str
    folder: Path
    client: httpx.AsyncClient
    issuer: x509.Certificate
    leaves: dict[str, x509.Certificate] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.broker.addresses.http_address}/ocsp"

    async def issue(self, name: str) -> x509.Certificate:
        chain = list((await self.node.issue(self.entry_id)).svid.cert_chain)
        leaf = self.leaves[name] = x509.load_der_x509_certificate(chain[0])
        (self.folder / f"{name}.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
        return leaf

    async def revoke(self, name: str) -> None:
        serial = f"{self.leaves[name].serial_number:040x}"
        await self.broker.revoke(id=serial, reason=int(STOLEN))

    async def openssl(self, *arguments: str | Path) -> tuple[int, str]:
        """`openssl ocsp` with our trust; exit code and what it said."""
        program = shutil.which("openssl")
        assert program
        process = await asyncio.create_subprocess_exec(
            *(program, "ocsp", "-url", self.url, "-CAfile", self.folder / "roots.pem"),
            *("-issuer", self.folder / "issuer.pem", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()

    async def post(self, body: bytes) -> httpx.Response:
        return await self.client.post("/ocsp", content=body, headers=POSTED)

    async def get(self, body: bytes, **headers: str) -> httpx.Response:
        encoded = quote(base64.b64encode(body).decode(), safe="")
        return await self.client.get(f"/ocsp/{encoded}", headers=headers)


@pytest.fixture
async def site(broker: RunningBroker, tmp_path: Path) -> AsyncIterator[Site]:
    folder = tmp_path / "openssl"
    folder.mkdir()
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    roots = x509.load_pem_x509_certificates(broker.bundle_pem)
    chain = [x509.load_der_x509_certificate(each) for each in node.svid.cert_chain]
    issuer = next(each for each in [*chain[1:], *roots] if each.subject == chain[0].issuer)
    (folder / "roots.pem").write_bytes(broker.bundle_pem)
    (folder / "issuer.pem").write_bytes(issuer.public_bytes(Encoding.PEM))
    base_url = f"http://{broker.addresses.http_address}"
    async with httpx.AsyncClient(base_url=base_url, timeout=20) as client:
        yield Site(broker, node, entry.id, folder, client, issuer)


async def test_openssl_is_told_good_revoked_and_unknown(site: Site) -> None:
    await site.issue("kept")
    await site.issue("ended")
    await site.revoke("ended")
    serial = new_serial(datetime.now(UTC))
    certificates = ("-cert", site.folder / "kept.pem", "-cert", site.folder / "ended.pem")
    for digest in ("-sha1", "-sha256"):
        for nonce in ("-nonce", "-no_nonce"):
            code, said = await site.openssl(
                nonce, digest, *certificates, digest, "-serial", f"0x{serial:040x}"
            )
            assert code == 0, said
            assert "Response verify OK" in said
            assert "WARNING" not in said
            assert "kept.pem: good" in said
            assert "ended.pem: revoked" in said
            assert "Reason: keyCompromise" in said
            assert f"0x{serial:040x}: unknown" in said


async def test_a_revocation_is_answered_as_soon_as_the_command_returned(site: Site) -> None:
    leaf = await site.issue("web")
    request = build_request(leaf, site.issuer)

    async def status() -> CertStatus:
        answers = await asyncio.gather(site.post(request), site.get(request))
        checked = [
            check_answer(each.content, leaf=leaf, issuer=site.issuer, now=datetime.now(UTC))
            for each in answers
        ]
        assert checked[0].status is checked[1].status
        return checked[0].status

    assert await status() is CertStatus.GOOD
    await site.revoke("web")
    assert await status() is CertStatus.REVOKED


async def test_headers_for_caches(site: Site) -> None:
    leaf = await site.issue("web")
    request = build_request(leaf, site.issuer)
    answer = await site.get(request)
    read = ocsp.load_der_ocsp_response(answer.content)
    headers = answer.headers
    assert (answer.status_code, headers["content-type"]) == (200, "application/ocsp-response")
    assert parsedate_to_datetime(headers["last-modified"]) == read.this_update_utc
    assert parsedate_to_datetime(headers["expires"]) == read.next_update_utc
    kind, age = headers["cache-control"].split(",")[0].split("=")
    assert kind == "max-age"
    # Until we make a new one: at half of its ten minutes.
    assert 280 < int(age) <= 300
    assert "must-revalidate" in headers["cache-control"]
    again = await site.get(request, **{"if-none-match": f'"other", {headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == headers["etag"]
    await site.revoke("web")
    after = await site.get(request, **{"if-none-match": headers["etag"]})
    assert after.status_code == 200
    assert after.headers["etag"] != headers["etag"]

    # What is not to be kept: what was asked with a nonce, by POST, unknown, and refusals.
    with_nonce = (
        ocsp.OCSPRequestBuilder()
        .add_certificate(leaf, site.issuer, hashes.SHA256())
        .add_extension(x509.OCSPNonce(os.urandom(32)), critical=False)
        .build()
        .public_bytes(Encoding.DER)
    )
    unknown = (
        ocsp.OCSPRequestBuilder()
        .add_certificate_by_hash(b"n" * 20, b"k" * 20, 7, hashes.SHA1())
        .build()
        .public_bytes(Encoding.DER)
    )
    for one in (
        await site.get(with_nonce),
        await site.post(request),
        await site.get(unknown),
        await site.get(b"rubbish"),
        await site.client.get("/ocsp/not%20base64"),
    ):
        assert (one.status_code, one.headers["cache-control"]) == (200, "no-store")
        assert one.headers["content-type"] == "application/ocsp-response"


async def test_a_path_that_was_not_escaped(site: Site) -> None:
    """Many clients leave the slashes of base64 as they are."""
    leaf = await site.issue("web")
    encoded = base64.b64encode(build_request(leaf, site.issuer)).decode()
    answer = await site.client.get(f"/ocsp/{quote(encoded, safe='/+=')}")
    check_answer(answer.content, leaf=leaf, issuer=site.issuer, now=datetime.now(UTC))


async def test_what_is_no_ocsp_request(site: Site) -> None:
    good = build_request(await site.issue("web"), site.issuer)
    for body, headers, status in (
        (good, {"content-type": "text/plain"}, 415),
        (good, {}, 415),
        (b"\x30" * (MAX_REQUEST_OCTETS + 1), POSTED, 413),
        (good, {"content-type": "application/ocsp-request; x=y"}, 200),
    ):
        answer = await site.client.post("/ocsp", content=body, headers=headers)
        assert answer.status_code == status
    assert (await site.client.get("/ocsp")).status_code == 405
    assert (await site.client.put("/ocsp", content=good, headers=POSTED)).status_code == 405
    answer = await site.post(b"\x30" * MAX_REQUEST_OCTETS)
    assert answer.content == refusal(ResponseStatus.MALFORMED_REQUEST)
    metrics = (await site.client.get("/metrics")).text
    assert 'idb_ocsp_total{outcome="good"} 1.0' in metrics
    assert 'idb_ocsp_total{outcome="malformed_request"} 1.0' in metrics


async def test_rubbish_is_refused_and_costs_nobody_else(site: Site) -> None:
    """Mutated requests and 64 KiB of anything: never a server error, and never a long wait."""
    good = build_request(await site.issue("web"), site.issuer)
    draw = Random(7)
    bodies = [draw.randbytes(MAX_REQUEST_OCTETS) for _ in range(5)]
    for _ in range(300):
        body = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(body))
            what = draw.randrange(3)
            if what == 0:
                body[at] ^= 1 << draw.randrange(8)
            elif what == 1:
                del body[at : at + draw.randint(1, 8)]
            else:
                body[at:at] = draw.randbytes(draw.randint(1, 8))
        bodies.append(bytes(body))
    many = asyncio.Semaphore(20)

    async def send(number: int, body: bytes) -> float:
        async with many:
            started = time.perf_counter()
            answer = await (site.post(body) if number % 2 or len(body) > 2000 else site.get(body))
            assert answer.status_code == 200
            ocsp.load_der_ocsp_response(answer.content)
            return time.perf_counter() - started

    took = await asyncio.gather(*(send(number, body) for number, body in enumerate(bodies)))
    assert max(took) < 5
    assert (await site.get(good)).status_code == 200


async def test_a_body_that_does_not_come(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from identity_broker.server.http import ocsp as http_ocsp

    monkeypatch.setattr(http_ocsp, "_BODY_SECONDS", 0.3)
    host, _, port = site.broker.addresses.http_address.rpartition(":")

    def slowly() -> bytes:
        with socket.create_connection((host, int(port)), 10) as slow:
            slow.sendall(
                b"POST /ocsp HTTP/1.1\r\nhost: x\r\ncontent-type: application/ocsp-request\r\n"
                b"content-length: 100\r\n\r\n\x30"
            )
            return slow.recv(4096)

    assert (await asyncio.to_thread(slowly)).startswith(b"HTTP/1.1 408")
