"""Who follows through a node, as the node says: heard for its own workloads, and not too often."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_broker.server.rpc.convert import node_sync as convert
from identity_ca.spiffe_id import TrustDomain
from support.following import FollowingNode, following
from support.line import TRUST_DOMAIN, RunningBroker, reason_of, running, settings_in
from support.verifying import status, verifying


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
    async with running(settings) as running_broker:
        yield running_broker


def name_of(path: str, process: int = 7) -> str:
    return f"spiffe://{TRUST_DOMAIN}/{path}/{process}"


def message(*names: str, revision: int = 0) -> pb.SyncRequest:
    told = [pb.SyncRequest.Verifier(name=name, revision=revision) for name in names]
    return pb.SyncRequest(verifiers=pb.SyncRequest.Verifiers(verifiers=told))


async def refused(broker: RunningBroker, reason: str) -> int:
    """How many streams of nodes were."""

    def read() -> str:
        url = f"http://{broker.addresses.http_address}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:  # http, ours
            return bytes(answer.read()).decode()

    text = await asyncio.to_thread(read)
    found = [
        line
        for line in text.splitlines()
        if line.startswith("idb_rpc_total{") and "NodeSync/Sync" in line and f'"{reason}"' in line
    ]
    return int(sum(float(line.rpartition(" ")[2]) for line in found))


async def behind(broker: RunningBroker) -> set[str]:
    """Those behind nodes, as a revocation made now finds them."""
    node = await broker.join("witness")
    await broker.entry("/witness", "witness")
    entries = (await node.issue((await broker.entry("/again", "witness")).id)).svid
    answer = await broker.revoke(id=entries.serial)
    found = await status(broker, answer.revocation.id)
    return {one.name for one in found.propagation.verifiers if one.kind == "behind"}


async def test_a_node_speaks_for_workloads_of_its_own_entries_alone(broker: RunningBroker) -> None:
    node, other = await broker.join("web-1"), await broker.join("web-2")
    await broker.entry("/shop", "web-1")
    await broker.entry("/cart", "web-1")
    await broker.entry("/bank", "web-2")
    async with following(node) as liar, following(other) as honest:
        honest.report(bank=0)
        liar.say(message(*map(name_of, ("shop", "bank", "none", "cart")), name_of("bank", 8)))
        await asyncio.sleep(0.2)
        assert await behind(broker) == {name_of("shop"), name_of("cart"), name_of("bank")}


async def test_one_that_was_let_in_stays_though_its_entry_is_held(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    await broker.entry("/shop", "web-1")
    async with following(node) as agent:
        agent.report(shop=0)
        await asyncio.sleep(0.1)
        await broker.revoke(spiffe_id=f"spiffe://{TRUST_DOMAIN}/shop", order_id="one")
        await agent.until(lambda state: state.epochs)
        agent.say(message(name_of("shop"), name_of("shop", 8), revision=agent.state.revision))
        await asyncio.sleep(0.2)
        found = await status(broker, "one")
        names = {one.name for one in found.propagation.verifiers if one.kind == "behind"}
        assert names == {name_of("shop")}


async def test_of_many_reports_the_newest_counts(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    from_verifiers = convert.from_verifiers

    def counting(message: pb.SyncRequest.Verifiers, domain: TrustDomain) -> dict[str, int]:
        parsed.append(len(message.verifiers))
        return from_verifiers(message, domain)

    monkeypatch.setattr(convert, "from_verifiers", counting)
    node = await broker.join("web-1")
    await broker.entry("/shop", "web-1")
    async with following(node) as agent:
        began = time.monotonic()
        for count in range(1, 101):
            agent.say(message(*(name_of("shop", each) for each in range(count))))
        while not parsed or parsed[-1] != 100:
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.005)
        assert len(parsed) <= 2 + (time.monotonic() - began) / 0.05
        assert len(await behind(broker)) == 100


@pytest.mark.parametrize("said", ["reports", "acknowledgements"])
async def test_a_node_that_floods_is_ended_and_nobody_else_waits(
    broker: RunningBroker, said: str
) -> None:
    node, other = await broker.join("web-1"), await broker.join("web-2")
    await broker.entry("/shop", "web-1")
    entry = await broker.entry("/api", "web-2")
    svid = (await other.issue(entry.id)).svid
    flooder = FollowingNode(node.channel)
    await flooder.update()
    async with verifying(await broker.admin()) as verifier:
        many = message(*(name_of("shop", each) for each in range(200)))
        again = pb.SyncRequest(ack=pb.SyncRequest.Ack(revision=flooder.state.revision))
        for _ in range(1000):
            flooder.say(many if said == "reports" else again)
        await broker.revoke(id=svid.serial)
        await verifier.until(lambda known: svid.serial in known.revoked)
        await flooder.refusal()  # which may be lost on one who does not read
    assert await refused(broker, "RATE_LIMITED") == 1


async def test_a_report_that_is_late_and_wrong_ends_the_stream(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    follower = FollowingNode(node.channel)
    await follower.update()
    follower.say(message())
    follower.say(message("nobody"))
    assert reason_of(await follower.refusal()) == "MALFORMED_REQUEST"
