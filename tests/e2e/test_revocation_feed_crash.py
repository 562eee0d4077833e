"""kill -9 between a revocation's commit and its push: verifiers hear of it after the next start."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from identity_api.broker.v1 import revocation_pb2
from identity_broker.lifecycle import statement
from support.dying_broker import child
from support.line import AttestedClient, RunningBroker, running, settings_in
from support.verifying import FollowingVerifier, Known, closed, status, verifying


async def _follow_until_it_dies(broker: RunningBroker, known: Known) -> None:
    verifier = FollowingVerifier(await broker.admin(), known, name="v1")
    with pytest.raises(grpc.aio.AioRpcError):
        while True:
            await verifier.message()


async def _prepared(directory: Path, known: Known) -> tuple[AttestedClient, list[str]]:
    """A verifier that has followed, and SVIDs that are not revoked yet."""
    async with running(settings_in(directory)) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/api", "web-1")
        serials = [(await node.issue(entry.id)).svid.serial for _ in range(3)]
        await broker.revoke(id=serials.pop(), order_id="before")
        await closed(broker, "before")
        async with verifying(await broker.admin(), known, name="v1"):
            assert len(known.revoked) == 1
    return node, serials


async def test_what_was_committed_is_pushed_after_the_restart(tmp_path: Path) -> None:
    directory = tmp_path / "idb"
    known = Known()
    _, serials = await _prepared(directory, known)
    async with child(directory, "open:after") as broker:
        following = asyncio.create_task(_follow_until_it_dies(broker, known))
        with pytest.raises(grpc.aio.AioRpcError):
            for number, serial in enumerate(serials):
                await broker.revoke(id=serial, order_id=f"order-{number}")
                await asyncio.sleep(0.2)
            await asyncio.sleep(10)
            await broker.ledger()
        await following
    async with running(settings_in(directory)) as broker:
        committed = {row.id for row in await broker.ledger(states=[5])}
        assert len(committed) == 2
        async with verifying(await broker.admin(), known, name="v1") as verifier:
            # It goes on from where it was, and what it had been told was durable.
            assert not verifier.messages[0].full
            assert known.revoked.keys() == committed
            # And what is revoked from now on reaches it.
            left = [serial for serial in serials if serial not in committed]
            for serial in left:
                await broker.revoke(id=serial)
            await verifier.until(lambda now: set(serials) <= now.revoked.keys())


@pytest.mark.parametrize("point", ["close:before", "close:after"])
async def test_an_order_is_closed_once_whenever_the_broker_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr(statement, "_OTHERS", timedelta(seconds=1))
    directory = tmp_path / "idb"
    known = Known()
    _, serials = await _prepared(directory, known)
    async with child(directory, point) as broker:
        following = asyncio.create_task(_follow_until_it_dies(broker, known))
        await asyncio.sleep(0.5)
        await broker.revoke(id=serials[0], order_id="night")
        await following
    settings = settings_in(directory, revocation={"acknowledge_timeout": "1s"})
    async with running(settings) as broker:
        before = (await status(broker, "night")).statement
        assert bool(before) == (point == "close:after")
        answer = await closed(broker, "night")
        assert answer.revocation.state == revocation_pb2.REVOCATION_STATE_CLOSED
        assert answer.statement == (before or answer.statement)
        async with verifying(await broker.admin(), known, name="v1"):
            answer = await status(broker, "night")
            away = revocation_pb2.VERIFIER_STATE_AWAY  # the node that it was issued through
            [verifier] = [one for one in answer.propagation.verifiers if one.state != away]
            assert verifier.state == revocation_pb2.VERIFIER_STATE_ACKNOWLEDGED
            assert verifier.latency_ms == -1
