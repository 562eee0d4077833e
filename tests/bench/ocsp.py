"""OCSP answers a second: the broker's beside OpenBao's, asked by one client in the same run.

- Both answer POSTs about 256 certificates of their own over keep-alive connections, from one
  process each; rounds are interleaved, each at the concurrency that suits the server.
- The broker is asked twice over: without a nonce, when it may keep its answers, and with one, when
  every answer is signed anew. OpenBao signs every answer anew and sends no nonce back.
- OpenBao keeps its data in memory, which is the faster of its storages.
- Answers are verified in full, off the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from bench.columns import columns, median
from bench.contenders import CSRS, ISSUE_X509, csrs
from bench.generator import Http1Wire, Http2Wire, ask, closed_loop, unchunked
from bench.servers import (
    SERVER_NAME,
    BrokerUnderTest,
    OpenBaoUnderTest,
    broker,
    openbao,
)
from identity_api.broker.v1 import svid_pb2
from identity_ca.backends.vault.provision import admin_client
from identity_ca.ocsp import CertStatus
from identity_ca.ocsp_check import build_request, check_answer

NAME = "ocsp"
KEPT, NONCE, PEER = "broker, kept", "broker, with nonce", "OpenBao pki/ocsp"
_LEVELS = (4, 16, 32, 64)
_NONCE = b"n" * 32


@dataclass(frozen=True)
class OcspRound:
    """One contender, one round; `cpu_us` is the server's for one answer."""

    per_second: float
    cpu_us: float


@dataclass
class OcspResults:
    """What was found out: rounds and the best concurrency, by contender."""

    rounds: dict[str, list[OcspRound]] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)
    octets: dict[str, int] = field(default_factory=dict)
    verified: int = 0

    def to_json(self) -> dict[str, Any]:
        """For the file of all figures."""
        return asdict(self)

    def per_second(self, name: str) -> float:
        """The median of a contender's rounds."""
        return median(each.per_second for each in self.rounds[name])

    def table(self) -> str:
        """A row for each contender."""
        peer = self.per_second(PEER)
        rows = [
            [
                name,
                str(self.best[name]),
                f"{self.per_second(name):,.0f}",
                f"{median(each.cpu_us for each in rounds):,.0f}",
                f"{self.octets[name]:,}",
                f"{self.per_second(name) / peer:.2f}",
            ]
            for name, rounds in self.rounds.items()
        ]
        head = ["OCSP", "at once", "answers/s", "CPU µs each", "octets", "× OpenBao"]
        return columns(head, rows)


@dataclass(frozen=True)
class _Contender:
    pid: int
    address: str
    requests: Sequence[bytes]
    verify: Callable[[int, bytes], None]


def measure(
    directory: Path,
    *,
    rounds: int = 5,
    seconds: float = 3.0,
    warm_up: float = 0.3,
    probe_seconds: float = 0.7,
    say: Callable[[str], None] = print,
) -> OcspResults:
    """Start both servers, have them issue, and ask; interleaved.

    Args:
        probe_seconds: for finding each one's concurrency; 0 takes 16.
    """
    results = OcspResults()
    with ExitStack() as resources:
        say("OCSP: starting the broker and OpenBao")
        ours = resources.enter_context(broker(directory / "ocsp-broker"))
        theirs = resources.enter_context(openbao(directory / "ocsp-openbao", in_memory=True))
        contenders = {**_broker_contenders(ours), PEER: _openbao_contender(theirs)}
        for name, contender in contenders.items():
            body = ask(Http1Wire(contender.address, contender.requests))
            contender.verify(0, body)
            results.octets[name] = len(unchunked(body))
            results.best[name] = 16
            if probe_seconds:
                say(f"{name}: which concurrency")
                found = {
                    level: _round(contender, level, probe_seconds, warm_up, results).per_second
                    for level in _LEVELS
                }
                results.best[name] = max(found, key=found.__getitem__)
        for number in range(rounds):
            say(f"OCSP: round {number + 1} of {rounds}")
            names = list(contenders)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                done = _round(contenders[name], results.best[name], seconds, warm_up, results)
                results.rounds.setdefault(name, []).append(done)
    results.rounds = {name: results.rounds[name] for name in contenders}
    return results


