"""JWT-SVIDs while the broker is slow or silent, and while the entries change under way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import pytest

from identity_broker.agent import tokens as module
from identity_broker.agent.identities import Identities
from identity_broker.agent.identity import JwtIdentity
from identity_broker.agent.mirror import Mirror
from identity_broker.agent.svids import Svids
from identity_broker.agent.tokens import Tokens
from identity_broker.domain.selector import Selector
from identity_broker.errors import AgentNotReady, AudienceInvalid, CallerUnknown, NoIdentity
from identity_broker.localpeer.process import LiveProcess
from identity_broker.telemetry.metrics import AgentMetrics
from identity_ca.spiffe_id import SpiffeId
from identity_client.errors import BrokerUnavailable, IdentityError, RequestRejected
from identity_client.node.values import (
    IssuedJwt,
    IssuedX509,
    JwtRequest,
    SyncedBundle,
    SyncedEntry,
    SyncedJwtKey,
    SyncUpdate,
    X509Request,
    entry_digest,
)
from support.store import SettableClock
from support.workload_identities import FakeIdentities

TTL = timedelta(minutes=5)
WEB = SyncedEntry("web", 1, "spiffe://example.org/web", ("unix:uid:0",))
EARLY, LATE = (datetime(2020, 1, day, tzinfo=UTC) for day in (1, 2))


class SlowNode:
    """A node whose broker answers when it is told to.

    Attributes:
        answers: cleared: the broker is silent.
        error: what it answers instead of a token.
    """

    def __init__(self, clock: SettableClock) -> None:
        self.clock = clock
        self.authority = FakeIdentities(clock=clock)
        self.entries: dict[str, SyncedEntry] = {}
        self.answers = asyncio.Event()
        self.answers.set()
        self.error: IdentityError | None = None
        self.orders: list[str] = []

    async def issue_x509(self, orders: Sequence[X509Request]) -> list[IssuedX509 | IdentityError]:
        raise AssertionError("nobody asked for one")

    async def issue_jwt(self, orders: Sequence[JwtRequest]) -> list[IssuedJwt | IdentityError]:
        self.orders += [order.entry_id for order in orders]
        ids = [SpiffeId.parse(self.entries[order.entry_id].spiffe_id) for order in orders]
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        issuer = self.authority._authorities[0].jwt
        issued: list[IssuedJwt | IdentityError] = []
        for spiffe_id, order in zip(ids, orders, strict=True):
            made = issuer.sign(
                issuer.prepare(
                    spiffe_id=spiffe_id, audiences=order.audiences, ttl=TTL, now=self.clock.now()
                )
            )
            issued.append(
                IssuedJwt(
                    made.token, str(spiffe_id), made.jti, self.clock.now(), made.not_after, ""
                )
            )
        return issued


@dataclass(frozen=True)
class Root:
    """What is known of every process here."""

    selectors: frozenset[Selector] = frozenset({Selector("unix", "uid:0")})
    problems: tuple[str, ...] = ()


class Attests:
    async def attest(self, process: object, wanted: object) -> Root:
        return Root()


class Caller:
    """This very process; gone when told so."""

    def __init__(self) -> None:
        self.process = LiveProcess.of_pid(os.getpid())
        self.uid = 0
        self.gone = False
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        if self.gone:
            raise CallerUnknown

    async def ended(self) -> None:
        await asyncio.Event().wait()


class Machine:
    """An agent's parts that JWT-SVIDs pass through."""

    def __init__(self) -> None:
        self.clock = SettableClock()
        self.node = SlowNode(self.clock)
        self.connected = True
        bundle = self.node.authority.bundle
        self.mirror = Mirror(bundle.trust_domain)
        self._bundle = SyncedBundle(
            "example.org",
            tuple(bundle.x509_authorities),
            tuple(
                SyncedJwtKey(key.key_id, key.public_key_der, self.clock.now() + timedelta(days=30))
                for key in bundle.jwt_keys
            ),
            1,
            timedelta(minutes=1),
        )
        self.revision = 0
        metrics = AgentMetrics()
        self.tokens = Tokens(
            node=self.node,
            mirror=self.mirror,
            clock=self.clock,
            metrics=metrics,
            limit=10,
            is_connected=lambda: self.connected,
        )
        svids = Svids(10, lambda: 0.5)
        self.identities = Identities(
            mirror=self.mirror,
            svids=svids,
            tokens=self.tokens,
            attestation=Attests(),
            clock=self.clock,
            metrics=metrics,
            wake=lambda: None,
        )
        self.caller = Caller()

    def know(self, *entries: SyncedEntry) -> None:
        """These are the node's entries from now on."""

        async def acknowledged(_revision: int) -> None: ...

        digest = 0
        for entry in entries:
            digest ^= entry_digest(entry.id, entry.revision)
        self.revision += 1
        self.node.entries = {entry.id: entry for entry in entries}
        changed = self.mirror.apply(
            SyncUpdate(
                revision=self.revision,
                previous=0,
                full=True,
                entries=entries,
                removed_ids=(),
                bundle=self._bundle,
                revocations=(),
                released_ids=(),
                epochs=(),
                denied_authorities=(),
                crls=(),
                entries_digest=digest,
                sent_at=self.clock.now(),
                _acknowledge=acknowledged,
            ),
            now=self.clock.now(),
            tick=0.0,
        )
        self.tokens.follow(changed.entries)

    async def ask(self, spiffe_id: str | None = None) -> list[JwtIdentity]:
        return await self.identities.jwt_svids(self.caller, ["a"], spiffe_id)


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.know(WEB)
    return machine


