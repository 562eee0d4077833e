"""Whatever happens, and however often a node breaks off: it has exactly what it may ask for.

And it denies exactly what is to be denied.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from identity_broker.domain import names
from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.node import Node
from identity_broker.domain.revocation import IdentityEpoch, RevocationSubject, SubjectKind
from identity_broker.domain.selection import Selection
from identity_broker.domain.selector import Selector
from identity_broker.errors import AuthorizationError, BrokerError
from identity_broker.lifecycle.authorize import Authorize
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.journal import Journal
from identity_broker.lifecycle.node_stream import News, NodeStream, Resume
from identity_broker.lifecycle.roster import Roster
from identity_broker.lifecycle.sync import NodeSync, entry_digest
from identity_broker.store import Repositories, Store
from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import SpiffeId
from support.store import SettableClock, hold, intent, of, sqlite_url
from support.verbs import DOMAIN, TTL

NOW = datetime(2030, 1, 1, tzinfo=UTC)
BROKER = names.broker_id(DOMAIN)
NODES = [names.node_id(DOMAIN, "join_token", name) for name in "ab"]
GROUPS = [SpiffeId.from_segments(DOMAIN, "group", name) for name in "xy"]
FACTS = [Selector("join_token", f"name:{name}") for name in "ab"]
BUNDLE = TrustBundle(trust_domain=DOMAIN, x509_authorities=(), jwt_keys=())
MINUTE = timedelta(minutes=1)

_ids = st.sampled_from([f"e{at}" for at in range(6)])
_expiry = st.sampled_from([None, None, NOW + MINUTE, NOW + 3 * MINUTE])
_disabled = st.sampled_from([False, False, True])
_facts = st.frozensets(st.sampled_from(FACTS), min_size=1)
_node = st.sampled_from(NODES)
_holds = st.sampled_from(["h0", "h1", "h2"])
_held = st.sampled_from(
    [
        *(of(SubjectKind.ENTRY, f"e{at}") for at in range(3)),
        of(SubjectKind.SPIFFE_ID, f"{DOMAIN.id}/workload/e0"),
        of(SubjectKind.SPIFFE_ID, GROUPS[0]),
        of(SubjectKind.SELECT, f"spiffe-id={DOMAIN.id}/workload/*"),
        of(SubjectKind.NODE, NODES[0]),
    ]
)
SERIALS = [f"{at:040x}" for at in range(4)]
_serial = st.sampled_from(SERIALS)
# How often a step is taken, and with what.
_STEPS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "workload": (8, (_ids, st.sampled_from([*NODES, *GROUPS, *GROUPS]), _disabled, _expiry)),
    "group": (6, (_ids, st.sampled_from(GROUPS), _facts, _disabled, _expiry)),
    "check": (6, ()),
    "delete": (3, (_ids,)),
    "attest": (3, (_node, _facts)),
    "follow": (2, (_node,)),
    "leave": (2, (_node,)),
    "look": (2, ()),
    "move_clock": (3, (st.sampled_from([-2, 1, 1, 2]),)),
    "hold": (4, (_holds, _held)),
    "lift": (3, (_holds,)),
    "revoke": (4, (_serial,)),
    "release": (3, (_serial,)),
    "raise_epoch": (1, (_serial,)),
    "ban": (1, (_node,)),
    "evict": (1, (_node,)),
    "forget": (1, (_node,)),
    "restart": (1, ()),
    "reread": (1, ()),
}
STEPS = st.sampled_from(
    [name for name, (often, _) in _STEPS.items() for _ in range(often)]
).flatmap(lambda name: st.tuples(st.just(name), *_STEPS[name][1]))


@dataclass
class Follower:
    """A node's side of the stream, as node_sync.proto says."""

    node_id: SpiffeId
    stream: NodeStream | None = None
    revision: int = 0
    entries: dict[str, RegistrationEntry] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    epochs: dict[SpiffeId, datetime] = field(default_factory=dict)

    @property
    def digest(self) -> int:
        digest = 0
        for entry in self.entries.values():
            digest ^= entry_digest(entry.id, entry.revision)
        return digest

    def apply(self, news: News) -> None:
        revoked = {item.id for item in news.revocations}
        if news.full:
            self.entries.clear()
            self.denied.clear()
            self.epochs.clear()
        else:
            assert news.previous == self.revision, "a gap"
            assert not {item.id for item in news.changed} & set(news.removed_ids)
            assert not revoked & set(news.released_ids)
        self.denied = (self.denied - set(news.released_ids)) | revoked
        self.epochs.update((epoch.spiffe_id, epoch.not_before) for epoch in news.epochs)
        self.entries.update((entry.id, entry) for entry in news.changed)
        for entry_id in news.removed_ids:
            self.entries.pop(entry_id, None)
        self.revision = news.revision
        assert self.digest == news.entries_digest


