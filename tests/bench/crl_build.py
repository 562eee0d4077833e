"""What revocation lists cost: to make one of each kind, and to revoke one certificate more.

- In this process and on one core; entries, encoder and signature are those of the broker.
- CPU time of the whole process: hashing runs in it as well.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psutil

from identity_broker.domain.credential import CredentialKind, Revocation, RevocationReason
from identity_broker.lifecycle.crl.entries import RevokedEntries
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.backends.selfsigned import SelfSignedUpstream
from identity_ca.crl import sign_crl
from identity_ca.distribution import DistributionPoints, Shard
from identity_ca.issuer import X509Issuer
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain

SIZES = (1_000, 100_000, 1_000_000)
_DOMAIN = TrustDomain("example.org")
_OWNER = SpiffeId.parse("spiffe://example.org/bench/0")
_SHARDS = 64
_POINTS = DistributionPoints("http://idb.example.org:8082", _SHARDS)
_HOUR = timedelta(hours=1)
_CHUNK = 10_000


@dataclass(frozen=True)
class ListCost:
    """One row: a list of `entries`.

    Attributes:
        octets: of the full list, and `shard_octets` of one part.
        resident_octets: memory the broker needs for one entry, lists in force not counted.
        full_ms, shard_ms, delta_ms: CPU time to make one list; the delta has 100 changes.
        revoke_us: CPU time for one revocation more to stand in the entries.
        news_ms: the same, and the delta that carries it, signed.
    """

    entries: int
    octets: int
    shard_octets: int
    resident_octets: float
    full_ms: float
    shard_ms: float
    delta_ms: float
    revoke_us: float
    news_ms: float


def measure(size: int, rounds: int = 7) -> ListCost:
    """Make lists of `size` entries."""
    issuer = _issuer()
    now = datetime.now(UTC)
    entries = RevokedEntries(_SHARDS)
    process = psutil.Process()
    before = process.memory_info().rss
    for chunk in _chunks(size, now):
        entries.put(chunk)
    entries.forget_changes()
    resident = process.memory_info().rss - before
    base = entries.position
    shard = Shard(5, _SHARDS)

    def signed(pieces: list[bytes], **kind: object) -> bytes:
        return sign_crl(
            issuer=issuer,
            encoded_entries=pieces,
            number=int(time.time() * 1000),
            this_update=now,
            next_update=now + _HOUR,
            **kind,  # type: ignore[arg-type]
        )

    def full() -> bytes:
        return signed(entries.full(), delta_url=_POINTS.delta_url("a"))

    def part() -> bytes:
        return signed(entries.part(shard)[0], scope_url=_POINTS.shard_url("a", shard))

    def delta() -> bytes:
        return signed(entries.changes_since(base) or [], base_number=1)

    more = iter([_revocation(now) for _ in range(102 * rounds + 100)])

    def revoke() -> None:
        entries.put([next(more)])

    def news() -> None:
        revoke()
        delta()

    for _ in range(100):
        revoke()
    return ListCost(
        entries=size,
        octets=len(full()),
        shard_octets=len(part()),
        resident_octets=resident / size,
        full_ms=_milliseconds(full, rounds),
        shard_ms=_milliseconds(part, rounds),
        delta_ms=_milliseconds(delta, rounds),
        revoke_us=_milliseconds(revoke, 100 * rounds) * 1000,
        news_ms=_milliseconds(news, rounds),
    )


def rows(sizes: tuple[int, ...] = SIZES) -> list[ListCost]:
    """One row for each size."""
    return [measure(size) for size in sizes]


def _milliseconds(work: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken) * 1000


def _issuer() -> X509Issuer:
    now = datetime.now(UTC)
    key = MemoryKeyManager().create("x509", KeyAlgorithm.EC_P256)
    signed = SelfSignedUpstream().certify(key, trust_domain=_DOMAIN, ttl=timedelta(days=7), now=now)
    return X509Issuer(authority_id="a", trust_domain=_DOMAIN, key=key, chain=signed.chain)


def _chunks(size: int, now: datetime) -> Iterator[list[Revocation]]:
    for at in range(0, size, _CHUNK):
        yield [_revocation(now) for _ in range(min(_CHUNK, size - at))]


def _revocation(now: datetime) -> Revocation:
    return Revocation(
        id=f"32{os.urandom(19).hex()}",
        kind=CredentialKind.X509,
        spiffe_id=_OWNER,
        revoked_at=now,
        expires_at=now + _HOUR,
        reason=RevocationReason.KEY_COMPROMISE,
    )


def main() -> None:
    """Print the rows."""
    for row in rows():
        print(row)


if __name__ == "__main__":
    main()
