"""What each connected node is told: its entries, the bundle, what is refused, revocation lists.

- A node's entries are those below its parents (itself and its groups), not disabled nor held; a
  test holds that against `Authorize.entries`. Expired ones are among them: the node looks at its
  clock, as the broker does.
- A change costs as much as it concerns nodes: streams are indexed by parent.
- A node that comes back gets what it missed, if what it says it has is what the journal says it
  had; else everything. Both are compared by digest, so no doubt is ever resolved in favour of less.
- A node speaks for workloads of its own entries alone.
- A state that may be stale is never sent: `open` reads the change feed first, and while the feed is
  lost there are no heartbeats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from identity_broker.domain import names
from identity_broker.domain.clock import Clock
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.errors import AuthorizationError, BrokerStopping, StoreUnavailable
from identity_broker.lifecycle.authorize import Authorize
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.node_stream import Lists, News, NodeStream, Resume
from identity_broker.lifecycle.roster import Roster
from identity_broker.telemetry.logs import get_logger
from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import SpiffeId, TrustDomain

_log = get_logger("sync")

_DIGEST_OCTETS = 8
_STOPPING_RETRY_SECONDS = 1.0


def entry_digest(entry_id: str, revision: int) -> int:
    """One entry's share of a digest: eight octets of SHA-256 (node_sync.proto)."""
    octets = hashlib.sha256(f"{entry_id}\0{revision}".encode()).digest()
    return int.from_bytes(octets[:_DIGEST_OCTETS], "big")


@dataclass(eq=False, slots=True)
class _Parent:
    """The nodes connected below one parent, and the digest of what is told of it."""

    digest: int = 0
    streams: set[NodeStream] = field(default_factory=set)


