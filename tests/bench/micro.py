"""The parts of one credential, alone and in this process: microseconds of CPU.

- The raw ceiling: what no issuer that uses this library can avoid, on one core: parse the CSR,
  verify its signature, sign as many bytes as a certificate has.
- CPU time of the whole process, not wall time: the ledger's thread counts, a busy neighbour
  does not.
"""

from __future__ import annotations

import asyncio
import io
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from bench import bench_rpc_pipeline
from bench.contenders import BATCH, CSRS, csrs
from identity_broker.config.settings import LogLevel
from identity_broker.domain.clock import SystemClock
from identity_broker.domain.credential import (
    CredentialIntent,
    CredentialKind,
    CredentialOutcome,
)
from identity_broker.store import Store
from identity_broker.telemetry import logs
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.backends.selfsigned import SelfSignedUpstream
from identity_ca.csr import parse_csr
from identity_ca.issuer import PreparedX509, X509Issuer
from identity_ca.jwt import JwtIssuer, PreparedJwt
from identity_ca.keys import KeyAlgorithm
from identity_ca.lint import Expectations, IssuerFacts, lint_tbs
from identity_ca.profile import WORKLOAD
from identity_ca.spiffe_id import SpiffeId, TrustDomain

_DOMAIN = TrustDomain("example.org")
_ID = SpiffeId.parse("spiffe://example.org/bench/0")
_TTL = timedelta(hours=1)
_TBS_BYTES = 480  # an X.509-SVID of ours
_SHA256 = ec.ECDSA(hashes.SHA256())


