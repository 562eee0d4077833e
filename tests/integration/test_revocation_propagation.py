"""Who has heard of a revocation: `Revocation.Get`, the metrics, and the signed statement."""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from identity_api.broker.v1 import bundle_pb2, revocation_pb2
from identity_broker.lifecycle import propagation
from identity_broker.lifecycle.propagation_report import OBJECTIVE
from identity_ca.bundle import TrustBundle
from identity_ca.errors import StatementRejected
from identity_ca.spiffe_id import TrustDomain
from identity_ca.statement import verify_statement
from support.following import FollowingNode, State, following
from support.line import TRUST_DOMAIN, RunningBroker, node_id, running, settings_in
from support.verifying import (
    FollowingVerifier,
    Known,
    closed,
    status,
    tokens,
    verifying,
    workload,
)

API = f"spiffe://{TRUST_DOMAIN}/api"
ACKNOWLEDGED = revocation_pb2.VERIFIER_STATE_ACKNOWLEDGED
SILENT = revocation_pb2.VERIFIER_STATE_SILENT
GONE = revocation_pb2.VERIFIER_STATE_GONE
AWAY = revocation_pb2.VERIFIER_STATE_AWAY


def settings(tmp_path: Path, **revocation: Any) -> Any:
    return settings_in(tmp_path / "idb", ca={"key_manager": "file"}, revocation=revocation)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    async with running(settings(tmp_path, acknowledge_timeout="3s")) as running_broker:
        yield running_broker


def states(answer: Any) -> dict[str, int]:
    return {one.name: one.state for one in answer.propagation.verifiers}


async def metrics(broker: RunningBroker) -> dict[str, float]:
    """The broker's metrics, by name and labels."""
    text = await _got(broker, "/metrics")
    lines = (line.rpartition(" ") for line in text.decode().splitlines() if line[:1] != "#")
    return {name: float(value) for name, _, value in lines}


async def _got(broker: RunningBroker, path: str) -> bytes:
    url = f"http://{broker.addresses.http_address}{path}"

    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=10) as answer:  # http, ours
            return bytes(answer.read())

    return await asyncio.to_thread(get)


async def test_everybody_who_is_connected_is_named(broker: RunningBroker) -> None:
    node, other = await broker.join("web-1"), await broker.join("web-2")
    entry = await broker.entry("/api", "web-1")
    await broker.entry("/shop", "web-1")
    caller = await workload(broker, node, (await broker.entry("/caller", "web-1")).id)
    svid = (await node.issue(entry.id)).svid
    quiet = f"spiffe://{TRUST_DOMAIN}/caller (quiet)"
    async with (
        following(node) as agent,
        verifying(caller.channel, name="host-1") as verifier,
        verifying(caller.channel, name="quiet") as silent,
    ):
        agent.report(shop=0)
        gone = FollowingVerifier(other.channel, name="gone")
        await gone.update()
        count = await metrics(broker)
        assert count['idb_verifiers_connected{kind="agent"}'] == 1
        assert count['idb_verifiers_connected{kind="workload"}'] == 3
        silent.acknowledges = False
        plan = await (await broker.revocations()).Plan(
            revocation_pb2.PlanRevocationRequest(
                subject=revocation_pb2.RevocationSubject(
                    kind=revocation_pb2.SUBJECT_KIND_SERIAL, value=svid.serial
                )
            )
        )
        assert plan.connected_verifiers == 5
        gone.acknowledges = False
        await broker.revoke(id=svid.serial, order_id="one")
        await gone.message()
        gone.call.cancel()
        await verifier.message()
        await silent.message()
        await agent.until(lambda state: state.revoked)
        agent.report(shop=agent.state.revision)
        waiting = asyncio.create_task(status(broker, "one", 10_000))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        assert states(await status(broker, "one")) == {
            node_id("web-1"): ACKNOWLEDGED,
            f"spiffe://{TRUST_DOMAIN}/caller (host-1)": ACKNOWLEDGED,
            quiet: SILENT,
            f"{node_id('web-2')} (gone)": GONE,
            f"spiffe://{TRUST_DOMAIN}/shop/7": ACKNOWLEDGED,
        }
        silent.acknowledge()
        async with asyncio.timeout(5):
            answer = await waiting
        assert states(answer)[quiet] == ACKNOWLEDGED
        told = answer.propagation
        assert (told.told, told.acknowledged, told.silent, told.gone) == (5, 4, 0, 1)
        by_name = {one.name: one for one in told.verifiers}
        behind = by_name[f"spiffe://{TRUST_DOMAIN}/shop/7"]
        assert (behind.kind, behind.node_id) == ("behind", node_id("web-1"))
        assert by_name[node_id("web-1")].kind == "agent"
        fast = by_name[f"spiffe://{TRUST_DOMAIN}/caller (host-1)"]
        assert fast.kind == "workload"
        assert 0 <= fast.latency_ms < 1000
        assert fast.acknowledged_at_ms >= answer.revocation.committed_at_ms
        assert by_name[quiet].latency_ms > 400
        assert told.verifiers[0].state == GONE  # those to look at first
        assert told.p50_ms <= told.p99_ms == max(one.latency_ms for one in told.verifiers)
        record = await closed(broker, "one")
        assert record.revocation.state == revocation_pb2.REVOCATION_STATE_CLOSED
        count = await metrics(broker)
        outcomes = "idb_revocation_acknowledgements_total"
        assert count[f'{outcomes}{{outcome="within_objective"}}'] == 4
        # It left without a word, and nobody had sent it away.
        assert count[f'{outcomes}{{outcome="never"}}'] == 1
        assert count["idb_revocation_propagation_seconds_count"] == 4


