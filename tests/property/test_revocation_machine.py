"""Whatever is revoked, held, lifted, cut off and resumed: what is denied is what must be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.domain.credential import CredentialIntent, RevocationReason
from identity_broker.domain.revocation import (
    OrderState,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.domain.selection import Selection
from identity_broker.errors import BrokerError, StoreUnavailable
from identity_broker.lifecycle import holds as holds_module
from identity_broker.lifecycle import orders as orders_module
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.plan import stops_issuance
from identity_broker.lifecycle.revoke import OrderRequest, Revoke
from identity_broker.store import Store
from identity_ca.spiffe_id import SpiffeId
from support.store import NOW, SettableClock, entry, intent, node, of, put_entry, sqlite_url
from support.verbs import DOMAIN, OPERATOR

LIFE = timedelta(days=9)
HOLD, STOLEN = RevocationReason.CERTIFICATE_HOLD, RevocationReason.KEY_COMPROMISE
NODE = node().spiffe_id
NAMES = ("a", "b", "c")
IDENTITIES = {
    name: SpiffeId.from_segments(DOMAIN, "web" if name == "c" else "shop", name) for name in NAMES
}
KEYS = tuple(digit * 64 for digit in "12")

_subjects = st.sampled_from(
    [
        *(of(SubjectKind.SPIFFE_ID, identity) for identity in IDENTITIES.values()),
        of(SubjectKind.ENTRY, "a"),
        of(SubjectKind.SELECT, "spiffe-id=/shop/*"),
        of(SubjectKind.SELECT, "spiffe-id=/shop/* kind=x509"),
        of(SubjectKind.NODE, NODE),
        *(of(SubjectKind.KEY_FINGERPRINT, key) for key in KEYS),
        *(of(SubjectKind.SERIAL, f"{at:040x}") for at in range(4)),
    ]
)
_STEPS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "issue": (8, (st.sampled_from(NAMES), st.sampled_from(KEYS))),
    "issue_late": (2, (st.sampled_from(NAMES), st.sampled_from(KEYS))),
    "revoke": (
        5,
        (_subjects, st.sampled_from([HOLD, STOLEN]), st.booleans(), st.sampled_from([9, 9, 0, 1])),
    ),
    "lift": (4, (st.integers(0, 5),)),
    "resume": (2, ()),
    "restart": (1, ()),
    "check": (2, ()),
}
STEPS = st.sampled_from(
    [name for name, (often, _) in _STEPS.items() for _ in range(often)]
).flatmap(lambda name: st.tuples(st.just(name), *_STEPS[name][1]))


@dataclass
class Issued:
    """A credential, and whether it is revoked for good."""

    intent: CredentialIntent
    final: bool = False


@dataclass
class Ordered:
    """An order as an operator thinks of it."""

    id: str
    subject: RevocationSubject
    reason: RevocationReason
    held: bool
    at: datetime
    found_until: datetime
    lasts: bool = False
    running: bool = False
    swept: bool = False

    @property
    def selection(self) -> Selection:
        return Selection.of(self.subject)

    @property
    def stops(self) -> bool:
        """Whether nothing is issued to its subject while it lasts."""
        return self.held and stops_issuance(self.selection)

    def covers(self, one: CredentialIntent) -> bool:
        kind, value = self.subject.kind, self.subject.value
        if kind is SubjectKind.SELECT:
            return "/shop/" in str(one.spiffe_id)
        found = {
            SubjectKind.SPIFFE_ID: str(one.spiffe_id),
            SubjectKind.ENTRY: one.entry_id,
            SubjectKind.NODE: str(one.node_id),
            SubjectKind.KEY_FINGERPRINT: one.key_fingerprint,
            SubjectKind.SERIAL: one.id,
        }
        return found[kind] == value


@dataclass
class Model:
    """What should be."""

    issued: dict[str, Issued] = field(default_factory=dict)
    orders: dict[str, Ordered] = field(default_factory=dict)
    blocked: set[str] = field(default_factory=set)

    def stopped(self, one: CredentialIntent) -> list[Ordered]:
        """The lasting orders because of which it must not be issued."""
        return [
            order
            for order in self.orders.values()
            if order.covers(one)
            and ((order.stops and order.lasts) or order.subject.kind is SubjectKind.KEY_FINGERPRINT)
        ]

    def end(self, order: Ordered) -> None:
        """All that the order finds is revoked for good."""
        if order.reason is not HOLD:
            for one in self.issued.values():
                one.final |= order.covers(one.intent)

    def denied(self) -> set[str]:
        """What must be denied."""
        return {
            key
            for key, one in self.issued.items()
            if one.final
            or any(
                order.reason is HOLD
                and order.lasts
                and order.covers(one.intent)
                and (order.stops or one.intent.recorded_at < order.found_until)
                for order in self.orders.values()
            )
        }


class World:
    """A store and a broker's memory, and what should be."""

    def __init__(self, folder: Path, migrated: Path) -> None:
        (folder / "broker.db").write_bytes(migrated.read_bytes())
        (folder / "broker.db").chmod(0o600)
        self.clock = SettableClock(NOW)
        self.store = Store(sqlite_url(folder), clock=self.clock)
        self.model = Model()

    async def start(self) -> None:
        """As a broker does; also after it was killed."""
        self.directory = Directory(self.store, DOMAIN, self.clock)
        await self.directory.load()
        self.revoking = Revoke(
            self.store,
            self.directory,
            self.clock,
            lambda: asyncio.sleep(0),
            revoke_authority=self._no_authority,
        )

    async def _no_authority(self, *_: str) -> None:
        raise AssertionError

    def _intent(self, name: str, key: str) -> CredentialIntent:
        return intent(
            f"{len(self.model.issued):040x}",
            spiffe_id=IDENTITIES[name],
            entry_id=name,
            node_id=NODE,
            key_fingerprint=key,
            recorded_at=self.clock.now(),
            not_before=NOW,
            not_after=NOW + LIFE,
        )

    async def issue(self, name: str, key: str) -> None:
        """What the broker's memory allows is what should be allowed."""
        one = self._intent(name, key)
        known, machine = self.directory.entry(name), self.directory.node(NODE)
        assert known is not None
        assert machine is not None
        allowed = known.is_told and not machine.banned and not self.directory.is_key_blocked(key)
        assert allowed == (not self.model.stopped(one))
        if allowed:
            await self._record(one)

    async def issue_late(self, name: str, key: str) -> None:
        """Another broker had it under way when the order came."""
        one = self._intent(name, key)
        stopping = self.model.stopped(one)
        if not stopping or any(order.swept for order in stopping):
            return
        await self._record(one)
        for order in stopping:
            if order.reason is not HOLD:
                self.model.issued[one.id].final = True

    async def _record(self, one: CredentialIntent) -> None:
        await self.store.ledger.intend([one])
        self.model.issued[one.id] = Issued(one)

    async def revoke(
        self, subject: RevocationSubject, reason: RevocationReason, hold: bool, steps: int
    ) -> None:
        """Give an order that is cut off after some steps."""
        order_id = f"rev-{len(self.model.orders)}"
        stops = stops_issuance(Selection.of(subject))
        held = reason is HOLD or (stops and hold)
        now = self.clock.now()
        order = Ordered(order_id, subject, reason, held, now, now, lasts=held)
        request = OrderRequest(subject, reason, id=order_id, without_hold=not held)
        advance, taken = self.revoking._orders.advance, 0

        async def cut_off(*args: Any, **options: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken > steps:
                raise StoreUnavailable
            return await advance(*args, **options)

        self.revoking._orders.advance = cut_off  # type: ignore[method-assign]
        try:
            answer = await self.revoking.order(request, OPERATOR)
            order.swept = answer.order.swept
        except StoreUnavailable:
            order.running = True
            await self.directory.sync()
        except BrokerError:
            return  # nothing is known of it, or it contradicts itself
        finally:
            self.revoking._orders.advance = advance  # type: ignore[method-assign]
        self.model.orders[order_id] = order
        self.model.end(order)

    async def lift(self, at: int) -> None:
        lasting = [order for order in self.model.orders.values() if order.lasts]
        if not lasting:
            return
        order = lasting[at % len(lasting)]
        lifted = await self.revoking.lift(order.id, OPERATOR)
        assert lifted.hold.lifted_at == self.clock.now()
        before = self.model.denied()
        order.lasts = False
        if all(each.swept for each in self.model.orders.values()):
            assert lifted.released == len(before - self.model.denied())

    async def resume(self) -> None:
        """Time passes, and what was cut off is finished."""
        for order in self.model.orders.values():
            if order.running and not order.stops:
                # It draws no line: what came a moment later is found as well.
                order.found_until = self.clock.now() + timedelta(minutes=1)
                self.model.end(order)
            order.running, order.swept = False, True
        for _ in ("run", "look a second time"):
            self.clock.time += timedelta(minutes=1)
            await self.revoking.close()  # or it would look in two seconds by itself
            await self.revoking.resume()

    async def restart(self) -> None:
        await self.revoking.close()
        await self.start()
        await self.resume()

    async def check(self) -> None:
        """Once all is finished, memory and ledger deny what must be denied."""
        await self.resume()
        await self.directory.sync()
        denied = {revocation.id for revocation in self.directory.revocations()}
        assert denied == self.model.denied()
        other = Directory(self.store, DOMAIN, self.clock)
        await other.load()
        assert {revocation.id for revocation in other.revocations()} == denied
        floors = {epoch.spiffe_id: epoch.not_before for epoch in other.epochs()}
        assert floors == {epoch.spiffe_id: epoch.not_before for epoch in self.directory.epochs()}
        for known in self.model.orders.values():
            order = (await self.revoking.get(known.id)).order
            assert order.swept
            assert order.state is OrderState.COMMITTED
            assert order.sequence <= self.directory.seq
            if known.subject.kind is SubjectKind.SPIFFE_ID and known.reason is STOLEN:
                assert floors[SpiffeId.parse(known.subject.value)] >= known.at


@contextmanager
def _small_steps() -> Iterator[None]:
    """Two credentials in a transaction."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders_module, "STEP", 2)
        patch.setattr(holds_module, "STEP", 2)
        yield


async def _play(world: World, steps: list[tuple[Any, ...]]) -> None:
    await world.store.open()
    try:
        await world.store.write(lambda repos: repos.nodes.upsert(node(expires_at=NOW + LIFE)))
        for name, identity in IDENTITIES.items():
            await world.store.write(put_entry(entry(name, spiffe_id=identity, parent_id=NODE)))
        await world.start()
        for step in steps:
            world.clock.time += timedelta(seconds=1)
            name, *arguments = step
            await getattr(world, name)(*arguments)
        await world.check()
    finally:
        with suppress(AttributeError):
            await world.revoking.close()
        await world.store.close()


@given(steps=st.lists(STEPS, min_size=10, max_size=30))
def test_what_is_denied_is_what_must_be(
    _migrated_file: Path,  # noqa: PT019
    steps: list[tuple[Any, ...]],
) -> None:
    memory = Path("/dev/shm")
    with (
        TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        _small_steps(),
    ):
        asyncio.run(_play(World(Path(folder), _migrated_file), steps))