class Ceiling:
    """CSR parse and verify, and a raw signature, with the library alone."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._tbs = bytes(_TBS_BYTES)

    def run(self, seconds: float) -> tuple[float, float]:
        """Operations a second of wall time, and CPU microseconds of one."""
        load, sign, tbs = x509.load_der_x509_csr, self._key.sign, self._tbs
        requests = csrs()
        count = 0
        cpu = time.process_time()
        began = now = time.perf_counter()
        while now < began + seconds:
            for der in requests:
                request = load(der)
                request.public_key()
                if not request.is_signature_valid:
                    raise AssertionError("a CSR of ours does not verify")
                sign(tbs, _SHA256)
            count += len(requests)
            now = time.perf_counter()
        return count / (now - began), (time.process_time() - cpu) / count * 1e6


@dataclass(frozen=True)
class Part:
    """One line of the table."""

    name: str
    microseconds: float
    low: float
    high: float


def measure(directory: Path, *, rounds: int, calls: int) -> list[Part]:
    """Every part, in interleaved rounds of `calls` each."""
    parts = _parts()
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            taken[name].append(part(calls))
    taken |= asyncio.run(_ledger(directory, rounds, max(50, calls // 4)))
    return [
        Part(name, statistics.median(values), min(values), max(values))
        for name, values in taken.items()
    ]


def _timed(count: int, work: Callable[[int], object]) -> float:
    began = time.process_time()
    for at in range(count):
        work(at)
    return (time.process_time() - began) / count * 1e6


def _parts() -> dict[str, Callable[[int], float]]:
    keys = MemoryKeyManager()
    now = datetime.now(UTC)
    key = keys.create("x509", KeyAlgorithm.EC_P256)
    signed = SelfSignedUpstream().certify(key, trust_domain=_DOMAIN, ttl=timedelta(days=7), now=now)
    issuer = X509Issuer(authority_id="a", trust_domain=_DOMAIN, key=key, chain=signed.chain)
    jwt_key = keys.create("jwt", KeyAlgorithm.EC_P256)
    tokens = JwtIssuer(
        authority_id="b", trust_domain=_DOMAIN, key=jwt_key, not_after=now + timedelta(days=7)
    )
    requests, raw_key, raw_tbs = csrs(), ec.generate_private_key(ec.SECP256R1()), bytes(_TBS_BYTES)
    allowed = WORKLOAD.key_algorithms

    def prepared(at: int) -> PreparedX509:
        return issuer.prepare(
            csr=requests[at % CSRS], spiffe_id=_ID, profile=WORKLOAD, ttl=_TTL, now=now
        )

    def prepared_token(_at: int) -> PreparedJwt:
        return tokens.prepare(
            spiffe_id=_ID, audiences=("bench",), ttl=timedelta(minutes=5), now=now
        )

    def raw_verify(at: int) -> None:
        request = x509.load_der_x509_csr(requests[at % CSRS])
        request.public_key()
        assert request.is_signature_valid

    def ready_to_sign(count: int) -> float:
        ready = [prepared(at) for at in range(count)]
        return _timed(count, lambda at: issuer.sign(ready[at]))

    def ready_tokens(count: int) -> float:
        ready = [prepared_token(at) for at in range(count)]
        return _timed(count, lambda at: tokens.sign(ready[at]))

    def lint(count: int) -> float:
        one = prepared(0)
        expected = _expectations(issuer, one, requests[0])
        return _timed(count, lambda _: lint_tbs(one.tbs, WORKLOAD, expected))

    return {
        "raw: parse CSR and verify": lambda count: _timed(count, raw_verify),
        "raw: sign": lambda count: _timed(count, lambda _: raw_key.sign(raw_tbs, _SHA256)),
        "X.509 prepare (CSR, encode, lint)": lambda count: _timed(count, prepared),
        "  of it: CSR": lambda count: _timed(
            count, lambda at: parse_csr(requests[at % CSRS], allowed=allowed)
        ),
        "  of it: lint": lint,
        "X.509 sign": ready_to_sign,
        "JWT prepare": lambda count: _timed(count, prepared_token),
        "JWT sign": ready_tokens,
    }


def _expectations(issuer: X509Issuer, one: PreparedX509, csr: bytes) -> Expectations:
    facts: IssuerFacts = issuer._facts
    dns = one.spiffe_id.dns_san()
    return Expectations(
        issuer=facts,
        spiffe_id=one.spiffe_id,
        spki=parse_csr(csr, allowed=WORKLOAD.key_algorithms).spki_der,
        not_before=one.not_before,
        not_after=one.not_after,
        dns_names=() if dns is None else (dns,),
    )


async def _ledger(directory: Path, rounds: int, calls: int) -> dict[str, list[float]]:
    """Intend and conclude, durably, on SQLite; outcomes are flushed within the time."""
    directory.mkdir(mode=0o700, parents=True)
    store = Store(f"sqlite:///{directory / 'ledger.db'}", clock=SystemClock())
    await store.migrate()
    number = 0

    def some(count: int) -> list[CredentialIntent]:
        nonlocal number
        now = datetime.now(UTC)
        made = []
        for _ in range(count):
            number += 1
            made.append(
                CredentialIntent(
                    id=f"{number:040x}",
                    kind=CredentialKind.X509,
                    spiffe_id=_ID,
                    entry_id="e" * 26,
                    entry_revision=1,
                    node_id=_ID,
                    authority_id="a" * 40,
                    key_fingerprint="f" * 64,
                    tbs_digest="d" * 64,
                    not_before=now,
                    not_after=now + _TTL,
                    recorded_at=now,
                    correlation_id="c" * 16,
                )
            )
        return made

    async def recorded(groups: Sequence[list[CredentialIntent]], at_once: int) -> float:
        ledger = store.ledger
        began = time.process_time()

        async def one(group: list[CredentialIntent]) -> None:
            await ledger.intend(group)
            ledger.conclude([CredentialOutcome(i.id, "d" * 64, i.recorded_at, "") for i in group])

        for at in range(0, len(groups), at_once):
            await asyncio.gather(*(one(group) for group in groups[at : at + at_once]))
        await ledger.flush()
        return (time.process_time() - began) / sum(map(len, groups)) * 1e6

    measured: dict[str, Callable[[], Awaitable[float]]] = {
        "ledger: 1 caller, 1 row": lambda: recorded([some(1) for _ in range(calls)], 1),
        "ledger: 32 callers, 1 row each": lambda: recorded([some(1) for _ in range(calls)], 32),
        f"ledger: 1 caller, {BATCH} rows": lambda: recorded([some(BATCH) for _ in range(10)], 1),
    }
    taken: dict[str, list[float]] = {name: [] for name in measured}
    try:
        for _ in range(rounds):
            for name, work in measured.items():
                taken[name].append(await work())
    finally:
        await store.close()
    return taken


def pipeline(rounds: int) -> dict[str, float]:
    """A unary echo over mTLS, bare and through the pipeline: CPU of client and server together."""
    logs.configure(LogLevel.WARNING, stream=io.StringIO())
    bench_rpc_pipeline.ROUNDS = rounds
    return asyncio.run(bench_rpc_pipeline.pipeline())
