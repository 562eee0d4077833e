"""Node attestors: one file each, with both halves of its challenge.

- An attestor is registered under the entry-point group `identity_broker.node_attestors`; only those
  that the configuration enables are imported.
- Whatever an attestor raises that is not a BrokerError is a bug and reads so to the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from identity_broker.domain.node import AttestedNode

# Sends a challenge to the node and returns its answer, both in the attestor's own encoding.
Challenger = Callable[[bytes], Awaitable[bytes]]

MAX_PAYLOAD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the node sent first.

    `payload` is the attestor's own; `spki_der` is the key it wants certified.
    """

    payload: bytes
    spki_der: bytes


class NodeAttestor(Protocol):
    """The broker's half of a node attestor."""

    name: str

    async def attest(self, evidence: Evidence, challenge: Challenger) -> AttestedNode:
        """Return what was proven.

        Raises:
            AttestationFailed, ChallengeFailed, JoinTokenRejected: nothing was proven.
        """
        ...

    async def give_back(self, payload: bytes) -> None:
        """Undo what `attest` used up, because no SVID came of it."""
        ...
