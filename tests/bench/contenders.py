"""Who is measured: the requests each is sent, and how what it answers is verified.

- All are sent the same CSRs (P-256, distinct keys) for the same SPIFFE IDs.
- Validation is complete and happens off the clock: issuer's signature, the CSR's key, the SPIFFE
  ID; a token's signature, subject and audience.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_health.v1 import health_pb2

from bench.generator import Http1Wire, Http2Wire, Wire, ask, unchunked
from bench.servers import (
    CFSSL_MISSING,
    SERVER_NAME,
    BrokerUnderTest,
    CfsslUnderTest,
    OpenBaoUnderTest,
    broker,
    cfssl,
    is_stored,
    openbao,
)
from identity_api.broker.v1 import svid_pb2
from identity_ca.chain import verify_x509_svid
from identity_ca.jwt import verify_jwt_svid
from support.line import TRUST_DOMAIN, csr_for, new_key

CSRS = 256
BATCH = 100
CONNECTIONS = 4
AUDIENCE = "bench"

ISSUE_X509 = "/identity_api.broker.v1.Svid/BatchIssueX509"
ISSUE_JWT = "/identity_api.broker.v1.Svid/BatchIssueJwt"
HEALTH = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True)
class Contender:
    """Something that answers requests.

    Attributes:
        title: as the table has it.
        per_call: credentials in one answer; 0 for a method that issues none.
        pid: of the process that does the work.
        levels: concurrencies of which the best is used.
        wires: opens the connections for a concurrency; for an open loop, for as much as may come.
        verify: raises when an answer is not what was asked for.
        smallest: bytes below which an answer must be a refusal.
    """

    name: str
    title: str
    per_call: int
    pid: int
    levels: tuple[int, ...]
    wires: Callable[[int], Sequence[Wire]]
    requests: int
    verify: Callable[[int, bytes], None]
    smallest: int = 0


ANY_CONCURRENCY = 128


@dataclass
class LineUp:
    """All that take part, and who could not."""

    contenders: list[Contender]
    missing: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    broker: BrokerUnderTest | None = None


@cache
def csrs() -> tuple[bytes, ...]:
    """DER; each of a key of its own."""
    return tuple(csr_for(new_key()) for _ in range(CSRS))


_OURS = ("x509 single", "x509 batch", "jwt single", "jwt batch", "no-op")
NAMES = (
    *_OURS,
    *("openbao disk stored", "openbao disk unstored"),
    *("openbao memory stored", "openbao memory unstored"),
    "cfssl",
)


def line_up(directory: Path, resources: ExitStack, wanted: Sequence[str]) -> LineUp:
    """Start every server that is wanted; `resources` stops them."""
    found = LineUp([])
    if any(name in wanted for name in _OURS):
        found.broker = subject = resources.enter_context(broker(directory / "broker"))
        found.contenders += _broker_contenders(subject)
    for storage in ("disk", "memory"):
        if any(name.startswith(f"openbao {storage}") for name in wanted):
            server = resources.enter_context(
                openbao(directory / f"openbao-{storage}", in_memory=storage == "memory")
            )
            found.versions["OpenBao"] = server.version
            found.contenders += [_openbao_contender(server, storage, r) for r in _ROLES]
    if "cfssl" in wanted:
        peer = resources.enter_context(cfssl(directory / "cfssl"))
        if peer is None:
            found.missing["cfssl"] = CFSSL_MISSING
        else:
            found.versions["cfssl"] = peer.version
            found.contenders.append(_cfssl_contender(peer))
    found.contenders = [_probed(each) for each in found.contenders if each.name in wanted]
    return found


def _probed(contender: Contender) -> Contender:
    """Ask once, verify the answer, and learn how long a good one is."""
    body = ask(contender.wires(1)[0])
    contender.verify(0, body)
    values = {**vars(contender), "smallest": int(len(body) * 0.9)}
    return Contender(**values)


# --- the broker -----------------------------------------------------------------------------------


def _broker_contenders(subject: BrokerUnderTest) -> list[Contender]:
    many = len(subject.entry_ids)

    def x509_request(first: int, size: int) -> bytes:
        return svid_pb2.BatchIssueX509Request(
            items=[
                svid_pb2.BatchIssueX509Request.Item(
                    entry_id=subject.entry_ids[at % many], csr=csrs()[at % CSRS]
                )
                for at in range(first, first + size)
            ]
        ).SerializeToString()

    def jwt_request(first: int, size: int) -> bytes:
        return svid_pb2.BatchIssueJwtRequest(
            items=[
                svid_pb2.BatchIssueJwtRequest.Item(
                    entry_id=subject.entry_ids[at % many], audiences=[AUDIENCE]
                )
                for at in range(first, first + size)
            ]
        ).SerializeToString()

    def verify_x509(size: int) -> Callable[[int, bytes], None]:
        def verify(request: int, body: bytes) -> None:
            response = svid_pb2.BatchIssueX509Response.FromString(body)
            assert len(response.results) == size
            for at, result in enumerate(response.results, request * size):
                assert result.status.code == 0, result.status
                proven = verify_x509_svid(
                    tuple(result.svid.cert_chain), bundle=subject.bundle, now=datetime.now(UTC)
                )
                assert str(proven.spiffe_id) == subject.spiffe_ids[at % many]
                leaf = x509.load_der_x509_certificate(result.svid.cert_chain[0])
                assert _has_key_of(leaf, csrs()[at % CSRS])

        return verify

    def verify_jwt(size: int) -> Callable[[int, bytes], None]:
        def verify(request: int, body: bytes) -> None:
            response = svid_pb2.BatchIssueJwtResponse.FromString(body)
            assert len(response.results) == size
            for at, result in enumerate(response.results, request * size):
                assert result.status.code == 0, result.status
                proven = verify_jwt_svid(
                    result.svid.token,
                    bundle=subject.bundle,
                    audience=AUDIENCE,
                    now=datetime.now(UTC),
                )
                assert str(proven.spiffe_id) == subject.spiffe_ids[at % many]

        return verify

    def verify_health(request: int, body: bytes) -> None:
        status = health_pb2.HealthCheckResponse.FromString(body).status
        assert status == health_pb2.HealthCheckResponse.SERVING

    def contender(
        name: str,
        title: str,
        method: str,
        requests: Sequence[bytes],
        verify: Callable[[int, bytes], None],
        *,
        per_call: int,
        levels: tuple[int, ...],
    ) -> Contender:
        def wires(concurrency: int) -> Sequence[Wire]:
            return [
                Http2Wire(subject.addresses.address, subject.tls, SERVER_NAME, method, requests)
                for _ in range(min(concurrency, CONNECTIONS))
            ]

        return Contender(name, title, per_call, subject.pid, levels, wires, len(requests), verify)

    singles, batches = range(CSRS), range(0, 8 * BATCH, BATCH)
    return [
        contender(
            "x509 single", "broker, X.509, single calls", ISSUE_X509,
            [x509_request(at, 1) for at in singles], verify_x509(1),
            per_call=1, levels=(16, 32, 64),
        ),
        contender(
            "x509 batch", f"broker, X.509, batches of {BATCH}", ISSUE_X509,
            [x509_request(at, BATCH) for at in batches], verify_x509(BATCH),
            per_call=BATCH, levels=(2, 4, 8),
        ),
        contender(
            "jwt single", "broker, JWT, single calls", ISSUE_JWT,
            [jwt_request(at, 1) for at in singles], verify_jwt(1),
            per_call=1, levels=(16, 32, 64),
        ),
        contender(
            "jwt batch", f"broker, JWT, batches of {BATCH}", ISSUE_JWT,
            [jwt_request(at, BATCH) for at in batches], verify_jwt(BATCH),
            per_call=BATCH, levels=(2, 4, 8),
        ),
        contender(
            "no-op", "broker, health Check (issues nothing)", HEALTH,
            [health_pb2.HealthCheckRequest().SerializeToString()], verify_health,
            per_call=0, levels=(16, 32, 64),
        ),
    ]  # fmt: skip


def _has_key_of(leaf: x509.Certificate, csr: bytes) -> bool:
    asked = x509.load_der_x509_csr(csr).public_key()
    return leaf.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    ) == asked.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


# --- the peers ------------------------------------------------------------------------------------

_ROLES = ("stored", "unstored")


def _peer_id(at: int) -> str:
    return f"spiffe://{TRUST_DOMAIN}/bench/{at % 100}"


def _dns_name(at: int) -> str:
    """For cfssl: the one Debian packages knows no URI names."""
    return f"bench-{at % 100}.example.org"


def _csr_pem(at: int) -> str:
    return x509.load_der_x509_csr(csrs()[at]).public_bytes(Encoding.PEM).decode()


def _post(address: str, path: str, body: object, headers: str = "") -> bytes:
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address}\r\n{headers}"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def _verify_certificate(request: int, pem: str, ca: x509.Certificate) -> x509.Certificate:
    leaf = x509.load_pem_x509_certificate(pem.encode())
    leaf.verify_directly_issued_by(ca)
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert _has_key_of(leaf, csrs()[request])
    return leaf


def _names(leaf: x509.Certificate) -> x509.SubjectAlternativeName:
    return leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _http_contender(
    name: str,
    title: str,
    pid: int,
    address: str,
    requests: Sequence[bytes],
    verify: Callable[[int, bytes], None],
) -> Contender:
    def wires(concurrency: int) -> Sequence[Wire]:
        return [Http1Wire(address, requests) for _ in range(concurrency)]

    return Contender(name, title, 1, pid, (4, 16, 32, 64), wires, len(requests), verify)


def _openbao_contender(server: OpenBaoUnderTest, storage: str, role: str) -> Contender:
    requests = [
        _post(
            server.address,
            f"/v1/pki/sign/{role}",
            {"csr": _csr_pem(at), "uri_sans": _peer_id(at), "ttl": "1h"},
            f"X-Vault-Token: {server.token}\r\n",
        )
        for at in range(CSRS)
    ]

    def verify(request: int, body: bytes) -> None:
        data = json.loads(unchunked(body))["data"]
        leaf = _verify_certificate(request, data["certificate"], server.ca)
        uris = _names(leaf).get_values_for_type(x509.UniformResourceIdentifier)
        assert uris == [_peer_id(request)]
        assert is_stored(server, leaf.serial_number) == (role == "stored")

    return _http_contender(
        f"openbao {storage} {role}",
        f"OpenBao pki/sign, {storage}, {role}",
        server.pid,
        server.address,
        requests,
        verify,
    )


def _cfssl_contender(server: CfsslUnderTest) -> Contender:
    requests = [
        _post(
            server.address,
            "/api/v1/cfssl/sign",
            {"certificate_request": _csr_pem(at), "hosts": [_dns_name(at)]},
        )
        for at in range(CSRS)
    ]

    def verify(request: int, body: bytes) -> None:
        answer = json.loads(unchunked(body))
        assert answer["success"]
        leaf = _verify_certificate(request, answer["result"]["certificate"], server.ca)
        assert _names(leaf).get_values_for_type(x509.DNSName) == [_dns_name(request)]

    return _http_contender(
        "cfssl", "cfssl sign, nothing stored", server.pid, server.address, requests, verify
    )
