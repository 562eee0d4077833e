"""A node against a real broker: begins, renews, proves itself again, follows, survives, resumes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from identity_api.broker.v1 import entry_pb2, entry_pb2_grpc, node_pb2, node_pb2_grpc
from identity_client.attestation import JoinTokenAttestor
from identity_client.clock import utc_now
from identity_client.errors import BrokerUnavailable, IdentityError, SettingsInvalid
from identity_client.keys import KeyPair
from identity_client.node import (
    IssuedJwt,
    IssuedX509,
    JwtRequest,
    NodeKeeper,
    NodePhase,
    X509Request,
)
from support.client import due_now, until
from support.line import RunningBroker, node_id, running, settings_in
from support.machines import MachineCa
from support.node import (
    attested,
    fixed,
    followed,
    kept_node,
    machine,
    machine_broker,
    node_settings,
    present,
    reason_of_node,
)

TABLES: dict[str, Any] = {"ca": {"key_manager": "memory"}}


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """SQLite and keys in memory: what the broker stands on makes no difference to its nodes."""
    async with running(settings_in(tmp_path / "idb", **TABLES)) as running_one:
        yield running_one


@pytest.fixture(scope="module")
def machines() -> MachineCa:
    return MachineCa()


async def evict(broker: RunningBroker, spiffe_id: str) -> None:
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=spiffe_id))


async def ban(broker: RunningBroker, spiffe_id: str) -> None:
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=spiffe_id, reason="test"))


# --- the node -------------------------------------------------------------------------------------


async def test_a_token_makes_a_node_and_its_svid_is_renewed(broker: RunningBroker) -> None:
    changes: list[NodePhase] = []
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    keeper = NodeKeeper(settings, on_change=lambda: changes.append(keeper.status.phase))
    assert keeper.status.phase is NodePhase.ATTESTING
    assert keeper.bundle is None
    async with AsyncExitStack() as stack:
        await keeper.start()
        stack.push_async_callback(keeper.close)
        before = await attested(keeper)
        status = keeper.status
        assert status.node_id == node_id("n1")
        assert status.serial == before
        assert status.expires_at is not None
        assert status.expires_at > utc_now() + timedelta(minutes=50)
        assert status.last_error is None
        assert status.state_problem == ""
        assert "PRIVATE" not in repr(status)
        due_now(keeper)
        await until(lambda: keeper.serial != before)
        assert keeper.status.node_id == node_id("n1")
        assert changes[-1] is NodePhase.ATTESTED
        assert (await keeper.refresh_bundle()).same_keys(present(keeper.bundle))


async def test_orders_are_answered_one_by_one_in_order(broker: RunningBroker) -> None:
    await broker.entry("/web", "n1", id="web", hint="h")
    async with kept_node(
        node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    ) as keeper:
        await keeper.attested()
        pair = KeyPair()
        x509s = await keeper.issue_x509(
            [
                X509Request("web", pair.csr(), instance="pid:7"),
                X509Request("nothing", pair.csr()),
                X509Request("web", b"junk"),
                X509Request("web", pair.csr()),
            ]
        )
        first, missing, broken, last = x509s
        assert isinstance(first, IssuedX509)
        assert isinstance(last, IssuedX509)
        assert isinstance(missing, IdentityError)
        assert isinstance(broken, IdentityError)
        assert missing.reason == "ENTRY_NOT_AUTHORIZED"
        assert broken.reason == "CSR_REJECTED"
        assert first.spiffe_id == "spiffe://example.org/web"
        assert first.hint == "h"
        assert first.not_before < utc_now() < first.not_after
        material, _ = await keeper.checked(first.chain, pair)
        assert material.serial == first.serial
        listed = {one.id: one for one in await broker.ledger(spiffe_id=first.spiffe_id)}
        assert listed.keys() == {first.serial, last.serial}
        assert listed[first.serial].instance == "pid:7"
        jwts = await keeper.issue_jwt(
            [JwtRequest("web", ("a", "b")), JwtRequest("web", ()), JwtRequest("no", ("a",))]
        )
        assert isinstance(jwts[0], IssuedJwt)
        assert jwts[0].token not in repr(jwts[0])
        assert jwts[0].jti
        assert jwts[0].issued_at <= utc_now() < jwts[0].expires_at
        refused = [one.reason for one in jwts[1:] if isinstance(one, IdentityError)]
        assert refused == ["AUDIENCE_INVALID", "ENTRY_NOT_AUTHORIZED"]
        assert await keeper.issue_x509([]) == []


async def test_more_orders_than_a_call_carries_are_several_calls(broker: RunningBroker) -> None:
    await broker.entry("/web", "n1", id="web")
    async with kept_node(
        node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    ) as keeper:
        await keeper.attested()
        orders = [JwtRequest("web" if n == 500 else "none", ("a",)) for n in range(501)]
        outcomes = await keeper.issue_jwt(orders)
        assert len(outcomes) == 501
        assert isinstance(outcomes[500], IssuedJwt)
        assert {one.reason for one in outcomes[:500] if isinstance(one, IdentityError)} == {
            "ENTRY_NOT_AUTHORIZED"
        }


async def test_without_a_broker_orders_are_refused_and_the_node_stays(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", **TABLES)) as broker:
        stack = AsyncExitStack()
        settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
        keeper = await stack.enter_async_context(kept_node(settings))
        refused = await keeper.issue_jwt([JwtRequest("web", ("a",))] * 2)
        assert [type(one).__name__ for one in refused] == ["IdentityNotReady"] * 2
        await attested(keeper)
    async with stack:
        for _ in range(7):
            (outcome,) = await keeper.issue_jwt([JwtRequest("web", ("a",))])
            assert isinstance(outcome, BrokerUnavailable)
        await until(lambda: keeper.status.last_error is not None)
        assert keeper.status.phase is NodePhase.ATTESTED
        assert keeper.status.node_id == node_id("n1")


async def test_a_broker_that_comes_later_finds_its_node(tmp_path: Path) -> None:
    tables: dict[str, Any] = {"ca": {"key_manager": "file"}}
    async with running(settings_in(tmp_path / "idb", **tables)) as broker:
        token = await broker.token("n1")
    async with kept_node(node_settings(broker, JoinTokenAttestor(token))) as keeper:
        await until(lambda: keeper.status.last_error is not None)
        assert keeper.status.phase is NodePhase.ATTESTING
        async with followed(keeper) as held:
            async with running(settings_in(tmp_path / "idb", server=fixed(broker), **tables)):
                await attested(keeper)
                await until(lambda: bool(held.updates))
            assert held.updates[0].full


async def test_anchors_that_cannot_be_had_yet_are_asked_for_again(broker: RunningBroker) -> None:
    asked = 0

    def anchors() -> bytes:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise BrokerUnavailable("the bundle's address does not answer")
        return broker.bundle_pem

    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")), anchors=anchors)
    async with kept_node(settings) as keeper:
        await attested(keeper)
    assert asked == 3
    with pytest.raises(SettingsInvalid):
        await NodeKeeper(replace(settings, anchors=lambda: b"no PEM")).start()


async def test_an_attestor_with_a_bug_is_asked_again(broker: RunningBroker) -> None:
    class Buggy(JoinTokenAttestor):
        calls = 0

        def payload(self) -> bytes:
            self.calls += 1
            if self.calls < 3:
                raise ZeroDivisionError
            return super().payload()

    async with kept_node(node_settings(broker, Buggy(await broker.token("n1")))) as keeper:
        await until(lambda: keeper.status.last_error is not None)
        await attested(keeper)
        assert keeper.status.last_error is None


async def test_a_spent_token_is_refused_and_a_new_one_in_the_file_helps(
    broker: RunningBroker, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    attestor = JoinTokenAttestor(token_file=file)
    async with kept_node(node_settings(broker, attestor)) as keeper:
        await until(lambda: keeper.status.phase is NodePhase.REFUSED)  # there is no such file
        file.write_text("idbt_spent")
        await until(lambda: reason_of_node(keeper) == "JOIN_TOKEN_REJECTED")
        assert keeper.status.phase is NodePhase.REFUSED
        file.write_text(await broker.token("n1"))
        before = await attested(keeper)
        async with followed(keeper) as held:
            await until(lambda: bool(held.updates))
            file.write_text(await broker.token("n1"))
            await evict(broker, node_id("n1"))
            # Nobody has to do anything: the stream's end tells it.
            await until(lambda: keeper.serial not in ("", before), 15)
            await until(lambda: bool(held.reasons) and reason_of_node(keeper) == "", 15)
            assert keeper.status.node_id == node_id("n1")


async def test_an_evicted_node_with_a_spent_token_says_that_it_is_refused(
    broker: RunningBroker,
) -> None:
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    async with kept_node(settings) as keeper:
        await attested(keeper)
        async with followed(keeper) as held:
            await until(lambda: bool(held.updates))
            await evict(broker, node_id("n1"))
            await until(lambda: keeper.status.phase is NodePhase.REFUSED, 15)
            assert reason_of_node(keeper) in {"NODE_UNKNOWN", "CREDENTIAL_REVOKED"}
            assert keeper.status.node_id == node_id("n1")


async def test_a_machine_is_banned_and_evicted_and_comes_back_by_itself(
    tmp_path: Path, machines: MachineCa
) -> None:
    async with (
        machine_broker(tmp_path, machines) as broker,
        kept_node(node_settings(broker, machine(tmp_path, machines))) as keeper,
        followed(keeper) as held,
    ):
        before = await attested(keeper)
        await until(lambda: bool(held.updates))
        node = keeper.status.node_id
        await ban(broker, node)
        await until(lambda: keeper.status.phase is NodePhase.BANNED)
        await until(lambda: "NODE_BANNED" in held.reasons)
        assert keeper.status.node_id == node
        await asyncio.sleep(1)
        assert keeper.status.phase is NodePhase.BANNED
        await evict(broker, node)
        await until(lambda: keeper.status.phase is NodePhase.ATTESTED, 30)
        assert keeper.serial != before
        count = len(held.updates)
        await until(lambda: len(held.updates) > count, 30)


async def test_away_beyond_its_svids_life_a_machine_attests_again(
    tmp_path: Path, machines: MachineCa
) -> None:
    stack = AsyncExitStack()
    async with machine_broker(tmp_path, machines) as broker:
        settings = node_settings(broker, machine(tmp_path, machines))
        keeper = await stack.enter_async_context(kept_node(settings))
        before = await attested(keeper)
    async with stack:
        node = present(keeper._node)
        # Hours later, nobody having answered.
        expired = _Expired(node.material)
        keeper._node = replace(node, material=expired)
        keeper._wake.set()
        await until(lambda: keeper.status.phase is NodePhase.ATTESTING)
        async with machine_broker(tmp_path, machines, server=fixed(broker)):
            await until(lambda: keeper.serial not in ("", before), 20)
            assert keeper.status.phase is NodePhase.ATTESTED


async def test_a_clock_that_was_wrong_for_a_while_costs_a_node_nothing(
    broker: RunningBroker,
) -> None:
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    async with kept_node(settings) as keeper, followed(keeper) as held:
        before = await attested(keeper)
        node = present(keeper._node)
        keeper._node = replace(node, material=_Expired(node.material))
        keeper._wake.set()
        # The token is spent, and the broker would not accept what it believes has expired.
        await until(lambda: keeper.status.phase is NodePhase.REFUSED)
        assert keeper.status.node_id == node_id("n1")
        keeper._node = node
        async with asyncio.timeout(10):
            await keeper.attested()  # and is used again
        assert keeper.status.phase is NodePhase.ATTESTED
        assert keeper.serial == before
        await until(lambda: bool(held.updates))


async def test_renewal_is_due_by_either_clock(broker: RunningBroker) -> None:
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    async with kept_node(settings) as keeper:
        before = await attested(keeper)
        node = present(keeper._node)
        assert not node.is_due
        # The wall clock was set back by a day.
        keeper._node = replace(node, due=node.due + timedelta(days=1), due_tick=0.0)
        keeper._wake.set()
        await until(lambda: keeper.serial != before)


class _Expired:
    """A node SVID whose time has come."""

    def __init__(self, material: Any) -> None:
        self._material = material
        self.not_after = utc_now() - timedelta(seconds=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._material, name)


async def test_a_broker_with_other_roots_is_trusted_by_the_operators_anchors(
    tmp_path: Path, machines: MachineCa
) -> None:
    # While the node was away everything was replaced: the CA, the ledger, the roots.
    stack = AsyncExitStack()
    async with machine_broker(tmp_path, machines) as broker:
        settings = node_settings(broker, machine(tmp_path, machines))
        keeper = await stack.enter_async_context(kept_node(settings))
        held = await stack.enter_async_context(followed(keeper))
        before = await attested(keeper)
        old = present(keeper.bundle)
        await until(lambda: bool(held.updates))
    async with stack:
        # The operator's file is that of the old broker at first: the new one is a stranger.
        kept = broker.settings.server.bundle_file
        async with machine_broker(tmp_path, machines, "new", server=fixed(broker)) as new:
            await until(lambda: reason_of_node(keeper) == "BROKER_TLS_FAILED", 15)
            assert keeper.serial == before
            shutil.copy(new.settings.server.bundle_file, kept)
            await until(lambda: keeper.serial not in ("", before), 40)
            bundle = present(keeper.bundle)
            assert not set(bundle.x509_authorities) & set(old.x509_authorities)
            count = len(held.updates)
            await until(lambda: len(held.updates) > count, 20)


# --- what it is told ------------------------------------------------------------------------------


async def test_what_an_operator_changes_reaches_the_node_at_once(broker: RunningBroker) -> None:
    await broker.entry("/web", "n1", id="web", hint="h")
    await broker.entry("/other", "n2", id="other")
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")), version="9.9")
    async with kept_node(settings) as keeper, followed(keeper) as held:
        await until(lambda: bool(held.updates))
        full = held.updates[0]
        assert full.full
        assert full.bundle is not None
        assert full.crls
        assert [(one.id, one.hint, one.selectors) for one in full.entries] == [
            ("web", "h", ("unix:uid:1000",))
        ]
        await broker.entry("/api", "n1", id="api", per_process=True, key_algorithm="ec-p384")
        await until(lambda: "api" in held.entries)
        assert held.entries["api"].per_process
        assert held.entries["api"].key_algorithm == "ec-p384"
        entries = await broker.stub(entry_pb2_grpc.EntryStub)
        await entries.BatchDelete(entry_pb2.BatchDeleteEntryRequest(ids=["web"]))
        await until(lambda: "web" not in held.entries)
        (issued,) = await keeper.issue_x509([X509Request("api", KeyPair().csr())])
        assert isinstance(issued, IssuedX509)
        await broker.revoke(id=issued.serial)
        await until(lambda: issued.serial in held.revoked)
        await until(lambda: any(one.crls and not one.full for one in held.updates))
        assert not held.reasons


async def test_a_lost_stream_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    tables: dict[str, Any] = {"ca": {"key_manager": "file"}}
    stack = AsyncExitStack()
    async with running(settings_in(tmp_path / "idb", **tables)) as broker:
        await broker.entry("/web", "n1", id="web")
        settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
        keeper = await stack.enter_async_context(kept_node(settings))
        held = await stack.enter_async_context(followed(keeper))
        await until(lambda: "web" in held.entries)
    async with stack:
        await until(lambda: bool(held.reasons))
        assert "web" in held.entries
        async with running(settings_in(tmp_path / "idb", server=fixed(broker), **tables)) as broker:
            await broker.entry("/api", "n1", id="api")
            await until(lambda: "api" in held.entries, 20)
            assert held.entries.keys() == {"web", "api"}
            await until(lambda: keeper.status.last_error is None)


async def test_a_renewed_node_moves_its_stream_without_losing_it(broker: RunningBroker) -> None:
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    async with kept_node(settings) as keeper, followed(keeper) as held:
        await until(lambda: bool(held.updates))
        before = keeper.serial
        due_now(keeper)
        await until(lambda: keeper.serial != before)
        # The old connection is drained and closed; the stream goes on over the new one.
        await until(lambda: len(held.updates) > 1, 15)
        assert not held.updates[-1].full
        await broker.entry("/web", "n1", id="web")
        await until(lambda: "web" in held.entries)
        assert not held.reasons


async def test_resync_brings_the_full_state(broker: RunningBroker) -> None:
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")))
    async with kept_node(settings) as keeper, followed(keeper) as held:
        keeper.resync()  # before there is a stream
        await until(lambda: bool(held.updates))
        keeper.resync()
        await until(lambda: sum(one.full for one in held.updates) == 2)
        assert not held.reasons
