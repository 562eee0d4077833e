"""What the agent hands out, and what its faces (Workload API, SDS, admin socket) ask for it with.

- A `WorkloadState` is the full state at one moment: never one generation's key with another's
  chain, never a bundle older than the chain.
- Private keys never appear in a representation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from identity_broker.attestors.workload import Process
from identity_ca.bundle import TrustBundle
from identity_ca.jwt import VerifiedJwt


@dataclass(frozen=True, slots=True)
class X509Identity:
    """An X.509-SVID with its key.

    Attributes:
        chain: DER certificates, leaf first, without the root.
        key: private key, PKCS #8, DER, unencrypted; secret.
        serial: 40 lower-case hexadecimal digits, as in the broker's ledger.
    """

    entry_id: str
    spiffe_id: str
    hint: str
    chain: tuple[bytes, ...] = field(repr=False)
    key: bytes = field(repr=False)
    serial: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class JwtIdentity:
    """A JWT-SVID; the token is secret."""

    spiffe_id: str
    hint: str
    token: str = field(repr=False)
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class WorkloadState:
    """All that one process may know now.

    Attributes:
        identities: at least one; the first is the default (Workload API, section 8).
        bundle: the own trust domain's.
        federated: those of the trust domains its entries federate with, by name.
        crls: DER, one for each X.509 authority that can sign.
        revision: grows with every change that this process can see.
    """

    identities: tuple[X509Identity, ...]
    bundle: TrustBundle
    federated: Mapping[str, TrustBundle]
    crls: tuple[bytes, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class BundleState:
    """The public part alone."""

    bundle: TrustBundle
    federated: Mapping[str, TrustBundle]
    crls: tuple[bytes, ...]


class Caller(Protocol):
    """A process at the other end of a connection, as the agent's listener knows it.

    Implemented by `identity_broker.agent.caller`.
    """

    @property
    def process(self) -> Process:
        """The process that connected."""
        ...

    @property
    def uid(self) -> int:
        """The user it connected as."""
        ...

    def check(self) -> None:
        """Make sure that it is still that process, running that program as that user.

        To be called before every answer that carries a secret.

        Raises:
            CallerUnknown: it has ended.
            ProcessChanged: it runs another program, or as another user; the connection is dropped.
        """
        ...

    async def ended(self) -> None:
        """Return when the process or its connection has ended."""
        ...


class WorkloadIdentities(Protocol):
    """What the faces may ask. Implemented by `identity_broker.agent.identities.Identities`.

    Each method attests the caller's process first, and calls `caller.check()` before it answers if
    it has waited for anything since.
    """

    def watch(self, caller: Caller) -> AsyncIterator[WorkloadState]:
        """Yield the full state at once, and again whenever it changes; ends by raising.

        The process is attested again before every state. A state is yielded when at least one
        SVID is there; an entry whose SVID is still being made joins in a later one.

        Raises:
            NoIdentity: nothing matches (any more).
            AgentNotReady: nothing was heard from the broker yet, or no SVID can be had in time.
            CallerUnknown, ProcessChanged: as `Caller.check`.
        """
        ...

    def watch_bundles(self, caller: Caller) -> AsyncIterator[BundleState]:
        """Yield the bundles at once, and again whenever they change; as `watch`, without SVIDs.

        A process that matches nothing gets them only when the agent's settings say so.
        """
        ...

    async def jwt_svids(
        self, caller: Caller, audiences: Sequence[str], spiffe_id: str | None
    ) -> list[JwtIdentity]:
        """Return a JWT-SVID for each identity of the process, or for the one asked for.

        Raises:
            NoIdentity: nothing matches, or not that SPIFFE ID.
            AudienceInvalid: no audience, or one that cannot stand in a token.
            AgentNotReady: the broker cannot be asked and nothing valid is cached.
            CallerUnknown, ProcessChanged: as `Caller.check`.
        """
        ...

    async def validate_jwt(self, caller: Caller, token: str, audience: str) -> VerifiedJwt:
        """Validate a JWT-SVID for the caller, denied ones included.

        Raises:
            TokenInvalid: it does not hold.
            AgentNotReady: no bundle yet.
            CallerUnknown, ProcessChanged: as `Caller.check`.
        """
        ...