class World:
    """A store, a broker's memory, and nodes that follow it."""

    def __init__(self, folder: Path, migrated: Path, most: int) -> None:
        (folder / "broker.db").write_bytes(migrated.read_bytes())
        (folder / "broker.db").chmod(0o600)
        self.clock = SettableClock(NOW)
        self.store = Store(sqlite_url(folder), clock=self.clock)
        self.most = most
        self.followers = {key: Follower(key) for key in NODES}
        self.full = 0

    async def start(self) -> None:
        """As a broker does; also after it was killed."""
        self.directory = Directory(self.store, DOMAIN, self.clock)
        self.directory.journal = Journal(self.most)
        await self.directory.load()
        self.authorize = Authorize(self.directory, DOMAIN, TTL, self.clock)
        self.sync = NodeSync(
            directory=self.directory,
            authorize=self.authorize,
            roster=Roster(),
            trust_domain=DOMAIN,
            clock=self.clock,
            bundle=lambda: BUNDLE,
            lists=lambda: (),
        )
        for follower in self.followers.values():
            follower.stream = None

    async def workload(
        self, entry_id: str, parent: SpiffeId, disabled: bool, expires_at: datetime | None
    ) -> None:
        await self._put(
            RegistrationEntry(
                id=entry_id,
                spiffe_id=SpiffeId.from_segments(DOMAIN, "workload", entry_id),
                parent_id=parent,
                selectors=frozenset({Selector("unix", "uid:1")}),
                disabled=disabled,
                expires_at=expires_at,
            )
        )

    async def group(
        self,
        entry_id: str,
        group: SpiffeId,
        selectors: frozenset[Selector],
        disabled: bool,
        expires_at: datetime | None,
    ) -> None:
        await self._put(
            RegistrationEntry(
                id=entry_id,
                spiffe_id=group,
                parent_id=BROKER,
                selectors=selectors,
                disabled=disabled,
                expires_at=expires_at,
            )
        )

    async def _put(self, entry: RegistrationEntry) -> None:
        def write(repos: Repositories) -> None:
            if repos.entries.get_many([entry.id]):
                repos.entries.replace(entry)
            else:
                repos.entries.create(entry)

        await self._write(write)

    async def delete(self, entry_id: str) -> None:
        await self._write(lambda repos: repos.entries.delete(entry_id))

    async def attest(self, node_id: SpiffeId, selectors: frozenset[Selector]) -> None:
        node = Node(
            spiffe_id=node_id,
            attestor="join_token",
            selectors=selectors,
            attested_at=NOW,
            serial="00" * 20,
            expires_at=NOW + timedelta(hours=1),
            reattestable=False,
        )
        await self._write(lambda repos: repos.nodes.upsert(node))

    async def ban(self, node_id: SpiffeId) -> None:
        await self._write(
            lambda repos: repos.nodes.upsert(replace(repos.nodes.get(node_id), banned=True))
        )

    async def hold(self, name: str, on: RevocationSubject) -> None:
        await self._write(lambda repos: repos.holds.place(hold(name, on, created_at=NOW)))

    async def lift(self, name: str) -> None:
        await self._write(lambda repos: repos.holds.lift(name, NOW, "uid:0"))

    async def revoke(self, serial: str) -> None:
        """Revoke it for certificateHold: that can be taken back."""
        await self._write(
            lambda repos: repos.credentials.revoke(
                Selection(serial=serial),
                order_id=f"rev-{serial[-2:]}",
                reason=RevocationReason.CERTIFICATE_HOLD,
                comment="",
                now=NOW,
            )
        )

    async def release(self, serial: str) -> None:
        await self._write(lambda repos: repos.credentials.release(f"rev-{serial[-2:]}", NOW, 100))

    async def raise_epoch(self, serial: str) -> None:
        identity = SpiffeId.from_segments(DOMAIN, "workload", serial[-2:])
        epoch = IdentityEpoch(identity, self.clock.now(), NOW + timedelta(hours=1))
        await self._write(lambda repos: repos.epochs.raise_to(epoch))

    async def evict(self, node_id: SpiffeId) -> None:
        await self._write(lambda repos: repos.nodes.delete(node_id))

    async def _write(self, write: Any) -> None:
        with suppress(BrokerError):  # there is none, or there is one already
            await self.store.write(write)

    # --- what happens to the broker -----------------------------------------------------------

    async def restart(self) -> None:
        await self.start()

    async def reread(self) -> None:
        """The feed no longer reaches back: everything is read anew, under the open streams."""
        await self.directory._start_over()

    async def move_clock(self, minutes: int) -> None:
        self.clock.time += minutes * MINUTE
        await self.sync.look_at_groups()

    async def look(self) -> None:
        await self.directory.sync()
        await self.sync.look_at_groups()

    # --- what happens to a node ---------------------------------------------------------------

    async def follow(self, node_id: SpiffeId) -> None:
        """Connect if need be, and take what is there."""
        follower = self.followers[node_id]
        try:
            if follower.stream is None:
                resume = Resume(follower.revision, follower.digest) if follower.revision else None
                follower.stream = await self.sync.open(node_id, resume)
            while follower.stream.waiting.steps or follower.stream.ended:
                news = await self.sync.next(follower.stream)
                assert news is not None
                self.full += news.full
                follower.apply(news)
                follower.stream.acknowledge(news.revision)
        except AuthorizationError:
            self.followers[node_id] = Follower(node_id)
            if follower.stream is not None:
                self.sync.close(follower.stream)
                await self.follow(node_id)  # it may be welcome again by now

    async def leave(self, node_id: SpiffeId) -> None:
        follower = self.followers[node_id]
        if follower.stream is not None:
            self.sync.close(follower.stream)
            follower.stream = None

    async def forget(self, node_id: SpiffeId) -> None:
        """The node loses an entry: what it says it has is not what the broker thinks."""
        await self.leave(node_id)
        follower = self.followers[node_id]
        if follower.entries:
            follower.entries.pop(min(follower.entries))

    async def check(self) -> None:
        """Whoever has heard of everything has exactly what he may ask for."""
        await self.look()
        for node_id in NODES:
            await self.follow(node_id)
        now = self.clock.now()
        denied = {revocation.id for revocation in self.directory.revocations()}
        epochs = {epoch.spiffe_id: epoch.not_before for epoch in self.directory.epochs()}
        for node_id, follower in self.followers.items():
            try:
                allowed = self.authorize.entries(node_id)
            except AuthorizationError:
                assert follower.stream is None
                assert not follower.entries
                continue
            assert follower.denied == denied
            assert follower.epochs == epochs
            live = [entry for entry in follower.entries.values() if entry.is_live(now)]
            assert sorted(live, key=lambda entry: entry.id) == allowed


async def _play(world: World, steps: list[tuple[Any, ...]]) -> None:
    await world.store.open()
    try:
        await world.start()
        validity = {"not_before": NOW, "not_after": NOW + timedelta(hours=1)}
        await world.store.ledger.intend([intent(serial, **validity) for serial in SERIALS])
        for node_id in NODES:
            await world.attest(node_id, frozenset(FACTS[:1]))
        await world.check()
        for step in steps:
            name, *arguments = step
            await getattr(world, name)(*arguments)
        await world.check()
    finally:
        await world.store.close()


@given(steps=st.lists(STEPS, min_size=20, max_size=60), most=st.sampled_from([0, 3, 1000]))
def test_a_node_has_exactly_the_entries_it_may_ask_for(
    _migrated_file: Path,  # noqa: PT019
    steps: list[tuple[Any, ...]],
    most: int,
) -> None:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        asyncio.run(_play(World(Path(folder), _migrated_file, most), steps))