async def past_half_life(machine: Machine) -> str:
    """A token that is due to be replaced."""
    (first,) = await machine.ask()
    machine.clock.time += TTL * 0.6
    return first.token


# --- a broker that is slow, silent or away --------------------------------------------------------


async def test_what_is_valid_is_handed_out_soon_while_the_broker_is_silent(
    machine: Machine,
) -> None:
    held = await past_half_life(machine)
    machine.node.answers.clear()
    started = monotonic()
    assert [each.token for each in await machine.ask()] == [held]
    assert monotonic() - started < 1
    # Nobody waits anew for an order that has been late already.
    started = monotonic()
    for _ in range(20):
        assert [each.token for each in await machine.ask()] == [held]
    assert monotonic() - started < 1
    assert len(machine.node.orders) == 2
    machine.node.answers.set()
    await asyncio.sleep(0.05)
    assert [each.token for each in await machine.ask()] != [held]
    assert len(machine.node.orders) == 2
    await machine.tokens.close()


async def test_a_better_token_that_comes_soon_is_handed_out(machine: Machine) -> None:
    held = await past_half_life(machine)
    assert [each.token for each in await machine.ask()] != [held]


async def test_after_a_failure_nothing_is_ordered_for_a_while_for_who_has_something(
    machine: Machine, monkeypatch: Any
) -> None:
    held = await past_half_life(machine)
    machine.node.error = BrokerUnavailable("away")
    for _ in range(20):
        assert [each.token for each in await machine.ask()] == [held]
    assert len(machine.node.orders) == 2
    with pytest.raises(AgentNotReady):  # who has nothing is not held back
        await machine.identities.jwt_svids(machine.caller, ["b"], None)
    assert len(machine.node.orders) == 3
    machine.node.error = None
    later = monotonic() + module._LONGEST_HOLD.total_seconds()
    monkeypatch.setattr(module, "monotonic", lambda: later)
    assert [each.token for each in await machine.ask()] != [held]


async def test_who_has_nothing_is_told_soon_while_the_stream_is_broken(
    machine: Machine, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "_LOST_SECONDS", 0.1)
    machine.node.answers.clear()
    machine.connected = False
    started = monotonic()
    with pytest.raises(AgentNotReady):
        await machine.ask()
    assert monotonic() - started < 1
    machine.node.answers.set()
    await asyncio.sleep(0.05)  # the order flew on
    assert len(await machine.ask()) == 1
    assert len(machine.node.orders) == 1


