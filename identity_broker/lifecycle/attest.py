"""attest: a machine proves what it is, and becomes a node.

- The CSR is looked at before the proof is spent: a broken request or a blocked key costs no join
  token.
- The proof comes first, then the ban check, then the SVID, then the node's record.
- A proof that was spent for nothing, because the node hung up or issuing failed, is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from identity_broker.attestors.node import Challenger, Evidence, NodeAttestor
from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.node import AttestedNode, Node
from identity_broker.errors import (
    AttestorUnknown,
    BrokerError,
    ChallengeFailed,
    KeyBlocked,
    NodeBanned,
)
from identity_broker.lifecycle.authorize import Authorize
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.issue import Issue, X509Order, one
from identity_broker.signing import translate
from identity_broker.store import Repositories, Store
from identity_ca.csr import parse_csr
from identity_ca.errors import CAError
from identity_ca.issuer import X509Credential
from identity_ca.profile import NODE
from identity_ca.spiffe_id import SpiffeId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Admission:
    """A node and its first SVID."""

    node: AttestedNode
    credential: X509Credential


class Attest:
    """Admits nodes."""

    def __init__(
        self,
        *,
        attestors: dict[str, NodeAttestor],
        authorize: Authorize,
        issue: Issue,
        store: Store,
        directory: Directory,
        clock: Clock,
    ) -> None:
        self._attestors = attestors
        self._authorize = authorize
        self._issue = issue
        self._store = store
        self._directory = directory
        self._clock = clock
        self._under_way: set[asyncio.Task[Any]] = set()

    @property
    def attestors(self) -> Collection[str]:
        """The names of the attestors that are enabled."""
        return self._attestors.keys()

    async def node(
        self,
        attestor_name: str,
        payload: bytes,
        csr: bytes,
        challenge: Challenger,
        caller: Caller,
        correlation_id: str = "",
    ) -> Admission:
        """Attest a node and issue its SVID.

        Args:
            challenge: sends a challenge to the node and returns its answer.

        Raises:
            AttestorUnknown: no such attestor is enabled.
            CsrRejected, KeyTooWeak, KeyBlocked: the CSR.
            AttestationFailed, JoinTokenRejected, ChallengeFailed: the proof.
            NodeBanned: an operator banned the node.
            StoreUnavailable, SigningBackendUnavailable: nothing was issued.
        """
        attestor = self._attestors.get(attestor_name)
        if attestor is None:
            raise AttestorUnknown(detail=attestor_name[:64])
        try:
            request = parse_csr(csr, allowed=NODE.key_algorithms)
        except CAError as error:
            raise translate(error) from error
        if self._directory.is_key_blocked(request.key_fingerprint):
            raise KeyBlocked(detail=f"attestation with key {request.key_fingerprint}")
        # A refusal is audited where all refused calls are, within a stranger's budget.
        node = await self._proven(attestor, Evidence(payload, request.spki_der), challenge)
        # From here on the work outlives its caller: the proof is spent, its node is admitted.
        return await asyncio.shield(
            self._spawn(self._admitted(attestor, node, payload, csr, caller, correlation_id))
        )

    async def settled(self) -> None:
        """Return when nothing that outlived its caller is under way any more."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _proven(
        self, attestor: NodeAttestor, evidence: Evidence, challenge: Challenger
    ) -> AttestedNode:
        """Run the attestor; when the caller hangs up meanwhile, give back what it used."""
        gone: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def ask(question: bytes) -> bytes:
            asking = asyncio.ensure_future(challenge(question))
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                asking.cancel()
                raise ChallengeFailed(detail="the node hung up")
            return asking.result()

        proving = self._spawn(attestor.attest(evidence, ask))
        try:
            return await asyncio.shield(proving)
        except asyncio.CancelledError:
            gone.set_result(b"")
            self._spawn(_undone(proving, attestor, evidence.payload))
            raise

    async def _admitted(
        self,
        attestor: NodeAttestor,
        node: AttestedNode,
        payload: bytes,
        csr: bytes,
        caller: Caller,
        correlation_id: str,
    ) -> Admission:
        try:
            await self._refuse_held(node.spiffe_id)
            grant = self._authorize.attested(node)
            credential = one(await self._issue.x509([X509Order(grant, csr)], correlation_id))
            await self._admit(node, credential, caller, correlation_id)
        except BrokerError:
            await attestor.give_back(payload)
            raise
        return Admission(node, credential)

    async def _refuse_held(self, node_id: SpiffeId) -> None:
        """Refuse a node that is not known, or not any more, and has been put on hold.

        Raises:
            NodeBanned: it has.
            StoreUnavailable: the database did not answer.
        """
        hold = await self._store.read(lambda repos: repos.holds.of_node(node_id))
        if hold:
            raise NodeBanned(detail=f'{node_id}: on hold: "{hold}"')

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            # Fetched here too: a caller that hung up will not ask.
            task.exception()

    async def _admit(
        self, node: AttestedNode, credential: X509Credential, caller: Caller, correlation_id: str
    ) -> None:
        now = self._clock.now()

        def write(repos: Repositories) -> None:
            # Asked again inside the transaction: a ban that came meanwhile must not be undone.
            known = repos.nodes.find(node.spiffe_id)
            banned = known is not None and known.banned
            if banned or repos.holds.of_node(node.spiffe_id):
                raise NodeBanned(detail=f"{node.spiffe_id} was banned while it attested")
            repos.nodes.upsert(
                Node(
                    spiffe_id=node.spiffe_id,
                    attestor=node.attestor,
                    selectors=node.selectors,
                    attested_at=now,
                    serial=credential.serial,
                    expires_at=credential.not_after,
                    reattestable=node.reattestable,
                )
            )
            repos.audit.append(
                AuditEvent(
                    at=now,
                    kind=AuditKind.NODE_ATTESTED,
                    actor=caller.name,
                    subject=str(node.spiffe_id),
                    correlation_id=correlation_id,
                    facts={"attestor": node.attestor, "serial": credential.serial},
                )
            )

        await self._store.write(write)
        await self._directory.sync()


async def _undone(
    proving: asyncio.Task[AttestedNode], attestor: NodeAttestor, payload: bytes
) -> None:
    try:
        await proving
    except BrokerError:
        return  # nothing was used up
    await attestor.give_back(payload)
