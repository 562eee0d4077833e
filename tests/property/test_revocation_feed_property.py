"""Whatever happens, however often a verifier breaks off: it denies exactly what is to be denied.

And nobody is said to have a revocation who has not applied it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.revocation import (
    IdentityEpoch,
    OrderState,
    RevocationOrder,
    SubjectKind,
)
from identity_broker.domain.selection import Selection
from identity_broker.domain.selector import Selector
from identity_broker.errors import WatchLagged
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.feed import RevocationFeed
from identity_broker.lifecycle.followers import HEARTBEAT_SECONDS, Follower, Hello
from identity_broker.lifecycle.journal import Journal
from identity_broker.lifecycle.propagation import Propagation
from identity_broker.lifecycle.propagation_report import VerifierState
from identity_broker.lifecycle.verifiers import Verifiers
from identity_broker.server.rpc.convert import revocation_feed as convert
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId
from support.store import SettableClock, intent, of, sqlite_url
from support.verbs import DOMAIN, NODE

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SERIALS = [f"{at:040x}" for at in range(5)]
NAMES = ["a", "b", "c"]

_serial = st.sampled_from(SERIALS)
_name = st.sampled_from(NAMES)
_STEPS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "revoke": (8, (_serial,)),
    "release": (5, (_serial,)),
    "raise_epoch": (3, (_serial,)),
    "change_entry": (4, ()),
    "look": (5, ()),
    "follow": (6, (_name,)),
    "acknowledge": (8, (_name, st.integers(1, 3))),
    "leave": (3, (_name,)),
    "pass_time": (3, ()),
    "restart": (1, ()),
    "reread": (1, ()),
    "check": (3, ()),
}
STEPS = st.sampled_from(
    [name for name, (often, _) in _STEPS.items() for _ in range(often)]
).flatmap(lambda name: st.tuples(st.just(name), *_STEPS[name][1]))


@dataclass
class Client:
    """A verifier's side of the stream, as revocation_feed.proto says."""

    name: str
    follower: Follower | None = None
    sequence: int = 0
    denied: set[str] = field(default_factory=set)
    epochs: dict[str, int] = field(default_factory=dict)
    to_acknowledge: list[int] = field(default_factory=list)
    complete: bool = True

    def apply(self, message: pb.FollowResponse) -> None:
        revoked = {item.id for item in message.revoked}
        assert not revoked & set(message.released_ids)
        assert len(revoked) + len(message.released_ids) + len(message.epochs) <= 2
        if message.full:
            self.denied.clear()
            self.epochs.clear()
        else:
            assert message.previous == self.sequence, "a gap"
            assert message.sequence >= self.sequence
        self.denied = (self.denied - set(message.released_ids)) | revoked
        self.epochs.update((one.spiffe_id, one.not_before) for one in message.epochs)
        self.sequence = message.sequence
        self.to_acknowledge.append(message.sequence)
        self.complete = message.complete


