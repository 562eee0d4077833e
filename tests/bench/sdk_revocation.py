"""What revocation costs a verifier: the check of every call, and memory for all that is denied.

- The check is the whole of it, as handshakes, reads and calls make it: deny set, authorities,
  staleness, expiry. Beside it the same check where nothing is denied.
- Memory is of a process of its own, before and after it was told by the feed's own messages.

`python -m bench.sdk_revocation COUNT` is that process.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil

from bench.columns import columns
from identity_api.broker.v1 import credential_pb2
from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_client._wire.revocation_feed import message_from_wire
from identity_client.clock import utc_now
from identity_client.peer import Peer, check_current, peer_from_pem
from identity_client.revocation import DenySet
from identity_client.revocation_feed import FeedReader
from identity_client.testing import FakeTrustDomain

_MIB = 1024 * 1024
_MESSAGE = 1000
_CHECKS = 20_000
_ROUNDS = 7
_IDENTITIES = 1000
_HOUR = 3600


@dataclass(frozen=True)
class VerifierCost:
    """What it costs.

    Attributes:
        denied: serial numbers denied.
        check_us: microseconds of CPU for one call's check.
        check_empty_us: the same where nothing is denied.
        rss_mib: resident memory of the process once it was told.
        told_mib: by how much it grew.
        octets_each: that, for each denied serial number.
        told_ms: milliseconds of CPU to be told all of it.
        pruned_ms: milliseconds of CPU to look for what has expired, once a minute.
    """

    denied: int
    check_us: float
    check_empty_us: float
    rss_mib: float
    told_mib: float
    octets_each: float
    told_ms: float
    pruned_ms: float

    def table(self, most_us: float) -> str:
        """For people.

        Args:
            most_us: what the check may cost.
        """
        verdict = "holds" if self.check_us <= most_us else "DOES NOT HOLD"
        rows = [
            ["check of a call, µs CPU", f"{self.check_us:.2f}", f"≤ {most_us:g}", verdict],
            ["where nothing is denied, µs CPU", f"{self.check_empty_us:.2f}", "–", ""],
            ["memory of the process, MiB", f"{self.rss_mib:.1f}", "–", ""],
            ["of that for what is denied, MiB", f"{self.told_mib:.1f}", "–", ""],
            ["octets for each", f"{self.octets_each:.0f}", "–", ""],
            ["told all of it, ms CPU", f"{self.told_ms:.0f}", "–", ""],
            ["looked for what expired, ms CPU", f"{self.pruned_ms:.1f}", "–", ""],
        ]
        return columns((f"a verifier with {self.denied:,} denied", "", "bound", ""), rows)


def measure(denied: int) -> VerifierCost:
    """What `denied` denied serial numbers cost, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.sdk_revocation", str(denied)],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return VerifierCost(**json.loads(done.stdout))


def _measured(count: int) -> VerifierCost:
    source = FakeTrustDomain("example.org").source("spiffe://example.org/web")
    peer = peer_from_pem(source.snapshot().x509.chain_pem)
    empty, full = DenySet(), DenySet()
    for one in (empty, full):
        one.hear(now=utc_now())
    check_empty_us = _check_us(peer, empty)
    process = psutil.Process()
    before = process.memory_info().rss
    begun = time.process_time()
    _tell(full, count)
    told = time.process_time() - begun
    rss = process.memory_info().rss
    if len(full) != count:
        raise RuntimeError(f"{len(full)} are denied, not {count}")
    full.deny_authorities(["ab" * 20])
    check_us = _check_us(peer, full)
    begun = time.process_time()
    full.prune(now=utc_now() + timedelta(minutes=2))
    return VerifierCost(
        denied=count,
        check_us=check_us,
        check_empty_us=check_empty_us,
        rss_mib=rss / _MIB,
        told_mib=(rss - before) / _MIB,
        octets_each=(rss - before) / count,
        told_ms=told * 1e3,
        pruned_ms=(time.process_time() - begun) * 1e3,
    )


def _tell(denied: DenySet, count: int) -> None:
    reader, now = FeedReader(denied, 0), utc_now()
    expires = int(now.timestamp()) + _HOUR
    for first in range(0, count, _MESSAGE):
        last = min(first + _MESSAGE, count)
        message = pb.FollowResponse(
            sequence=1,
            full=first == 0,
            complete=last == count,
            revoked=[
                pb.RevokedCredential(
                    id=f"01{secrets.token_hex(19)}",
                    kind=credential_pb2.CREDENTIAL_KIND_X509,
                    spiffe_id=f"spiffe://example.org/bench/{number % _IDENTITIES}",
                    expires_at=expires + number % _HOUR,
                )
                for number in range(first, last)
            ],
        )
        octets = message.SerializeToString()
        reader.take(message_from_wire(pb.FollowResponse.FromString(octets)), now=now)


def _check_us(peer: Peer, denied: DenySet) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        begun = time.process_time()
        for _ in range(_CHECKS):
            check_current(peer, denied)
        best = min(best, time.process_time() - begun)
    return best / _CHECKS * 1e6


if __name__ == "__main__":
    print(json.dumps(asdict(_measured(int(sys.argv[1])))))