def _round(
    contender: _Contender, level: int, seconds: float, warm_up: float, results: OcspResults
) -> OcspRound:
    process = psutil.Process(contender.pid)
    cpu: list[float] = []

    def edge() -> None:
        times = process.cpu_times()
        cpu.append(times.user + times.system)

    outcome = closed_loop(
        lambda: [Http1Wire(contender.address, contender.requests) for _ in range(level)],
        requests=len(contender.requests),
        concurrency=level,
        seconds=seconds,
        warm_up=warm_up,
        smallest=200,  # a refusal has five octets
        on_edge=edge,
    )
    for request, body in outcome.kept[:3]:
        contender.verify(request, body)
        results.verified += 1
    used = (cpu[1] - cpu[0]) / outcome.calls * 1e6 if outcome.calls else 0.0
    return OcspRound(outcome.calls / outcome.seconds, used)


def _broker_contenders(subject: BrokerUnderTest) -> dict[str, _Contender]:
    many = len(subject.entry_ids)
    request = svid_pb2.BatchIssueX509Request(
        items=[
            svid_pb2.BatchIssueX509Request.Item(
                entry_id=subject.entry_ids[at % many], csr=csrs()[at]
            )
            for at in range(CSRS)
        ]
    )
    wire = Http2Wire(
        subject.addresses.address,
        subject.tls,
        SERVER_NAME,
        ISSUE_X509,
        [request.SerializeToString()],
    )
    response = svid_pb2.BatchIssueX509Response.FromString(ask(wire))
    chains = [
        [x509.load_der_x509_certificate(der) for der in result.svid.cert_chain]
        for result in response.results
    ]
    roots = [x509.load_der_x509_certificate(der) for der in subject.bundle.x509_authorities]
    leaves = [chain[0] for chain in chains]
    issuer = next(each for each in [*chains[0][1:], *roots] if each.subject == leaves[0].issuer)
    address = subject.addresses.http_address
    return {
        KEPT: _contender(subject.pid, address, "/ocsp", leaves, issuer),
        NONCE: _contender(subject.pid, address, "/ocsp", leaves, issuer, nonce=True),
    }


def _openbao_contender(server: OpenBaoUnderTest) -> _Contender:
    client = admin_client(f"http://{server.address}", server.token)
    leaves = []
    for csr in csrs():
        pem = x509.load_der_x509_csr(csr).public_bytes(Encoding.PEM).decode()
        signed: Any = client.write_data("pki/sign/stored", data={"csr": pem, "ttl": "1h"})
        leaves.append(x509.load_pem_x509_certificate(signed["data"]["certificate"].encode()))
    client.adapter.close()
    return _contender(server.pid, server.address, "/v1/pki/ocsp", leaves, server.ca)


def _contender(
    pid: int,
    address: str,
    path: str,
    leaves: Sequence[x509.Certificate],
    issuer: x509.Certificate,
    *,
    nonce: bool = False,
) -> _Contender:
    def posted(leaf: x509.Certificate) -> bytes:
        body = _with_nonce(leaf, issuer) if nonce else build_request(leaf, issuer)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {address}\r\n"
            f"Content-Type: application/ocsp-request\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def verify(request: int, body: bytes) -> None:
        der = unchunked(body)
        checked = check_answer(der, leaf=leaves[request], issuer=issuer, now=datetime.now(UTC))
        assert checked.status is CertStatus.GOOD
        sent_back = [each.value for each in ocsp.load_der_ocsp_response(der).extensions]
        assert sent_back == ([x509.OCSPNonce(_NONCE)] if nonce else [])

    return _Contender(pid, address, [posted(leaf) for leaf in leaves], verify)


def _with_nonce(leaf: x509.Certificate, issuer: x509.Certificate) -> bytes:
    return (
        ocsp.OCSPRequestBuilder()
        .add_certificate(leaf, issuer, hashes.SHA1())
        .add_extension(x509.OCSPNonce(_NONCE), critical=False)
        .build()
        .public_bytes(Encoding.DER)
    )
