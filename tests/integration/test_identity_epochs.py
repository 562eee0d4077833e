"""JWT-SVIDs in the second that all of their identity were revoked in: none, then good ones."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from identity_api.broker.v1 import svid_pb2, types_pb2
from identity_client._wire.workload import SECURITY_METADATA, JWTSVIDRequest
from identity_client.errors import BrokerUnavailable, IdentityError
from identity_client.node.batches import past_epochs
from support.agent import RunningAgent, running_agent
from support.line import TRUST_DOMAIN, RunningBroker, running, settings_in

API = f"spiffe://{TRUST_DOMAIN}/api"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
    async with running(settings) as running_broker:
        yield running_broker


def issued_at(token: str) -> int:
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return int(claims["iat"])


async def early_in_a_second() -> int:
    await asyncio.sleep(1.02 - time.time() % 1)
    return int(time.time())


async def test_no_token_is_issued_that_every_verifier_refuses(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entries = [await broker.entry(path, "web-1") for path in ("/other", "/api", "/third")]
    request = svid_pb2.BatchIssueJwtRequest(
        items=[
            svid_pb2.BatchIssueJwtRequest.Item(entry_id=entry.id, audiences=["a"])
            for entry in entries
        ]
    )
    second = await early_in_a_second()
    await broker.revoke(spiffe_id=API, without_hold=True)
    other, early, third = (await node.svids.BatchIssueJwt(request)).results
    if int(time.time()) == second:  # all of it was done within the second
        assert early.status.reason == "IDENTITY_EPOCH"
        assert early.status.retry_after_seconds == 1
        assert not early.svid.token
    assert other.svid.spiffe_id.endswith("/other")
    assert third.svid.spiffe_id.endswith("/third")
    await asyncio.sleep(1)
    other, late, third = (await node.svids.BatchIssueJwt(request)).results
    assert late.svid.spiffe_id == API
    assert issued_at(late.svid.token) > second


async def fetched(agent: RunningAgent, audience: str) -> str:
    request = JWTSVIDRequest(audience=[audience])
    answer = await agent.stub().FetchJWTSVID(request, metadata=SECURITY_METADATA)
    return str(answer.svids[0].svid)


async def test_a_workload_gets_a_good_token_at_once(broker: RunningBroker, tmp_path: Path) -> None:
    async with running_agent(broker, tmp_path / "agent") as agent:
        me = types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")
        await broker.entry("/api", "machine", selectors=[me])
        await agent.until(lambda: agent.agent.report().x509_svids == 1)
        await fetched(agent, "one")
        second = await early_in_a_second()
        await broker.revoke(spiffe_id=API, without_hold=True, reason=4)
        await agent.until(lambda: agent.agent.report().jwt_svids == 0)
        assert issued_at(await fetched(agent, "one")) > second


async def test_only_what_came_too_early_is_ordered_again() -> None:
    orders: list[list[str]] = []

    async def issue(some: object) -> list[str | IdentityError]:
        assert isinstance(some, list)
        orders.append(some)
        early = BrokerUnavailable(reason="IDENTITY_EPOCH", retry_after=0.01)
        refused = BrokerUnavailable(reason="STORE_UNAVAILABLE", retry_after=0.01)
        if len(orders) == 1:
            return ["a", early, refused]
        return [name.upper() for name in some]

    a, b, c = await past_epochs(["a", "b", "c"], issue)
    assert (a, b) == ("a", "B")
    assert isinstance(c, BrokerUnavailable)
    assert orders == [["a", "b", "c"], ["b"]]
