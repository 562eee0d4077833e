"""What each kind of certificate may hold. A profile is a constant; nothing edits it at run time.

- A time to live above `max_ttl` is refused, never cut: nobody should believe in a lifetime they
  did not get. The one cut there is, to the issuer's own end, is visible in the credential.
- Leaf profiles differ in lifetime alone; SPIFFE fixes the rest (X-1 … X-10).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from identity_ca.errors import ProfileViolation
from identity_ca.keys import KeyAlgorithm

__all__ = ["BROKER", "INTERMEDIATE", "NODE", "ROOT", "WORKLOAD", "X509Profile"]


@dataclass(frozen=True, slots=True)
class X509Profile:
    """The rules for one kind of certificate.

    Attributes:
        name: for messages and logs.
        key_algorithms: which subject keys may be certified.
        default_ttl: used by callers that were not told a lifetime.
        max_ttl: longest lifetime that may be asked for.
        ca: whether the subject is a CA.
        max_dns_names: how many DNS SANs may be asked for, beside the one derived from the ID.
    """

    name: str
    key_algorithms: frozenset[KeyAlgorithm]
    default_ttl: timedelta
    max_ttl: timedelta
    ca: bool = False
    max_dns_names: int = 32

    def check_ttl(self, ttl: timedelta) -> None:
        """Returns when a certificate of this profile may live that long.

        Raises:
            ProfileViolation: below one second or above `max_ttl`.
        """
        if ttl < _ONE_SECOND:
            raise ProfileViolation("a certificate must live for at least one second")
        if ttl > self.max_ttl:
            raise ProfileViolation(
                f"a {self.name} certificate may live for at most {self.max_ttl}",
                hint="ask for a shorter time to live",
            )


_ONE_SECOND: Final = timedelta(seconds=1)

_LEAF_KEYS: Final = frozenset(
    {
        KeyAlgorithm.EC_P256,
        KeyAlgorithm.EC_P384,
        KeyAlgorithm.RSA_2048,
        KeyAlgorithm.RSA_3072,
        KeyAlgorithm.RSA_4096,
    }
)
# No Ed25519 in any built-in profile: Envoy, gRPC and most TLS stacks do not offer it in a
# handshake. A profile of one's own may add it.

WORKLOAD: Final = X509Profile(
    "workload", _LEAF_KEYS, default_ttl=timedelta(hours=1), max_ttl=timedelta(days=1)
)
NODE: Final = X509Profile(
    "node", _LEAF_KEYS, default_ttl=timedelta(hours=1), max_ttl=timedelta(days=7)
)
BROKER: Final = X509Profile(
    "broker", _LEAF_KEYS, default_ttl=timedelta(hours=24), max_ttl=timedelta(days=7)
)
INTERMEDIATE: Final = X509Profile(
    "intermediate",
    _LEAF_KEYS,
    default_ttl=timedelta(days=7),
    max_ttl=timedelta(days=5 * 366),
    ca=True,
    max_dns_names=0,
)
ROOT: Final = X509Profile(
    "root",
    _LEAF_KEYS,
    default_ttl=timedelta(days=365),
    max_ttl=timedelta(days=20 * 366),
    ca=True,
    max_dns_names=0,
)
