"""How a node stands with its broker: what it holds, and what a refusal says of it.

- The wall clock may be set, and a monotonic one stands still while the machine sleeps: renewal is
  due by whichever comes first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final, Self

from identity_client.clock import utc_now
from identity_client.credential import X509Material
from identity_client.errors import (
    IdentityError,
    NotAuthenticated,
    NotPermitted,
    RequestRejected,
    SettingsInvalid,
)
from identity_client.node.values import NodePhase
from identity_client.renewal import MAX_DELAY, renewal_due, retry_delay

__all__ = [
    "BANNED",
    "NODE_LOST",
    "NO_ANSWER",
    "TLS_FAILED",
    "Doubt",
    "HeldNode",
    "phase_of",
    "rest_after",
    "rest_before_due",
]

BANNED: Final = "NODE_BANNED"
TLS_FAILED: Final = "BROKER_TLS_FAILED"
NODE_LOST: Final = frozenset(
    {"NODE_UNKNOWN", "NODE_NOT_FOUND", "CREDENTIAL_REVOKED", "UNAUTHENTICATED"}
)
"""The broker does not know this node by the SVID it shows."""
NO_ANSWER: Final = frozenset({TLS_FAILED, "BROKER_UNREACHABLE"})
"""Nobody answered; or somebody who does not accept our certificate, and could not say so."""

# The wall clock may jump and machines sleep: due times are looked at again at least this often.
_LONGEST_REST: Final = timedelta(seconds=60)
_SHORTEST_REST: Final = timedelta(milliseconds=100)
# To knock where nobody is costs little, and a broker that is back should soon find its nodes.
_AWAY_CAP: Final = timedelta(seconds=5)
_REFUSALS = (NotPermitted, NotAuthenticated, RequestRejected, SettingsInvalid)


class Doubt(Enum):
    """What calls made one wonder."""

    NONE = "none"
    CONNECTION = "connection"  # nobody answers, over and over: is it us?
    IDENTITY = "identity"  # the broker says that it does not know us, or has banned us


@dataclass(frozen=True, slots=True)
class HeldNode:
    """A node SVID in use.

    Attributes:
        due: when to renew it.
        due_tick: the same by the monotonic clock.
        reattestable: whether the broker lets the node attest again.
    """

    material: X509Material
    due: datetime
    due_tick: float
    reattestable: bool

    @classmethod
    def received(cls, material: X509Material, *, reattestable: bool, dice: float) -> Self:
        """An SVID that was issued just now; `dice` is uniform in [0, 1)."""
        due = renewal_due(received=material.received, not_after=material.not_after, dice=dice)
        tick = time.monotonic() + (due - material.received).total_seconds()
        return cls(material, due, tick, reattestable)

    @property
    def authority_id(self) -> str:
        """Who signed it: the subject key identifier, hexadecimal; empty where it does not say."""
        issuer = self.material.issuer
        return issuer.key_id.hex() if issuer is not None else ""

    @property
    def is_due(self) -> bool:
        """Whether it is time to renew it."""
        return utc_now() >= self.due or time.monotonic() >= self.due_tick

    @property
    def has_expired(self) -> bool:
        """Whether it is of no use, by our clock."""
        return utc_now() >= self.material.not_after


def phase_of(node: HeldNode | None, error: IdentityError | None) -> NodePhase:
    """Where a node stands that holds `node` and heard `error` last."""
    if error is not None and error.reason == BANNED:
        return NodePhase.BANNED
    holds = node is not None and not node.has_expired
    if holds and (error is None or error.reason not in NODE_LOST):
        return NodePhase.ATTESTED
    if isinstance(error, _REFUSALS):
        return NodePhase.REFUSED
    return NodePhase.ATTESTING


def rest_after(
    failures: int, error: IdentityError | None, node: HeldNode | None, *, dice: float
) -> timedelta:
    """How long to wait after so many failures in a row, the last of which was `error`."""
    return retry_delay(
        failures,
        dice=dice,
        remaining=node.material.not_after - utc_now() if node else None,
        retry_after=error.retry_after if error else None,
        cap=_AWAY_CAP if error is not None and error.reason in NO_ANSWER else MAX_DELAY,
    )


def rest_before_due(node: HeldNode | None) -> timedelta:
    """How long to wait before looking at what is due again."""
    longest = _LONGEST_REST
    if node is not None:
        longest = min(longest, node.due - utc_now())
    return max(longest, _SHORTEST_REST)