async def test_nobody_waits_for_what_concerns_no_verifier(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    caller = await workload(broker, node, (await broker.entry("/caller", "web-1")).id)
    async with following(node), verifying(caller.channel):
        async with asyncio.timeout(4):
            await broker.revoke(key="ab" * 32, order_id="key")
            answer = await status(broker, "key", 10_000)
        assert answer.propagation.acknowledged == answer.propagation.told == 2
        assert answer.propagation.p99_ms < 1000


async def test_two_of_one_name_are_two(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    svid = (await node.issue((await broker.entry("/api", "web-1")).id)).svid
    admin = await broker.admin()
    async with verifying(admin, name="x") as one, verifying(admin, name="x") as two:
        two.acknowledges = False
        await broker.revoke(id=svid.serial, order_id="one")
        await one.message()
        await two.message()
        await asyncio.sleep(0.3)
        found = states(await status(broker, "one"))
        assert found.pop(node_id("web-1")) == AWAY  # it is joined, and does not follow
        assert sorted(found.values()) == [ACKNOWLEDGED, SILENT]


async def test_a_state_in_several_messages_counts_when_all_are_acknowledged(
    broker: RunningBroker,
) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    await tokens(node, entry.id, 1500)
    await broker.revoke(entry=entry.id, order_id="many")
    async with asyncio.timeout(20):
        while (await status(broker, "many")).revocation.state == 1:
            await asyncio.sleep(0.05)
    verifier = FollowingVerifier(await broker.admin(), acknowledges=False)
    await verifier.update()
    verifier.acknowledge()
    await asyncio.sleep(0.3)
    assert (await status(broker, "many")).propagation.acknowledged == 0
    verifier.acknowledge()
    async with asyncio.timeout(5):
        while (await status(broker, "many")).propagation.acknowledged == 0:
            await asyncio.sleep(0.02)
    verifier.call.cancel()


async def test_after_a_restart_positions_say_who_has_it(tmp_path: Path) -> None:
    chosen = settings(tmp_path, acknowledge_timeout="60s")
    async with running(chosen) as broker:
        node = await broker.join("web-1")
        caller = await workload(broker, node, (await broker.entry("/caller", "web-1")).id)
        svid = (await node.issue((await broker.entry("/api", "web-1")).id)).svid
        async with verifying(caller.channel, name="host-1") as verifier:
            known = verifier.known
        await broker.revoke(id=svid.serial, order_id="one")
    async with running(chosen) as broker:
        back = await caller.back(broker)
        name = f"spiffe://{TRUST_DOMAIN}/caller (host-1)"
        async with verifying(back.channel, known, name="host-1"):
            async with asyncio.timeout(5):
                answer = await status(broker, "one", 3000)
                while states(answer) != {name: ACKNOWLEDGED, node_id("web-1"): AWAY}:
                    answer = await status(broker, "one", 3000)
            assert {one.latency_ms for one in answer.propagation.verifiers} == {-1}
            assert not any(one.acknowledged_at_ms for one in answer.propagation.verifiers)
            assert answer.propagation.within_objective_permille == -1
            assert svid.serial in known.revoked
        async with verifying(back.channel, Known(), name="host-2", acknowledges=False):
            answer = await status(broker, "one")
            late = f"spiffe://{TRUST_DOMAIN}/caller (host-2)"
            assert states(answer) == {name: ACKNOWLEDGED, late: SILENT, node_id("web-1"): AWAY}


async def test_old_orders_are_answered_from_positions(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propagation, "MOST_ORDERS", 1)
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    async with following(node) as agent, verifying(await broker.admin()) as verifier:
        for name in ("first", "second"):
            svid = (await node.issue(entry.id)).svid
            await broker.revoke(id=svid.serial, order_id=name)
            await verifier.message()
            await agent.until(lambda state, serial=svid.serial: serial in state.revoked)
        second = await status(broker, "second", 5000)
        first = await status(broker, "first")
        assert first.propagation.acknowledged == second.propagation.acknowledged == 2
        assert {one.latency_ms for one in first.propagation.verifiers} == {-1}
        assert all(one.latency_ms >= 0 for one in second.propagation.verifiers)


# --- who was away, and who left -------------------------------------------------------------------


async def test_a_node_that_was_away_is_named_until_it_is_back_and_has_it(
    broker: RunningBroker,
) -> None:
    one, two = await broker.join("web-1"), await broker.join("web-2")
    serial = (await one.issue((await broker.entry("/jobs/api", "web-1")).id)).svid.serial
    jtis = await tokens(two, (await broker.entry("/jobs/night", "web-2")).id, 1)
    await broker.join("web-3")  # nothing was issued through it
    state = State()
    async with following(two, state):
        pass
    async with following(one) as agent:
        await broker.revoke(select=f"spiffe-id=spiffe://{TRUST_DOMAIN}/jobs/*", order_id="all")
        await agent.until(lambda state: serial in state.revoked)
        answer = await status(broker, "all", 10_000)
        told = answer.propagation
        assert states(answer) == {node_id("web-1"): ACKNOWLEDGED, node_id("web-2"): AWAY}
        assert (told.told, told.acknowledged, told.away) == (1, 1, 1)
        assert told.within_objective_permille == 1000
        statement = (await closed(broker, "all")).statement
        async with following(two, state) as back:
            await back.until(lambda state: {serial, *jtis} <= state.revoked)
            async with asyncio.timeout(5):
                while states(answer := await status(broker, "all"))[node_id("web-2")] != (
                    ACKNOWLEDGED
                ):
                    await asyncio.sleep(0.05)
        again = {each.name: each for each in answer.propagation.verifiers}[node_id("web-2")]
        committed_at = answer.revocation.committed_at_ms
        assert again.latency_ms > 1000
        assert abs(again.acknowledged_at_ms - committed_at - again.latency_ms) < 500
        assert (answer.propagation.away, answer.propagation.told) == (0, 2)
        assert answer.propagation.p99_ms < 1000  # it was not connected: it slowed nobody down
    stated = json.loads(_decoded(json.loads(statement)["payload"]))["propagation"]
    assert (stated["told"], stated["away"]) == (1, 1)
    assert [each["name"] for each in stated["verifiers"] if each["state"] == "away"] == [
        node_id("web-2")
    ]


async def test_a_node_that_is_revoked_while_it_is_away_is_named(broker: RunningBroker) -> None:
    await broker.join("web-1")
    await broker.revoke(node=node_id("web-1"), order_id="node")
    answer = await status(broker, "node", 1000)
    assert states(answer) == {node_id("web-1"): AWAY}
    assert (answer.propagation.told, answer.propagation.within_objective_permille) == (0, -1)


async def test_who_the_broker_sends_away_is_no_failure(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    caller = await workload(broker, node, (await broker.entry("/caller", "web-1")).id)
    other = await broker.join("web-2")
    async with following(other) as heard, verifying(caller.channel) as verifier:
        verifier.acknowledges = False
        agent = FollowingNode(node.channel, acknowledges=False)
        await agent.update()
        await broker.revoke(node=node_id("web-1"), order_id="node")
        await heard.until(lambda state: state.revoked)
        assert (await verifier.refusal()).code() is grpc.StatusCode.PERMISSION_DENIED
        async with asyncio.timeout(5):
            while (answer := await status(broker, "node")).propagation.gone < 2:
                await asyncio.sleep(0.05)
        agent.call.cancel()
        assert states(answer) == {
            node_id("web-1"): GONE,
            f"spiffe://{TRUST_DOMAIN}/caller": GONE,
            node_id("web-2"): ACKNOWLEDGED,
        }
        assert answer.propagation.within_objective_permille == 1000
        await closed(broker, "node")
    count = await metrics(broker)
    assert 'idb_revocation_acknowledgements_total{outcome="never"}' not in count


# --- the statement --------------------------------------------------------------------------------


async def test_each_revocation_ends_with_a_statement_that_anybody_can_verify(
    broker: RunningBroker,
) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    jtis = await tokens(node, entry.id, 2)
    async with verifying(node.channel, name="n1"):
        await broker.revoke(
            spiffe_id=API, order_id="one", reason=1, comment="laptop stolen — Zürich"
        )
        statement = (await closed(broker, "one")).statement
    published = await _got(broker, "/bundle")
    domain = TrustDomain(TRUST_DOMAIN)
    stated = verify_statement(statement, TrustBundle.from_spiffe_json(domain, published))
    ids = sorted([svid.serial, *jtis])
    assert stated["version"] == 1
    assert stated["trust_domain"] == TRUST_DOMAIN
    assert stated["broker"] == f"spiffe://{TRUST_DOMAIN}/idb/broker"
    assert stated["credentials"] == {
        "count": 3,
        "sha256": hashlib.sha256("".join(f"{one}\n" for one in ids).encode()).hexdigest(),
        "ids": ids,
    }
    order = stated["revocation"]
    assert order["id"] == "one"
    assert order["subject"] == {"kind": "spiffe-id", "value": API}
    assert order["reason"] == "key_compromise"
    assert order["comment"] == "laptop stolen — Zürich"
    assert order["revoked"] == 3
    assert order["held_entry_ids"] == [entry.id]
    assert order["ordered_at"] <= order["committed_at"] <= stated["issued_at"]
    told = stated["propagation"]
    assert (told["told"], told["away"], told["verifiers_left_out"]) == (1, 1, 0)
    verifier, away = sorted(told["verifiers"], key=lambda one: str(one["kind"]), reverse=True)
    assert verifier["name"] == f"{node_id('web-1')} (n1)"
    # Through it all was issued, and its agent does not follow.
    assert (away["name"], away["state"]) == (node_id("web-1"), "away")
    assert away["acknowledged_at"] is None
    with pytest.raises(StatementRejected):
        verify_statement(
            statement.replace('"payload": "ey', '"payload": "eyI'),
            TrustBundle.from_spiffe_json(domain, published),
        )
    # What the CLI shows of the bundle is as good.
    bundles = await broker.bundles()
    answer = await bundles.Get(bundle_pb2.GetBundleRequest())
    assert {key.key_id for key in answer.bundle.jwt_keys} >= {
        json.loads(_decoded(json.loads(statement)["protected"]))["kid"]
    }


def _decoded(part: str) -> bytes:
    from base64 import urlsafe_b64decode

    return urlsafe_b64decode(part + "=" * (-len(part) % 4))


async def test_a_statement_waits_for_the_silent_and_names_them(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    svid = (await node.issue((await broker.entry("/api", "web-1")).id)).svid
    async with verifying(await broker.admin(), name="mute", acknowledges=False):
        await broker.revoke(id=svid.serial, order_id="one")
        await asyncio.sleep(2)
        assert not (await status(broker, "one")).statement
        statement = (await closed(broker, "one")).statement
    payload = json.loads(_decoded(json.loads(statement)["payload"]))
    verifier, away = payload["propagation"]["verifiers"]
    assert verifier["state"] == "silent"
    assert away["state"] == "away"
    assert verifier["acknowledged_at"] is None
    assert payload["propagation"]["silent"] == 1
    count = await metrics(broker)
    assert count['idb_revocation_acknowledgements_total{outcome="never"}'] == 1


async def test_an_authority_that_ends_does_not_sign_its_own_statement(
    broker: RunningBroker,
) -> None:
    first = await closed_with(broker, "before")
    kid = json.loads(_decoded(json.loads(first)["protected"]))["kid"]
    await broker.revoke(authority=kid, order_id="authority")
    statement = (await closed(broker, "authority")).statement
    published = await _got(broker, "/bundle")
    bundle = TrustBundle.from_spiffe_json(TrustDomain(TRUST_DOMAIN), published)
    assert verify_statement(statement, bundle)["revocation"]["subject"]["value"] == kid
    with pytest.raises(StatementRejected):
        verify_statement(first, bundle)


async def closed_with(broker: RunningBroker, order_id: str) -> str:
    await broker.revoke(key=hashlib.sha256(order_id.encode()).hexdigest(), order_id=order_id)
    return str((await closed(broker, order_id)).statement)


async def test_what_was_left_open_is_closed_after_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("identity_broker.lifecycle.statement._OTHERS", OBJECTIVE)
    chosen = settings(tmp_path, acknowledge_timeout="1s")
    async with running(chosen) as broker:
        await broker.revoke(key="cd" * 32, order_id="one")
        assert not (await status(broker, "one")).statement
    async with running(chosen) as broker:
        assert (await closed(broker, "one")).statement
