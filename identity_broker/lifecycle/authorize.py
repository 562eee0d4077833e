"""authorize: may this caller have this? Answered from memory.

- `Gate.authenticate` turns what a listener saw into a `Caller`, on every call: expiry, revocation
  and bans are re-checked, because a connection outlives them all.
- `Authorize` is the only builder of `Grant`.
- `explain` walks the rules that `Authorize.entry` enforces; a property test holds them equal.
- An entry that does not exist and one that is another node's are refused alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from identity_broker.domain import names
from identity_broker.domain.caller import (
    Caller,
    CallerClass,
    ListenerKind,
    LocalPeer,
    PeerCertificate,
)
from identity_broker.domain.clock import Clock
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.grant import SEAL, Grant, GrantKind
from identity_broker.domain.node import AttestedNode, Node
from identity_broker.errors import (
    CredentialRevoked,
    EntryNotAuthorized,
    NodeBanned,
    NodeUnknown,
    Unauthenticated,
)
from identity_broker.lifecycle.directory import Directory
from identity_ca.spiffe_id import SpiffeId, TrustDomain

_NO_END = timedelta.max
_ANYONE = frozenset({CallerClass.ANYONE})
_LOCAL = frozenset({CallerClass.ANYONE, CallerClass.LOCAL})
_NODE = frozenset({CallerClass.ANYONE, CallerClass.NODE})
_WORKLOAD = frozenset({CallerClass.ANYONE, CallerClass.WORKLOAD})
_ADMIN = frozenset({CallerClass.ANYONE, CallerClass.WORKLOAD, CallerClass.ADMIN})


@dataclass(frozen=True, slots=True)
class TtlPolicy:
    """The lifetimes given where an entry names none, and the longest allowed."""

    x509: timedelta
    jwt: timedelta
    node: timedelta
    max_x509: timedelta
    max_jwt: timedelta


@dataclass(frozen=True, slots=True)
class Check:
    """One rule and whether it held."""

    rule: str
    held: bool
    detail: str = ""
    selector: str = ""


class Gate:
    """Who is calling, as far as the listener could prove it.

    Args:
        is_authority: whether an authority of ours that is still trusted has that key identifier. A
            root may certify others than us: what they sign is no identity here.
    """

    def __init__(
        self,
        directory: Directory,
        trust_domain: TrustDomain,
        clock: Clock,
        *,
        is_authority: Callable[[str], bool],
        admin_gid: int | None = None,
    ) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._clock = clock
        self._is_authority = is_authority
        self._admin_gid = admin_gid
        self._own_uid = os.geteuid()

    def authenticate(
        self, listener: ListenerKind, peer: PeerCertificate | LocalPeer | None, address: str
    ) -> Caller:
        """Return who is calling.

        Raises:
            Unauthenticated, CredentialRevoked, NodeBanned, NodeUnknown: nobody to be served.
        """
        if isinstance(peer, PeerCertificate):
            return self.certificate(peer)
        if isinstance(peer, LocalPeer):
            return self.local(peer)
        if listener is ListenerKind.BOOTSTRAP:
            return Caller(_ANYONE, address)
        raise Unauthenticated

    def local(self, peer: LocalPeer) -> Caller:
        """Admit root, the broker's own user and the administrators' group.

        Raises:
            Unauthenticated: any other user.
        """
        if peer.uid not in (0, self._own_uid) and self._admin_gid not in {peer.gid, *peer.groups}:
            raise Unauthenticated(
                "only root, the broker's own user or the administrators' group may use this socket",
                hint="run the command as one of them, or set server.admin_gid",
                uid=peer.uid,
            )
        return Caller(_LOCAL, f"uid:{peer.uid}", local=peer)

    def certificate(self, peer: PeerCertificate) -> Caller:
        """Admit the holder of a valid X.509-SVID of the trust domain.

        Raises:
            Unauthenticated: another trust domain's, or expired.
            CredentialRevoked: revoked.
            NodeBanned, NodeUnknown: a node that is no longer welcome.
        """
        spiffe_id = peer.spiffe_id
        if spiffe_id.trust_domain != self._trust_domain:
            raise Unauthenticated(
                f'this broker serves the trust domain "{self._trust_domain}" alone',
                detail=f"peer {spiffe_id}",
            )
        if not self._is_authority(peer.authority_key_id):
            raise Unauthenticated(
                "the X.509-SVID this call was made with was not issued by this broker",
                detail=f"{spiffe_id} signed by {peer.authority_key_id[:64] or 'an unnamed key'}",
            )
        now = self._clock.now()
        if now >= peer.not_after:
            raise Unauthenticated(
                "the X.509-SVID this call was made with has expired",
                hint="attest again or wait for the renewal, then open a new connection",
                detail=f"{spiffe_id} expired {peer.not_after.isoformat()}",
            )
        if names.is_node(spiffe_id):
            node = self._directory.node(spiffe_id)
            if node is not None and node.banned:
                raise NodeBanned(detail=f"{spiffe_id}: {node.ban_reason}")
            self._refuse_revoked(peer)
            if node is None:
                raise NodeUnknown(detail=str(spiffe_id))
            return Caller(_NODE, str(spiffe_id), spiffe_id, peer.serial)
        self._refuse_revoked(peer)
        if names.is_reserved(spiffe_id):
            return Caller(_ANYONE, str(spiffe_id), spiffe_id, peer.serial)
        admin = self._directory.is_admin(spiffe_id, now)
        return Caller(_ADMIN if admin else _WORKLOAD, str(spiffe_id), spiffe_id, peer.serial)

    def _refuse_revoked(self, peer: PeerCertificate) -> None:
        if self._directory.is_revoked(peer.serial):
            raise CredentialRevoked(detail=f"{peer.spiffe_id} serial {peer.serial}")


class Authorize:
    """May this node have this credential?"""

    def __init__(
        self,
        directory: Directory,
        trust_domain: TrustDomain,
        ttl: TtlPolicy,
        clock: Clock,
        *,
        broker_dns_names: tuple[str, ...] = (),
    ) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._ttl = ttl
        self._clock = clock
        self._broker_dns_names = broker_dns_names

    def entry(self, node_id: SpiffeId, entry_id: str) -> Grant:
        """Grant `node_id` the identity of an entry.

        Raises:
            EntryNotAuthorized: no such entry, or not this node's, or disabled, on hold or expired.
            NodeUnknown, NodeBanned: the node is not (or no longer) welcome.
        """
        node = self._welcome(node_id)
        entry = self._directory.entry(entry_id)
        now = self._clock.now()
        if (
            entry is None
            or entry.names_node_group
            or not entry.is_live(now)
            or not self._is_below(node, entry.parent_id)
        ):
            raise EntryNotAuthorized(detail=f"node {node_id} entry {entry_id[:64]!r}")
        ttl = self._ttl
        # Nothing outlives the entry it was issued from.
        rest = entry.expires_at - now if entry.expires_at else _NO_END
        return Grant(
            seal=SEAL,
            kind=GrantKind.WORKLOAD,
            spiffe_id=entry.spiffe_id,
            node_id=node_id,
            x509_ttl=min(entry.x509_ttl or ttl.x509, ttl.max_x509, rest),
            jwt_ttl=min(entry.jwt_ttl or ttl.jwt, ttl.max_jwt, rest),
            entry_id=entry.id,
            entry_revision=entry.revision,
            dns_names=entry.dns_names,
            hint=entry.hint,
        )

    def entries(self, node_id: SpiffeId) -> list[RegistrationEntry]:
        """Return every entry that `entry` would grant this node, by id.

        Raises:
            NodeUnknown, NodeBanned: the node is not (or no longer) welcome.
        """
        now = self._clock.now()
        found = {
            entry.id: entry
            for parent in self.parents(node_id)
            for entry in self._directory.children(parent)
            if entry.is_live(now) and not entry.names_node_group
        }
        return [found[key] for key in sorted(found)]

    def parents(self, node_id: SpiffeId) -> frozenset[SpiffeId]:
        """Return the parents whose entries are the node's: itself, and the groups it belongs to.

        Raises:
            NodeUnknown, NodeBanned: the node is not (or no longer) welcome.
        """
        node = self._welcome(node_id)
        return frozenset((node_id, *self.groups_of(node, self._directory.groups())))

    def groups_of(self, node: Node, among: Iterable[RegistrationEntry]) -> Iterator[SpiffeId]:
        """Yield the groups that the node belongs to by these entries; one may come twice."""
        now = self._clock.now()
        for group in among:
            if group.selectors <= node.selectors and group.is_live(now):
                yield group.spiffe_id

    def attested(self, node: AttestedNode) -> Grant:
        """Grant a freshly attested node its own SVID.

        Raises:
            NodeBanned: an operator banned it.
        """
        known = self._directory.node(node.spiffe_id)
        if known is not None and known.banned:
            raise NodeBanned(detail=f"{node.spiffe_id}: {known.ban_reason}")
        return self._own(GrantKind.NODE, node.spiffe_id, "")

    def renewal(self, caller: Caller) -> Grant:
        """Grant a calling node its next SVID.

        Raises:
            NodeUnknown, NodeBanned: the node is not (or no longer) welcome.
        """
        if caller.spiffe_id is None:
            raise NodeUnknown(detail=f"renewal by {caller.name}")
        node = self._welcome(caller.spiffe_id)
        return self._own(GrantKind.NODE, node.spiffe_id, caller.serial)

    def broker(self, supersedes: str = "") -> Grant:
        """Grant the broker its own server SVID."""
        return self._own(GrantKind.BROKER, names.broker_id(self._trust_domain), supersedes)

    def explain(
        self, entry: RegistrationEntry, node: Node | None, node_id: SpiffeId
    ) -> list[Check]:
        """Say which rules let `node_id` have `entry`, in the order they are enforced."""
        checks = [
            Check(
                "the node is attested",
                node is not None,
                "" if node else f"{node_id} is not among the attested nodes",
            )
        ]
        if node is not None:
            checks.append(Check("the node is not banned", not node.banned, node.ban_reason))
        checks.append(
            Check(
                "the entry issues to workloads",
                not entry.names_node_group,
                "it names a group of nodes" if entry.names_node_group else "",
            )
        )
        checks.append(
            Check("the entry is enabled", not entry.disabled, "disabled" if entry.disabled else "")
        )
        hold = f'on hold: "{entry.held_by}"' if entry.held_by else ""
        checks.append(Check("nothing holds the entry", not entry.held_by, hold))
        expired = entry.expires_at is not None and self._clock.now() >= entry.expires_at
        expiry = entry.expires_at.isoformat() if entry.expires_at else ""
        checks.append(Check("the entry has not expired", not expired, expiry))
        checks.extend(self._explain_parent(entry, node, node_id))
        return checks

    def _explain_parent(
        self, entry: RegistrationEntry, node: Node | None, node_id: SpiffeId
    ) -> Iterator[Check]:
        if entry.parent_id == node_id:
            yield Check("the node is the entry's parent", True, str(node_id))
            return
        groups = [group for group in self._directory.groups() if group.spiffe_id == entry.parent_id]
        if not groups:
            yield Check(
                "the node is the entry's parent",
                False,
                f"the parent is {entry.parent_id}, and no entry names it as a group of nodes",
            )
            return
        have = node.selectors if node else frozenset()
        now = self._clock.now()
        member = any(group.is_live(now) and group.selectors <= have for group in groups)
        yield Check(
            "the node belongs to the group that is the entry's parent",
            member,
            str(entry.parent_id),
        )
        for group in groups:
            if not group.is_live(now):
                detail = f"group entry {group.id} is disabled, on hold or expired"
                yield Check("the group entry is live", member, detail)
            for selector in sorted(group.selectors):
                # Within a group that is satisfied by another entry a miss is no refusal.
                held = selector in have
                detail = f"asked by group entry {group.id}"
                yield Check("the node has the selector", held or member, detail, str(selector))

    def _welcome(self, node_id: SpiffeId) -> Node:
        node = self._directory.node(node_id)
        if node is None:
            raise NodeUnknown(detail=str(node_id))
        if node.banned:
            raise NodeBanned(detail=f"{node_id}: {node.ban_reason}")
        return node

    def _is_below(self, node: Node, parent: SpiffeId) -> bool:
        return parent == node.spiffe_id or parent in self.groups_of(node, self._directory.groups())

    def _own(self, kind: GrantKind, spiffe_id: SpiffeId, supersedes: str) -> Grant:
        return Grant(
            seal=SEAL,
            kind=kind,
            spiffe_id=spiffe_id,
            node_id=spiffe_id if kind is GrantKind.NODE else None,
            x509_ttl=self._ttl.node,
            jwt_ttl=self._ttl.jwt,
            dns_names=self._broker_dns_names if kind is GrantKind.BROKER else (),
            supersedes=supersedes,
        )
