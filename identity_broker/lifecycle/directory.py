"""What authorization needs to know, in memory.

- Filled from the store once, then kept fresh by its change feed; no call reads the database to
  be authorized.
- Touched by the event loop's thread alone. Values in it are immutable and swapped whole.
- `sync()` returns when every change committed before the call is reflected (read your writes).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from identity_broker.domain import names
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import Revocation
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import Change, Topic
from identity_broker.domain.node import Node
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.errors import BrokerError, StoreUnavailable, WatchLagged
from identity_broker.lifecycle.denials import MARGIN, Denials, revoked_of
from identity_broker.lifecycle.journal import MOST_CHANGES, Journal, Step
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger
from identity_ca.authority import Authority
from identity_ca.spiffe_id import SpiffeId, TrustDomain

_log = get_logger("directory")

_POLL_SECONDS = 5.0
_RETRY_SECONDS = 0.5
_SILENCE_SECONDS = 3 * _POLL_SECONDS
_LOAD_CHUNK = 500

Listener = Callable[["Update"], None]


class Update:
    """What one step of the change feed changed; handed to the listeners.

    `before` has every entry that changed, as it was (None: it is new); what it is now, the
    directory says. `released` are serials and jtis that are not revoked any more, `blocked_keys`
    fingerprints that are refused from now on.
    """

    __slots__ = (
        "authorities_changed",
        "before",
        "blocked_keys",
        "changed_entries",
        "changed_node_ids",
        "deleted_entry_ids",
        "epochs",
        "released",
        "revocations",
        "seq",
    )

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self.before: dict[str, RegistrationEntry | None] = {}
        self.changed_entries: list[RegistrationEntry] = []
        self.deleted_entry_ids: list[str] = []
        self.revocations: list[Revocation] = []
        self.released: list[str] = []
        self.epochs: list[IdentityEpoch] = []
        self.blocked_keys: list[str] = []
        self.changed_node_ids: list[SpiffeId] = []
        self.authorities_changed = False


@dataclass(frozen=True, slots=True)
class _Stored:
    """The store's state as of `seq`, and what changed after `base`."""

    seq: int
    entries: list[RegistrationEntry]
    nodes: list[Node]
    denials: Denials
    base: int
    recent: list[Change]


@dataclass(frozen=True, slots=True)
class _Changed:
    """What the keys of some changes stand for now."""

    entries: dict[str, RegistrationEntry]
    nodes: dict[SpiffeId, Node | None]
    revocations: list[Revocation]
    epochs: list[IdentityEpoch]
    authorities: list[Authority]


