"""Banning, evicting and inviting nodes."""

from __future__ import annotations

import re
import secrets
from datetime import datetime, timedelta

from identity_broker.attestors.node import join_token
from identity_broker.domain import names
from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.node import JoinToken, Node
from identity_broker.domain.paging import NodeFilter, Page
from identity_broker.domain.revocation import RevocationSubject, SubjectKind
from identity_broker.errors import MalformedRequest
from identity_broker.lifecycle.holds import lift_in
from identity_broker.lifecycle.revoke import OrderRequest, Revoke
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId, TrustDomain

DEFAULT_TOKEN_TTL = timedelta(minutes=10)
MAX_TOKEN_TTL = timedelta(hours=24)
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Nodes:
    """The attested nodes of the trust domain."""

    def __init__(
        self, store: Store, revoke: Revoke, trust_domain: TrustDomain, clock: Clock
    ) -> None:
        self._store = store
        self._revoke = revoke
        self._trust_domain = trust_domain
        self._clock = clock

    async def get(self, spiffe_id: SpiffeId) -> Node:
        """Return one node.

        Raises:
            NodeNotFound: there is none with that ID.
        """
        return await self._store.read(lambda repos: repos.nodes.get(spiffe_id))

    async def page(self, wanted: NodeFilter, after: str, size: int) -> Page[Node]:
        """Return a page of nodes, by SPIFFE ID."""
        return await self._store.read(lambda repos: repos.nodes.page(wanted, after, size))

    async def ban(self, spiffe_id: SpiffeId, reason: str, caller: Caller) -> tuple[Node, int]:
        """Refuse the node from now on; revoke its SVIDs and all that was issued through it.

        It is let in again by lifting the hold that this makes, or by evicting it.

        Returns:
            The node, and how many credentials were revoked.

        Raises:
            NodeNotFound: there is none with that ID.
            StoreUnavailable: repeat the call.
        """

        def note(repos: Repositories) -> None:
            repos.nodes.get(spiffe_id)
            repos.audit.append(self._event(AuditKind.NODE_BANNED, spiffe_id, caller, reason))

        request = OrderRequest(
            subject=RevocationSubject(SubjectKind.NODE, str(spiffe_id)),
            reason=RevocationReason.PRIVILEGE_WITHDRAWN,
            comment=reason or "banned",
        )
        ordered = await self._revoke.order(request, caller, also=note)
        return await self.get(spiffe_id), ordered.order.revoked

    async def evict(self, spiffe_id: SpiffeId, caller: Caller) -> int:
        """Forget the node and revoke its SVIDs; return how many were revoked.

        It may attest again at once, whatever held it: what is issued to it then is no business of
        this.

        Raises:
            NodeNotFound: there is none with that ID.
            StoreUnavailable: repeat the call.
        """
        now = self._clock.now()

        def forget(repos: Repositories) -> None:
            repos.nodes.get(spiffe_id)
            while hold := repos.holds.of_node(spiffe_id):
                lift_in(repos, hold, now, caller.name)
            repos.nodes.delete(spiffe_id)
            repos.audit.append(self._event(AuditKind.NODE_EVICTED, spiffe_id, caller, ""))

        request = OrderRequest(
            subject=RevocationSubject(SubjectKind.SPIFFE_ID, str(spiffe_id)),
            reason=RevocationReason.PRIVILEGE_WITHDRAWN,
            comment="evicted",
            without_hold=True,
        )
        ordered = await self._revoke.order(request, caller, also=forget)
        return ordered.order.revoked

    async def create_join_token(
        self, ttl: timedelta | None, node_name: str, caller: Caller
    ) -> tuple[str, JoinToken]:
        """Make a join token; return it (secret, shown once) and what is stored of it.

        Raises:
            MalformedRequest: the lifetime or the node's name.
            StoreUnavailable: repeat the call.
        """
        ttl = ttl if ttl is not None else DEFAULT_TOKEN_TTL
        if not timedelta(seconds=1) <= ttl <= MAX_TOKEN_TTL:
            raise MalformedRequest("a join token lives between 1 s and 24 h")
        name = node_name or secrets.token_hex(10)
        if not _NODE_NAME.fullmatch(name):
            raise MalformedRequest(
                "a node name has 1 to 64 letters, digits, dots, underscores and hyphens"
            )
        now: datetime = self._clock.now()
        secret = join_token.new_token()
        token = JoinToken(
            token_hash=join_token.token_hash(secret),
            node_id=names.node_id(self._trust_domain, "join_token", name),
            expires_at=now + ttl,
            created_at=now,
        )

        def write(repos: Repositories) -> None:
            repos.join_tokens.create(token)
            repos.audit.append(self._event(AuditKind.JOIN_TOKEN_CREATED, token.node_id, caller, ""))

        await self._store.write(write)
        return secret, token

    def _event(
        self, kind: AuditKind, spiffe_id: SpiffeId, caller: Caller, reason: str
    ) -> AuditEvent:
        return AuditEvent(
            at=self._clock.now(),
            kind=kind,
            actor=caller.name,
            subject=str(spiffe_id),
            reason=reason,
        )