async def test_what_was_revoked_meanwhile_is_not_handed_out(machine: Machine) -> None:
    await past_half_life(machine)
    machine.node.answers.clear()
    asking = asyncio.create_task(machine.ask())
    await asyncio.sleep(0.05)
    machine.tokens.clear()
    await asyncio.sleep(0.3)
    assert not asking.done()
    machine.node.answers.set()
    assert len(await asking) == 1


async def test_what_the_broker_refuses_late_is_handed_out_no_more(machine: Machine) -> None:
    held = await past_half_life(machine)
    machine.node.answers.clear()
    assert [each.token for each in await machine.ask()] == [held]
    machine.node.error = RequestRejected("no", reason="AUDIENCE_INVALID")
    machine.node.answers.set()
    await asyncio.sleep(0.05)
    with pytest.raises(AudienceInvalid):
        await machine.ask()
    assert len(machine.tokens) == 0


# --- entries that change under way ----------------------------------------------------------------


async def test_a_token_ordered_before_its_entry_went_is_neither_handed_out_nor_held(
    machine: Machine,
) -> None:
    machine.node.answers.clear()
    asking = asyncio.create_task(machine.ask())
    await asyncio.sleep(0.01)
    assert machine.node.orders == ["web"]
    machine.know()
    machine.node.answers.set()
    with pytest.raises(NoIdentity):
        await asking
    assert len(machine.tokens) == 0


async def test_a_token_ordered_before_its_entry_changed_is_ordered_anew(machine: Machine) -> None:
    machine.node.answers.clear()
    asking = asyncio.create_task(machine.ask())
    await asyncio.sleep(0.01)
    machine.know(replace(WEB, revision=2, hint="new"))
    machine.node.answers.set()
    (given,) = await asking
    assert given.hint == "new"
    assert machine.node.orders == ["web", "web"]
    assert len(machine.tokens) == 1


async def test_what_is_matched_no_more_is_not_handed_out_with_the_rest(machine: Machine) -> None:
    api = replace(WEB, id="api", spiffe_id="spiffe://example.org/api")
    machine.know(WEB, api)
    machine.node.answers.clear()
    asking = asyncio.create_task(machine.ask())
    await asyncio.sleep(0.01)
    machine.know(replace(WEB, revision=2, selectors=("unix:uid:1",)), api)
    machine.node.answers.set()
    assert [each.spiffe_id for each in await asking] == [api.spiffe_id]


async def test_entries_that_never_settle_are_not_waited_for(machine: Machine) -> None:
    machine.node.answers.clear()
    asking = asyncio.create_task(machine.ask())
    for revision in range(2, 10):
        await asyncio.sleep(0.01)
        machine.know(replace(WEB, revision=revision))
        machine.node.answers.set()
        await asyncio.sleep(0)
        machine.node.answers.clear()
        if asking.done():
            break
    with pytest.raises(AgentNotReady):
        async with asyncio.timeout(1):
            await asking


# --- who gets it ----------------------------------------------------------------------------------


@pytest.mark.clause("API-20")
async def test_the_default_comes_first_though_a_younger_entry_has_the_same_spiffe_id(
    machine: Machine,
) -> None:
    first = replace(WEB, created_at=EARLY)
    api = replace(WEB, id="api", spiffe_id="spiffe://example.org/api", created_at=LATE)
    again = replace(WEB, id="zebra", created_at=LATE + timedelta(days=1))
    machine.know(again, api, first)
    for _ in range(2):  # ordered, then from memory
        found = [each.spiffe_id for each in await machine.ask()]
        assert found == [WEB.spiffe_id, api.spiffe_id]
    assert sorted(machine.node.orders) == ["api", "web"]


async def test_a_process_that_ended_while_a_token_was_made_gets_none(machine: Machine) -> None:
    machine.node.answers.clear()
    asking = asyncio.create_task(machine.ask())
    await asyncio.sleep(0.01)
    machine.caller.gone = True
    machine.node.answers.set()
    with pytest.raises(CallerUnknown):
        await asking


async def test_what_is_at_hand_costs_no_second_look_at_the_process(machine: Machine) -> None:
    await machine.ask()
    before = machine.caller.checks
    await machine.ask()
    assert machine.caller.checks == before