class World:
    """A store, a broker's memory, and verifiers that follow it."""

    def __init__(self, folder: Path, migrated: Path, most: int) -> None:
        (folder / "broker.db").write_bytes(migrated.read_bytes())
        (folder / "broker.db").chmod(0o600)
        self.clock = SettableClock(NOW)
        self.store = Store(sqlite_url(folder), clock=self.clock)
        self.most = most
        self.time = 1000.0
        self.entries = 0
        self.clients = {name: Client(name) for name in NAMES}
        self.orders: dict[str, RevocationOrder] = {}

    async def start(self) -> None:
        """As a broker does; also after it was killed."""
        self.directory = Directory(self.store, DOMAIN, self.clock)
        self.directory.journal = Journal(self.most)
        await self.directory.load()
        self.verifiers = Verifiers(monotonic=lambda: self.time)
        self.feed = RevocationFeed(self.directory, self.verifiers, monotonic=lambda: self.time)
        self.propagation = Propagation(
            self.verifiers,
            self.directory,
            self.clock,
            needed=self.feed.needed,
            monotonic=lambda: self.time,
        )
        self.bodies = convert.Bodies()
        for client in self.clients.values():
            client.follower = None
            client.to_acknowledge.clear()

    # --- what is ordered ----------------------------------------------------------------------

    async def revoke(self, serial: str) -> None:
        """Revoke it for certificateHold: that can be taken back."""
        order_id = f"rev-{serial[-2:]}"

        def write(repos: Repositories) -> int:
            repos.credentials.revoke(
                Selection(serial=serial),
                order_id=order_id,
                reason=RevocationReason.CERTIFICATE_HOLD,
                comment="",
                now=NOW,
            )
            return repos.outbox.latest()

        order = RevocationOrder(
            id=order_id,
            subject=of(SubjectKind.SERIAL, serial),
            reason=RevocationReason.CERTIFICATE_HOLD,
            comment="",
            actor="uid:0",
            ordered_at=NOW,
            committed_at=self.clock.now(),
            state=OrderState.COMMITTED,
            sequence=await self.store.write(write),
        )
        self.orders[serial] = order
        self.propagation.begun(order)

    async def release(self, serial: str) -> None:
        self.orders.pop(serial, None)
        await self.store.write(
            lambda repos: repos.credentials.release(f"rev-{serial[-2:]}", NOW, 100)
        )

    async def raise_epoch(self, serial: str) -> None:
        identity = SpiffeId.from_segments(DOMAIN, "workload", serial[-2:])
        epoch = IdentityEpoch(identity, self.clock.now(), NOW + timedelta(hours=1))
        await self.store.write(lambda repos: repos.epochs.raise_to(epoch))

    async def change_entry(self) -> None:
        """What concerns no verifier."""
        self.entries += 1
        entry = RegistrationEntry(
            id=f"e{self.entries}",
            spiffe_id=SpiffeId.from_segments(DOMAIN, "workload", str(self.entries)),
            parent_id=NODE,
            selectors=frozenset({Selector("unix", "uid:1")}),
        )
        await self.store.write(lambda repos: repos.entries.create(entry))

    # --- what happens to the broker -----------------------------------------------------------

    async def look(self) -> None:
        await self.directory.sync()
        await asyncio.sleep(0)
        await self.nobody_is_said_to_have_what_he_has_not()

    async def pass_time(self) -> None:
        self.time += HEARTBEAT_SECONDS

    async def restart(self) -> None:
        await self.start()

    async def reread(self) -> None:
        """The feed no longer reaches back: everything is read anew, under the open streams."""
        await self.directory._start_over()

    # --- what happens to a verifier -----------------------------------------------------------

    async def follow(self, name: str) -> None:
        """Connect if need be, and take what is there, a heartbeat at least."""
        client = self.clients[name]
        if client.follower is None:
            resume = client.sequence if client.complete else 0
            client.follower = await self.feed.open(Hello("uid:0", name, "", resume))
        follower = client.follower
        self.time += HEARTBEAT_SECONDS
        if len(follower._under_way) > 20:
            await self.acknowledge(name, 20)
        try:
            follower._handed_at = self.time - HEARTBEAT_SECONDS
            batch = await self.feed.next(follower)
        except WatchLagged:
            await self.leave(name)
            return
        assert batch is not None
        first = True
        for body, last in self.bodies.of(batch):
            follower.handed(batch.sequence, None, complete=last)
            envelope = convert.to_envelope(
                batch,
                first=first,
                complete=last,
                now=NOW,
                heartbeat=5,
                spread=self.feed.spread,
            )
            client.apply(pb.FollowResponse.FromString(envelope + body))
            first = False

    async def acknowledge(self, name: str, count: int) -> None:
        client = self.clients[name]
        for _ in range(count):
            if client.follower is not None and client.to_acknowledge:
                self.feed.acknowledged(client.follower, client.to_acknowledge.pop(0))
        await self.nobody_is_said_to_have_what_he_has_not()

    async def leave(self, name: str) -> None:
        client = self.clients[name]
        if client.follower is not None:
            self.feed.close(client.follower)
            client.follower = None
            client.to_acknowledge.clear()

    async def nobody_is_said_to_have_what_he_has_not(self) -> None:
        for serial, order in self.orders.items():
            for standing in (await self.propagation.report(order)).verifiers:
                if standing.state is VerifierState.ACKNOWLEDGED:
                    name = standing.verifier.name.rstrip(")")[-1]
                    assert serial in self.clients[name].denied

    async def check(self) -> None:
        """Whoever has heard of everything denies exactly what is to be denied."""
        await self.look()
        denied = {revocation.id for revocation in self.directory.revocations()}
        epochs = {
            str(epoch.spiffe_id): int(epoch.not_before.timestamp())
            for epoch in self.directory.epochs()
        }
        for name, client in self.clients.items():
            await self.follow(name)
            if client.follower is None:
                await self.follow(name)  # it had lagged
            await self.acknowledge(name, 100)
            assert client.denied == denied
            assert client.epochs == epochs
        for order in self.orders.values():
            report = await self.propagation.report(order)
            assert report.acknowledged == len(NAMES), report
            assert not report.silent


async def _play(world: World, steps: list[tuple[Any, ...]]) -> None:
    await world.store.open()
    try:
        validity = {"not_before": NOW, "not_after": NOW + timedelta(hours=1)}
        await world.store.ledger.intend([intent(serial, **validity) for serial in SERIALS])
        await world.start()
        for step in steps:
            name, *arguments = step
            await getattr(world, name)(*arguments)
        await world.check()
    finally:
        await world.store.close()


@given(steps=st.lists(STEPS, min_size=10, max_size=40), most=st.sampled_from([0, 3, 1000]))
def test_a_verifier_denies_exactly_what_is_to_be_denied(
    _migrated_file: Path,  # noqa: PT019
    steps: list[tuple[Any, ...]],
    most: int,
) -> None:
    memory = Path("/dev/shm")
    limit, convert.MOST_ITEMS = convert.MOST_ITEMS, 2
    try:
        with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            asyncio.run(_play(World(Path(folder), _migrated_file, most), steps))
    finally:
        convert.MOST_ITEMS = limit