class Directory:
    """Entries and nodes of the trust domain, and what is to be refused in it."""

    def __init__(self, store: Store, trust_domain: TrustDomain, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._broker_id = names.broker_id(trust_domain)
        self._entries: dict[str, RegistrationEntry] = {}
        self._by_parent: dict[SpiffeId, dict[str, RegistrationEntry]] = {}
        self._admins: dict[SpiffeId, dict[str, RegistrationEntry]] = {}
        self._nodes: dict[SpiffeId, Node] = {}
        self._denials = Denials()
        self._listeners: list[Listener] = []
        self._lock = asyncio.Lock()
        self._begun = self._done = 0
        self._followed_at = time.monotonic()
        self._tidied_at = clock.now()
        self.seq = 0
        self.journal = Journal()

    # --- reading ----------------------------------------------------------------------------

    def entry(self, entry_id: str) -> RegistrationEntry | None:
        """Return the entry with that id, or None."""
        return self._entries.get(entry_id)

    def entries(self) -> Iterator[RegistrationEntry]:
        """Yield every entry; the caller must not await in between."""
        return iter(self._entries.values())

    def entry_count(self) -> int:
        """Return how many entries there are."""
        return len(self._entries)

    def node_count(self) -> int:
        """Return how many nodes there are."""
        return len(self._nodes)

    def children(self, parent: SpiffeId) -> Iterable[RegistrationEntry]:
        """Return the entries whose parent is `parent`."""
        return self._by_parent.get(parent, {}).values()

    def groups(self) -> Iterable[RegistrationEntry]:
        """Return the entries that name groups of nodes."""
        return self.children(self._broker_id)

    def node(self, spiffe_id: SpiffeId) -> Node | None:
        """Return the attested node with that ID, or None."""
        return self._nodes.get(spiffe_id)

    def is_revoked(self, credential_id: str) -> bool:
        """Whether the credential with that serial or jti is revoked."""
        return credential_id in self._denials.revocations

    def revocation(self, credential_id: str) -> Revocation | None:
        """Return the revocation of the credential with that serial or jti, or None."""
        return self._denials.revocations.get(credential_id)

    def revocations(self) -> list[Revocation]:
        """Return every revocation whose credential may not have expired yet."""
        return list(self._denials.revocations.values())

    def epochs(self) -> list[IdentityEpoch]:
        """Return the epochs that some JWT-SVID may still be older than."""
        return list(self._denials.epochs.values())

    def epoch(self, spiffe_id: SpiffeId) -> IdentityEpoch | None:
        """Return the identity's epoch, or None."""
        return self._denials.epochs.get(spiffe_id)

    def is_key_blocked(self, fingerprint: str) -> bool:
        """Whether the key with that SHA-256 of its SubjectPublicKeyInfo (hex) is refused."""
        return fingerprint in self._denials.keys

    def denied_authorities(self) -> tuple[str, ...]:
        """Return the ids of the revoked authorities that have not expired, X.509 and JWT."""
        return tuple(sorted(self._denials.authorities))

    def is_admin(self, spiffe_id: SpiffeId, now: datetime) -> bool:
        """Whether a live entry makes this identity an administrator."""
        return any(entry.is_live(now) for entry in self._admins.get(spiffe_id, {}).values())

    # --- following --------------------------------------------------------------------------

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after every update; the returned function stops it."""
        self._listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    async def load(self) -> None:
        """Fill the directory from the store.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        self._hold(await self._read_all())

    async def _read_all(self) -> _Stored:
        now = self._clock.now()

        def read(repos: Repositories) -> _Stored:
            # The position first: what commits while we read is then read again, not missed.
            seq = repos.outbox.latest()
            base = max(repos.outbox.purged_to(), seq - MOST_CHANGES)
            return _Stored(
                seq=seq,
                entries=list(repos.entries.iterate()),
                nodes=repos.nodes.all(),
                denials=Denials(
                    revocations=repos.credentials.revoked_unexpired(now - MARGIN),
                    epochs=repos.epochs.live(now - MARGIN),
                    keys=(key.fingerprint for key in repos.blocked_keys.all()),
                    authorities=repos.authorities.all(),
                ),
                base=base,
                recent=[item for item in repos.outbox.after(base, MOST_CHANGES) if item.seq <= seq],
            )

        return await self._store.read(read)

    def _hold(self, stored: _Stored) -> None:
        self.fill(stored.seq, stored.entries, stored.nodes, stored.denials)
        # Nodes that were connected before the broker restarted need not start over.
        self.journal.prime(stored.base, map(self._step, stored.recent))

    def _step(self, change: Change) -> Step:
        key = change.key
        if change.topic is Topic.ENTRY:
            return Step(change.seq, before={key: self._entries.get(key)})
        if change.topic is Topic.REVOCATION:
            revoked = self._denials.revocations.get(key)
            if revoked is None:
                return Step(change.seq, released=[key])
            return Step(change.seq, revocations=[revoked])
        if change.topic is Topic.EPOCH:
            epoch = self._denials.epochs.get(SpiffeId.parse(key))
            return Step(change.seq, epochs=[] if epoch is None else [epoch])
        return Step(change.seq)

    def fill(
        self,
        seq: int,
        entries: Iterable[RegistrationEntry],
        nodes: Iterable[Node],
        denials: Denials,
    ) -> None:
        """Hold exactly this, as of change `seq`."""
        self._entries, self._by_parent, self._admins = {}, {}, {}
        for entry in entries:
            self._put_entry(entry)
        self._nodes = {node.spiffe_id: node for node in nodes}
        self._denials = denials
        self.seq = seq
        self.journal.restart(seq)

    async def sync(self) -> None:
        """Reflect every change committed before this call.

        Raises:
            StoreUnavailable: the database did not answer; nothing is half-applied.
        """
        begun = self._begun
        async with self._lock:
            if self._done > begun:
                # Somebody else's began after this call, and has ended: a thousand nodes that
                # come back together cost a few reads.
                return
            self._begun += 1
            await self._catch_up()
            self._done = self._begun

    async def _catch_up(self) -> None:
        while True:
            try:
                changes = await self._store.changes.after(self.seq, _LOAD_CHUNK)
            except WatchLagged:
                # The feed no longer reaches back to where we are.
                await self._start_over()
                return
            if not changes:
                return
            await self._apply(changes)
            if len(changes) < _LOAD_CHUNK:
                return

    async def follow(self) -> None:
        """Follow the change feed until cancelled; a store outage is waited out."""
        while True:
            try:
                await self._store.changes.wait(self.seq, _POLL_SECONDS)
                await self.sync()
            except BrokerError as error:
                _log.warning("change feed interrupted", reason=error.reason, detail=error.detail)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:  # noqa: BLE001  # a bug in a listener must not blind the broker
                _log.exception("change feed interrupted")
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._followed_at = time.monotonic()

    async def check(self) -> None:
        """Find out whether the change feed is being followed.

        Raises:
            StoreUnavailable: nothing was heard of it for a while; decisions may be stale.
        """
        silent = time.monotonic() - self._followed_at
        if silent > _SILENCE_SECONDS:
            raise StoreUnavailable(
                "the broker has lost its database's change feed",
                detail=f"silent for {silent:.0f} s",
                retry_after=_RETRY_SECONDS,
            )

    async def forget_expired(self) -> None:
        """Drop what has expired by now anyway.

        A clock that was set back brings credentials back to life: then all is read again.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        now = self._clock.now()
        if now < self._tidied_at:
            async with self._lock:
                await self._start_over()
        self._tidied_at = now
        self._denials.forget(now)

    async def _start_over(self) -> None:
        """Read everything again, and tell the listeners what is different."""
        entries, nodes, denials = self._entries, self._nodes, self._denials
        self._hold(await self._read_all())
        update = Update(self.seq)
        update.changed_entries = [
            entry for entry in self._entries.values() if entries.get(entry.id) != entry
        ]
        update.deleted_entry_ids = [key for key in entries if key not in self._entries]
        update.before = {entry.id: entries.get(entry.id) for entry in update.changed_entries}
        update.before.update((key, entries[key]) for key in update.deleted_entry_ids)
        now = self._denials
        update.revocations = [
            value for key, value in now.revocations.items() if denials.revocations.get(key) != value
        ]
        update.released = [key for key in denials.revocations if key not in now.revocations]
        update.epochs = [
            value for key, value in now.epochs.items() if denials.epochs.get(key) != value
        ]
        update.blocked_keys = sorted(now.keys - denials.keys)
        update.changed_node_ids = [
            key for key in nodes.keys() | self._nodes.keys() if nodes.get(key) != self.node(key)
        ]
        update.authorities_changed = True
        _log.warning("directory started over", sequence=self.seq)
        self._tell(update)

    # --- applying ---------------------------------------------------------------------------

    async def _apply(self, changes: list[Change]) -> None:
        keys: dict[Topic, dict[str, None]] = {}
        for change in changes:
            keys.setdefault(change.topic, {})[change.key] = None
        update = Update(changes[-1].seq)
        changed = await self._store.read(lambda repos: _read(repos, keys))
        for entry_id in keys.get(Topic.ENTRY, ()):
            entry = changed.entries.get(entry_id)
            update.before[entry_id] = self._entries.get(entry_id)
            self._remove_entry(entry_id)
            if entry is None:
                update.deleted_entry_ids.append(entry_id)
            else:
                self._put_entry(entry)
                update.changed_entries.append(entry)
        update.changed_node_ids = list(changed.nodes)
        for spiffe_id, node in changed.nodes.items():
            if node is None:
                self._nodes.pop(spiffe_id, None)
            else:
                self._nodes[spiffe_id] = node
        self._deny(update, changed, keys)
        self.seq = update.seq
        self.journal.note(
            Step(update.seq, update.before, update.revocations, update.released, update.epochs)
        )
        self._tell(update)

    def _deny(
        self, update: Update, changed: _Changed, keys: Mapping[Topic, Mapping[str, None]]
    ) -> None:
        denials = self._denials
        update.revocations = changed.revocations
        for revocation in changed.revocations:
            denials.revocations[revocation.id] = revocation
        revoked = {revocation.id for revocation in changed.revocations}
        update.released = [key for key in keys.get(Topic.REVOCATION, ()) if key not in revoked]
        for credential_id in update.released:
            denials.revocations.pop(credential_id, None)
        update.epochs = changed.epochs
        for epoch in changed.epochs:
            denials.epochs[epoch.spiffe_id] = epoch
        update.blocked_keys = list(keys.get(Topic.KEY, ()))
        denials.keys.update(update.blocked_keys)
        update.authorities_changed = Topic.AUTHORITY in keys
        if update.authorities_changed:
            denials.authorities = revoked_of(changed.authorities)

    def _tell(self, update: Update) -> None:
        for listener in tuple(self._listeners):
            listener(update)

    def _put_entry(self, entry: RegistrationEntry) -> None:
        self._entries[entry.id] = entry
        self._by_parent.setdefault(entry.parent_id, {})[entry.id] = entry
        if entry.admin:
            self._admins.setdefault(entry.spiffe_id, {})[entry.id] = entry

    def _remove_entry(self, entry_id: str) -> None:
        entry = self._entries.pop(entry_id, None)
        if entry is None:
            return
        for index, key in (
            (self._by_parent, entry.parent_id),
            (self._admins, entry.spiffe_id),
        ):
            bucket = index.get(key)
            if bucket is not None:
                bucket.pop(entry_id, None)
                if not bucket:
                    del index[key]


def _read(repos: Repositories, keys: Mapping[Topic, Mapping[str, None]]) -> _Changed:
    revoked_ids = list(keys.get(Topic.REVOCATION, ()))
    identities = [SpiffeId.parse(key) for key in keys.get(Topic.EPOCH, ())]
    return _Changed(
        entries=repos.entries.get_many(list(keys.get(Topic.ENTRY, ()))),
        nodes={
            node_id: repos.nodes.find(node_id)
            for node_id in map(SpiffeId.parse, keys.get(Topic.NODE, ()))
        },
        revocations=repos.credentials.revocations(revoked_ids) if revoked_ids else [],
        epochs=list(repos.epochs.get_many(identities)) if identities else [],
        authorities=repos.authorities.all() if Topic.AUTHORITY in keys else [],
    )