class NodeSync:
    """Keeps connected nodes up to date.

    Args:
        bundle: the bundle in force.
        lists: the revocation lists in force, DER.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        authorize: Authorize,
        roster: Roster,
        trust_domain: TrustDomain,
        clock: Clock,
        bundle: Callable[[], TrustBundle],
        lists: Callable[[], tuple[bytes, ...]],
    ) -> None:
        self._directory = directory
        self._authorize = authorize
        self._roster = roster
        self.trust_domain = trust_domain
        self._broker_id = names.broker_id(trust_domain)
        self._clock = clock
        self._bundle = bundle
        self._lists = lists
        self._parents: dict[SpiffeId, _Parent] = {}
        self._live_groups: dict[str, bool] = {}
        self._denied = directory.denied_authorities()
        directory.listen(self._on_update)

    # --- one node ---------------------------------------------------------------------------------

    async def open(
        self, node_id: SpiffeId, resume: Resume | None = None, version: str = ""
    ) -> NodeStream:
        """Begin to tell a node; the first news is what it lacks, or everything.

        Raises:
            NodeUnknown, NodeBanned: the node is not (or no longer) welcome.
            StoreUnavailable: the state may be stale, and is not sent.
        """
        await self._directory.sync()
        await self._directory.check()
        # No await from here on: the snapshot and the subscription are of one moment.
        bundle, lists = self._bundle(), Lists(self._lists())
        stream = NodeStream(node_id, self._authorize.parents(node_id), version=version)
        for parent in stream.parents:
            self._join(stream, parent)
        resumed = resume is not None and self._resume(stream, resume)
        if not resumed:
            self._begin(stream)
        stream.waiting.bundle, stream.waiting.lists = bundle, lists
        stream.waiting.denied = self._directory.denied_authorities()
        self._roster.enter(stream)
        stream.touch(self._directory.seq)
        _log.info(
            "node connected",
            node_id=str(node_id),
            version=version,
            sequence=self._directory.seq,
            state="resumed" if resumed else "full",
        )
        return stream

    async def next(self, stream: NodeStream) -> News | None:
        """Wait for the next message to a node; None when its stream has ended in peace.

        Raises:
            WatchLagged: the node reads or acknowledges too slowly.
            NodeUnknown, NodeBanned: the node is not welcome any more.
            BrokerStopping: the broker drains.
        """
        while await stream.ready():
            if not stream.waiting.steps:
                try:
                    await self._directory.check()
                except StoreUnavailable:
                    continue  # a heartbeat would say that the node's state is fresh
            return stream.take(self._directory.seq, self._digest_of(stream))
        return None

    def report(self, stream: NodeStream, reported: Mapping[str, int]) -> None:
        """The node says who follows revocations through it.

        Those that cannot be its own are left out: a node does not speak for other nodes' workloads.
        One that was let in stays, though its entry may be held or gone meanwhile.

        Args:
            reported: name, a SPIFFE ID, a slash and a process number → the revision acknowledged.
        """
        if stream.ended:
            return
        own = self._identities(stream)
        heard = {
            name: revision
            for name, revision in reported.items()
            if name.rpartition("/")[0] in own or self._roster.is_behind(stream.node_id, name)
        }
        if len(heard) < len(reported) and not stream.said_others:
            stream.said_others = True
            _log.warning(
                "verifiers of other nodes' identities left out",
                node_id=str(stream.node_id),
                count=len(reported) - len(heard),
                spiffe_id=next(name for name in reported if name not in heard),
            )
        self._roster.report(stream, heard)

    def close(self, stream: NodeStream) -> None:
        """Tell the node nothing more. Twice is once."""
        stream.end()
        for parent in stream.parents:
            self._leave(stream, parent)
        self._roster.leave(stream)

    def stop(self) -> None:
        """The broker drains: every node is to call again."""
        for stream in tuple(self._roster):
            stream.end(BrokerStopping(retry_after=_STOPPING_RETRY_SECONDS))

    def _begin(self, stream: NodeStream) -> None:
        waiting = stream.waiting
        waiting.full = True
        for parent in stream.parents:
            for entry in self._told_of(parent):
                waiting.put(entry)
        waiting.revoked(self._directory.revocations())
        waiting.raise_epochs(self._directory.epochs())

    def _resume(self, stream: NodeStream, resume: Resume) -> bool:
        """Let what the node missed wait for it; False where that cannot be known."""
        directory = self._directory
        if resume.revision > directory.seq or not directory.journal.reaches(resume.revision):
            return False
        past = directory.journal.since(resume.revision)
        digest = self._digest_of(stream)
        for entry_id, before in past.before.items():
            had = before if self._is_told_to(stream, before) else None
            entry = directory.entry(entry_id)
            has = entry if self._is_told_to(stream, entry) else None
            digest ^= _share(had) ^ _share(has)
            if has is not None:
                stream.waiting.put(has)
            elif had is not None:
                stream.waiting.drop(entry_id)
        if digest != resume.entries_digest:
            # Its groups changed meanwhile, or it has not what it should.
            stream.waiting.changed.clear()
            stream.waiting.removed.clear()
            return False
        stream.waiting.revoked(past.revocations)
        stream.waiting.release(past.released)
        stream.waiting.raise_epochs(past.epochs)
        stream.revision = resume.revision
        return True

    # --- all nodes --------------------------------------------------------------------------------

    def bundle_changed(self, bundle: TrustBundle) -> None:
        """Tell every node the new bundle."""
        for stream in self._streams():
            stream.waiting.bundle = bundle
            stream.touch(self._directory.seq)

    def lists_changed(self, crls: tuple[bytes, ...]) -> None:
        """Tell every node the new revocation lists."""
        lists = Lists(crls)
        for stream in self._streams():
            stream.waiting.lists = lists
            stream.touch(self._directory.seq)

    async def look_at_groups(self) -> None:
        """Find groups whose time has come, or gone, and tell the nodes that were in them."""
        now = self._clock.now()
        live = {
            group.id: group.is_live(now)
            for group in self._directory.groups()
            if group.expires_at is not None
        }
        before, self._live_groups = self._live_groups, live
        turned = {
            group.spiffe_id
            for group in self._directory.groups()
            if group.id in live and before.get(group.id, True) != live[group.id]
        }
        if turned:
            for stream in self._regrouped(turned):
                stream.touch(self._directory.seq)

    def _on_update(self, update: Update) -> None:
        touched: set[NodeStream] = set()
        groups: set[SpiffeId] = set()
        for entry_id, before in update.before.items():
            after = self._directory.entry(entry_id)
            groups.update(
                entry.spiffe_id
                for entry in (before, after)
                if entry is not None
                if entry.parent_id == self._broker_id
            )
            touched |= self._changed(entry_id, before, after)
        if groups:
            touched.update(self._regrouped(groups))
        for node_id in update.changed_node_ids:
            touched.update(self._node_changed(node_id))
        touched.update(self._denied_changed(update))
        for stream in touched:
            if not stream.ended:
                stream.touch(update.seq)

    def _denied_changed(self, update: Update) -> list[NodeStream]:
        """Let everybody know what is refused from now on, and what is not any more."""
        before, self._denied = self._denied, self._directory.denied_authorities()
        others = self._denied != before
        if not (update.revocations or update.released or update.epochs or others):
            return []
        streams = list(self._streams())
        for stream in streams:
            stream.waiting.revoked(update.revocations)
            stream.waiting.release(update.released)
            stream.waiting.raise_epochs(update.epochs)
            if others:
                stream.waiting.denied = self._denied
        return streams

    def _changed(
        self, entry_id: str, before: RegistrationEntry | None, after: RegistrationEntry | None
    ) -> set[NodeStream]:
        touched: set[NodeStream] = set()
        left = self._parent_of(before)
        if before is not None and left is not None:
            left.digest ^= _share(before)
            for stream in left.streams:
                stream.waiting.drop(entry_id)
            touched |= left.streams
        joined = self._parent_of(after)
        if after is not None and joined is not None:
            joined.digest ^= _share(after)
            for stream in joined.streams:
                stream.waiting.put(after)
            touched |= joined.streams
        return touched

    def _regrouped(self, groups: Iterable[SpiffeId]) -> list[NodeStream]:
        """Move the nodes that joined or left these groups; return whose entries that changed."""
        changed = frozenset(groups)
        entries = [group for group in self._directory.groups() if group.spiffe_id in changed]
        moved = []
        for stream in self._streams():
            node = self._directory.node(stream.node_id)
            if node is None:
                continue
            now_in = frozenset(self._authorize.groups_of(node, entries))
            if self._move(stream, (stream.parents - changed) | now_in):
                moved.append(stream)
        return moved

    def _node_changed(self, node_id: SpiffeId) -> list[NodeStream]:
        streams = self._roster.of(node_id)
        try:
            parents = self._authorize.parents(node_id)
        except AuthorizationError as refusal:
            for stream in streams:
                stream.end(refusal)
            self._roster.forget(node_id)
            return []
        return [stream for stream in streams if self._move(stream, parents)]

    def _move(self, stream: NodeStream, parents: frozenset[SpiffeId]) -> bool:
        """Put the node below these parents; return whether that is news to it."""
        before, stream.parents = stream.parents, parents
        news = False
        for parent in before - parents:
            for entry in self._told_of(parent):
                stream.waiting.drop(entry.id)
                news = True
            self._leave(stream, parent)
        for parent in parents - before:
            for entry in self._told_of(parent):
                stream.waiting.put(entry)
                news = True
            self._join(stream, parent)
        return news

    # --- the index by parent ----------------------------------------------------------------------

    def _streams(self) -> Iterator[NodeStream]:
        return (stream for stream in self._roster if not stream.ended)

    def _told_of(self, parent: SpiffeId) -> Iterator[RegistrationEntry]:
        return (entry for entry in self._directory.children(parent) if entry.is_told)

    def _identities(self, stream: NodeStream) -> frozenset[str]:
        """The SPIFFE IDs of the node's entries, made again only when those have changed."""
        digest = self._digest_of(stream)
        if stream.identities is None or stream.identities[0] != digest:
            found = (entry for parent in stream.parents for entry in self._told_of(parent))
            stream.identities = digest, frozenset(str(entry.spiffe_id) for entry in found)
        return stream.identities[1]

    def _is_told_to(self, stream: NodeStream, entry: RegistrationEntry | None) -> bool:
        return entry is not None and entry.parent_id in stream.parents and entry.is_told

    def _parent_of(self, entry: RegistrationEntry | None) -> _Parent | None:
        """Where nodes are told of the entry; None where nobody is."""
        if entry is None or not entry.is_told:
            return None
        return self._parents.get(entry.parent_id)

    def _join(self, stream: NodeStream, parent: SpiffeId) -> None:
        known = self._parents.get(parent)
        if known is None:
            known = self._parents[parent] = _Parent()
            for entry in self._told_of(parent):
                known.digest ^= _share(entry)
        known.streams.add(stream)

    def _leave(self, stream: NodeStream, parent: SpiffeId) -> None:
        known = self._parents.get(parent)
        if known is not None:
            known.streams.discard(stream)
            if not known.streams:
                del self._parents[parent]

    def _digest_of(self, stream: NodeStream) -> int:
        digest = 0
        for parent in stream.parents:
            digest ^= self._parents[parent].digest
        return digest


def _share(entry: RegistrationEntry | None) -> int:
    return 0 if entry is None else entry_digest(entry.id, entry.revision)
