"""A whole agent against a whole broker: who gets what, when it changes, and when it is taken."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

from identity_api.broker.v1 import (
    credential_pb2,
    entry_pb2,
    entry_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    types_pb2,
)
from identity_ca.keys import spki_der
from identity_ca.serial import serial_hex
from identity_client._wire.workload import (
    SECURITY_METADATA,
    JWTBundlesRequest,
    JWTSVIDRequest,
    X509BundlesRequest,
)
from support.agent import RunningAgent, running_agent
from support.line import RunningBroker, reason_of, running, settings_in

ME = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]
SOMEBODY = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid() + 1}")]
PROBE = Path(__file__).parents[1] / "support" / "workload_probe.py"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "broker", ca={"key_manager": "memory"})
    async with running(settings) as running_broker:
        yield running_broker


@pytest.fixture
async def agent(broker: RunningBroker, open_directory: Path) -> AsyncIterator[RunningAgent]:
    async with running_agent(broker, open_directory / "agent") as running_one:
        yield running_one


async def entry(broker: RunningBroker, path: str, **fields: Any) -> types_pb2.RegistrationEntry:
    """An entry of this test's user."""
    return await broker.entry(path, "machine", **{"selectors": ME, **fields})


async def delete(broker: RunningBroker, *ids: str) -> None:
    entries = await broker.stub(entry_pb2_grpc.EntryStub)
    await entries.BatchDelete(entry_pb2.BatchDeleteEntryRequest(ids=ids))


async def change(broker: RunningBroker, found: types_pb2.RegistrationEntry, **to: Any) -> None:
    entries = await broker.stub(entry_pb2_grpc.EntryStub)
    for name, value in to.items():
        setattr(found, name, value)
    item = entry_pb2.BatchUpdateEntryRequest.Item(entry=found, fields=list(to))
    response = await entries.BatchUpdate(entry_pb2.BatchUpdateEntryRequest(items=[item]))
    assert not response.results[0].status.reason


async def refused(call: Any) -> grpc.RpcError:
    """How the call ends, after whatever it still has to say."""
    async with asyncio.timeout(10):
        with pytest.raises(grpc.RpcError) as caught:
            while True:
                if await call.read() is grpc.aio.EOF:
                    raise AssertionError("it ended well")
    return caught.value


async def read(call: Any) -> Any:
    async with asyncio.timeout(10):
        answer = await call.read()
    assert answer is not grpc.aio.EOF
    return answer


def serials(answer: Any) -> list[str]:
    return [
        serial_hex(x509.load_der_x509_certificate(svid.x509_svid).serial_number)
        for svid in answer.svids
    ]


def paths(answer: Any) -> list[str]:
    return [svid.spiffe_id.removeprefix("spiffe://example.org") for svid in answer.svids]


async def in_mirror(agent: RunningAgent, count: int) -> None:
    await agent.until(lambda: agent.agent.report().entries == count)


# --- push ---------------------------------------------------------------------------------------


async def test_who_comes_too_early_is_refused_at_once_and_served_when_it_comes_again(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    started = monotonic()
    early = await refused(agent.x509_stream())
    assert monotonic() - started < 5
    assert early.code() is grpc.StatusCode.PERMISSION_DENIED
    assert reason_of(early) == "NO_IDENTITY"
    await entry(broker, "/web")
    await in_mirror(agent, 1)
    assert paths(await agent.fetch_x509()) == ["/web"]


async def test_an_entry_is_an_svid_in_a_waiting_stream_within_milliseconds(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/first")
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    assert paths(await read(call)) == ["/first"]
    took = []
    for number in range(10):
        await entry(broker, f"/more-{number}")
        started = monotonic()
        answer = await read(call)
        took.append(monotonic() - started)
        assert len(answer.svids) == number + 2
    assert sorted(took)[5] < 0.25  # the median; a busy machine may stumble once
    call.cancel()


async def test_an_entry_that_goes_takes_its_svid_and_the_last_one_the_stream(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    one, two = await entry(broker, "/one"), await entry(broker, "/two")
    await in_mirror(agent, 2)
    call = agent.x509_stream()
    assert sorted(paths(await read(call))) == ["/one", "/two"]
    await delete(broker, one.id)
    assert paths(await read(call)) == ["/two"]
    await delete(broker, two.id)
    ended = await refused(call)
    assert reason_of(ended) == "NO_IDENTITY"
    assert agent.agent.report().x509_svids == 0


async def test_an_entry_ends_by_the_clock(agent: RunningAgent, broker: RunningBroker) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    await entry(broker, "/short", expires_at=int(soon.timestamp()))
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    assert paths(await read(call)) == ["/short"]
    assert reason_of(await refused(call)) == "NO_IDENTITY"
    assert datetime.now(UTC) < soon + timedelta(seconds=3)
    assert agent.agent.report().entries == 0


async def test_what_changes_for_others_wakes_nobody(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/mine")
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    await read(call)
    attested = agent.agent._metrics.agent_attest_seconds._sum.get()
    for number in range(5):
        await entry(broker, f"/theirs-{number}", selectors=SOMEBODY)
    await in_mirror(agent, 6)
    assert agent.agent._metrics.agent_attest_seconds._sum.get() == attested
    call.cancel()


async def test_an_entry_that_asks_for_more_is_looked_up_for_those_who_watch(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    """The watch was attested before anybody asked for a path."""
    await entry(broker, "/mine")
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    assert paths(await read(call)) == ["/mine"]
    program = types_pb2.Selector(type="unix", value=f"path:{Path(sys.executable).resolve()}")
    await entry(broker, "/program", selectors=[*ME, program])
    assert sorted(paths(await read(call))) == ["/mine", "/program"]
    call.cancel()


async def test_a_changed_entry_is_served_as_it_is_now(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    found = await entry(broker, "/web", hint="before")
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    first = await read(call)
    assert first.svids[0].hint == "before"
    await change(broker, found, hint="after")
    changed = await read(call)
    assert changed.svids[0].hint == "after"
    latest = await broker.stub(entry_pb2_grpc.EntryStub)
    stored = (await latest.Get(entry_pb2.GetEntryRequest(id=found.id))).entry
    await change(broker, stored, spiffe_id="spiffe://example.org/other")
    while paths(answer := await read(call)) != ["/other"]:
        assert paths(answer) == ["/web"]
    assert serials(answer) != serials(first)
    call.cancel()


# --- SVIDs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["", "ec-p256", "ec-p384", "rsa-2048"])
async def test_keys_are_of_the_kind_the_entry_asks_for_and_belong_to_the_chain(
    agent: RunningAgent, broker: RunningBroker, algorithm: str
) -> None:
    await entry(broker, "/web", key_algorithm=algorithm)
    await in_mirror(agent, 1)
    (svid,) = (await agent.fetch_x509()).svids
    key = load_der_private_key(svid.x509_svid_key, password=None)
    leaf = x509.load_der_x509_certificate(svid.x509_svid)
    assert spki_der(key.public_key()) == spki_der(leaf.public_key())
    if algorithm == "rsa-2048":
        assert isinstance(key, rsa.RSAPrivateKey)
        assert key.key_size == 2048
    else:
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == ("secp384r1" if algorithm == "ec-p384" else "secp256r1")


async def test_keys_that_take_long_hold_up_nobody(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    for number in range(12):
        await entry(broker, f"/rsa-{number}", key_algorithm="rsa-2048", selectors=SOMEBODY)
    await in_mirror(agent, 12)
    await entry(broker, "/web")
    await in_mirror(agent, 13)
    assert paths(await agent.fetch_x509()) == ["/web"]
    await agent.until(lambda: agent.agent.report().x509_svids == 13, 30)


async def test_keys_that_take_long_and_nobody_waits_for_hold_up_nobody_who_waits_for_one(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    stub = await broker.stub(entry_pb2_grpc.EntryStub)
    many = [
        types_pb2.RegistrationEntry(
            parent_id=agent.node_id,
            spiffe_id=f"spiffe://example.org/rsa-{number}",
            selectors=SOMEBODY,
            key_algorithm="rsa-2048",
        )
        for number in range(300)
    ]
    for start in (0, 150):
        request = entry_pb2.BatchCreateEntryRequest(entries=many[start : start + 150])
        assert not any(each.status.reason for each in (await stub.BatchCreate(request)).results)
    await in_mirror(agent, 300)
    await entry(broker, "/web", key_algorithm="rsa-2048")
    await in_mirror(agent, 301)
    started = monotonic()
    assert paths(await agent.fetch_x509()) == ["/web"]
    assert monotonic() - started < 5
    assert agent.agent.report().x509_svids < 150  # the others were still to be made


async def test_svids_are_there_before_anybody_asks(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    for number in range(20):
        await entry(broker, f"/web-{number}", selectors=SOMEBODY)
    await agent.until(lambda: agent.agent.report().x509_svids == 20)
    issued = await broker.ledger()
    assert len([each for each in issued if each.entry_id]) == 20


async def test_more_entries_than_fit_are_made_on_demand_and_let_go(
    broker: RunningBroker, open_directory: Path
) -> None:
    async with running_agent(
        broker, open_directory / "agent", workloads={"x509_svids": 2}
    ) as agent:
        found = [await entry(broker, f"/web-{number}") for number in range(5)]
        await in_mirror(agent, 5)
        await asyncio.sleep(0.3)
        assert agent.agent.report().x509_svids <= 2
        call = agent.x509_stream()
        assert len((await read(call)).svids) == 5
        assert agent.agent.report().x509_svids == 5  # watched: none is let go
        call.cancel()
        await agent.until(lambda: agent.agent.report().x509_svids == 2)
        assert len(found) == 5


async def test_half_way_through_its_life_an_svid_is_replaced_by_one_with_another_key(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/short", x509_ttl_seconds=10)
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    first = await read(call)
    started = monotonic()
    second = await read(call)
    assert 3.5 < monotonic() - started < 9
    assert serials(first) != serials(second)
    assert first.svids[0].x509_svid_key != second.svids[0].x509_svid_key
    assert agent.agent.report().x509_svids == 1
    call.cancel()


async def test_a_revoked_svid_is_replaced_at_once_for_another_key(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/web")
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    first = await read(call)
    await broker.revoke(id=serials(first)[0])
    answer = await read(call)
    while serials(answer) == serials(first):  # the list may come before the replacement
        answer = await read(call)
    assert answer.svids[0].x509_svid_key != first.svids[0].x509_svid_key
    while not any(
        x509.load_der_x509_crl(crl).get_revoked_certificate_by_serial_number(
            int(serials(first)[0], 16)
        )
        for crl in answer.crl
    ):
        answer = await read(call)
    call.cancel()


async def test_streams_that_ended_leave_nothing_behind(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/web")
    await in_mirror(agent, 1)
    calls = [agent.x509_stream() for _ in range(10)]
    for call in calls:
        await read(call)
    identities, svids = agent.agent._identities, agent.agent._svids
    assert len(identities._watches) == 10
    for call in calls:
        call.cancel()
    await agent.until(lambda: not identities._watches)
    assert not identities._by_key
    assert not svids._pins
    assert len(identities._watchers) == 0


# --- one SVID for each process ------------------------------------------------------------------


@asynccontextmanager
async def process(agent: RunningAgent) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process of this user that watches its SVIDs, a line of JSON for each state."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROBE),
        str(os.getuid()),
        agent.workload_api.removeprefix("unix://"),
        "x509",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def line(started: asyncio.subprocess.Process) -> Any:
    assert started.stdout is not None
    async with asyncio.timeout(20):
        return json.loads(await started.stdout.readline())


async def test_each_process_has_its_own_svid_and_loses_it_alone(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/each", per_process=True)
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    mine = serials(await read(call))
    async with process(agent) as other:
        await line(other)
        issued = {each.id: each.instance for each in await broker.ledger() if each.entry_id}
        assert len(issued) == 2
        assert issued[mine[0]].startswith(f"pid:{os.getpid()} ")
        (theirs,) = issued.keys() - {*mine}
        assert issued[theirs].startswith(f"pid:{other.pid} ")
        await broker.revoke(id=mine[0])
        ended = await refused(call)
        assert ended.code() is grpc.StatusCode.PERMISSION_DENIED
        # It is this very process that lost it: coming again does not help, and no token is given.
        assert reason_of(await refused(agent.x509_stream())) == "NO_IDENTITY"
        with pytest.raises(grpc.RpcError) as caught:
            await agent.stub().FetchJWTSVID(
                JWTSVIDRequest(audience=["a"]), metadata=SECURITY_METADATA
            )
        assert reason_of(caught.value) == "NO_IDENTITY"
        credentials = {each.id: each.state for each in await broker.ledger()}
        assert credentials[theirs] != credentials[mine[0]]
        assert agent.agent.report().x509_svids == 1
    async with process(agent) as third:
        await line(third)
    # Nobody renews the SVID of a process that has ended.
    assert not agent.agent._svids._pins


async def rotated(agent: RunningAgent, broker: RunningBroker, call: Any, entry_id: str) -> str:
    """Have the entry's SVIDs made anew; return the new serial of the caller's."""
    entries = await broker.stub(entry_pb2_grpc.EntryStub)
    found = (await entries.Get(entry_pb2.GetEntryRequest(id=entry_id))).entry
    before = {each.id for each in await broker.ledger()}
    await change(broker, found, x509_ttl_seconds=(found.x509_ttl_seconds or 1800) + 60)
    while True:
        (serial,) = serials(await read(call))
        if serial not in before:
            return serial


async def test_an_earlier_serial_revoked_ends_the_process_and_a_restart_does_not_bring_it_back(
    broker: RunningBroker, open_directory: Path
) -> None:
    data = {"data_dir": str(open_directory / "data")}
    async with running_agent(broker, open_directory / "agent", agent=data) as agent:
        each = await entry(broker, "/each", per_process=True)
        await in_mirror(agent, 1)
        call = agent.x509_stream()
        (first,) = serials(await read(call))
        second = await rotated(agent, broker, call, each.id)
        states = {row.id: row.state for row in await broker.ledger()}
        assert first != second
        await broker.revoke(id=first)
        ended = await refused(call)
        assert ended.code() is grpc.StatusCode.PERMISSION_DENIED
        assert states[first] != credential_pb2.CREDENTIAL_STATE_REVOKED
        assert reason_of(await refused(agent.x509_stream())) == "NO_IDENTITY"
        settings = agent.settings
    async with running_agent(broker, open_directory / "agent", settings=settings) as again:
        await in_mirror(again, 1)
        assert reason_of(await refused(again.x509_stream())) == "NO_IDENTITY"
        async with process(again) as other:  # another process of the same user is not meant
            assert (await line(other))["ids"]
        # Nor is this one on another machine.
        async with running_agent(broker, open_directory / "b", name="twin") as twin:
            await broker.entry("/each", "twin", selectors=ME, per_process=True)
            await in_mirror(twin, 1)
            assert paths(await twin.fetch_x509()) == ["/each"]


@pytest.mark.parametrize("without_hold", [False, True])
async def test_an_identity_revoked_denies_no_process_for_good(
    agent: RunningAgent, broker: RunningBroker, *, without_hold: bool
) -> None:
    each = await entry(broker, "/each", per_process=True)
    await in_mirror(agent, 1)
    call = agent.x509_stream()
    (first,) = serials(await read(call))
    revoked = await broker.revoke(spiffe_id=each.spiffe_id, without_hold=without_hold)
    if without_hold:
        assert serials(await read(call)) != [first]
        return
    assert reason_of(await refused(call)) == "NO_IDENTITY"
    assert agent.agent.report().x509_svids == 0
    await broker.lift(revoked.revocation.hold)
    await in_mirror(agent, 1)
    assert serials(await agent.fetch_x509()) != [first]


@pytest.mark.parametrize("per_process", [False, True])
async def test_what_was_on_hold_comes_back_when_it_is_lifted(
    agent: RunningAgent, broker: RunningBroker, *, per_process: bool
) -> None:
    await entry(broker, "/web")
    await entry(broker, "/each", per_process=per_process)
    await in_mirror(agent, 2)
    call = agent.x509_stream()
    state = await read(call)
    while sorted(paths(state)) != ["/each", "/web"]:
        state = await read(call)
    held = serials(state)[paths(state).index("/each")]
    revoked = await broker.revoke(id=held, reason=credential_pb2.REVOCATION_REASON_CERTIFICATE_HOLD)
    state = await read(call)
    while held in serials(state):
        state = await read(call)
    if per_process:  # this very process is denied
        assert paths(state) == ["/web"]
    assert agent.agent._mirror.denied.is_revoked(held)
    await broker.lift(revoked.revocation.hold)
    while sorted(paths(state)) != ["/each", "/web"]:
        state = await read(call)
    assert held not in serials(state)
    await agent.until(lambda: not agent.agent._mirror.denied.is_revoked(held))


# --- a node that is not wanted ------------------------------------------------------------------


async def test_a_banned_node_hands_out_nothing_at_once(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/web")
    await in_mirror(agent, 1)
    calls = [
        agent.x509_stream(),
        agent.stub().FetchX509Bundles(X509BundlesRequest(), metadata=SECURITY_METADATA),
        agent.stub().FetchJWTBundles(JWTBundlesRequest(), metadata=SECURITY_METADATA),
    ]
    for call in calls:
        await read(call)
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    started = monotonic()
    await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=agent.node_id, reason="stolen"))
    for call in calls:
        assert (await refused(call)).code() is grpc.StatusCode.PERMISSION_DENIED
    assert monotonic() - started < 8
    report = agent.agent.report()
    assert report.x509_svids == report.entries == 0
    assert report.judged.health == "down"
    assert any("banned" in problem for problem in report.judged.problems)
    late = await refused(agent.x509_stream())
    assert late.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_ban_that_is_lifted_brings_everything_back(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    """Evicted after the ban, with a new token in the file: the same machine, wanted again."""
    await entry(broker, "/web")
    await in_mirror(agent, 1)
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=agent.node_id, reason="by mistake"))
    await agent.until(lambda: agent.agent.report().judged.health == "down")
    await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=agent.node_id))
    token_file = agent.settings.node.join_token_file
    assert token_file is not None
    token_file.write_text(await broker.token("machine"))
    await agent.until(lambda: agent.agent.report().judged.health == "ok", 60)
    assert paths(await agent.fetch_x509()) == ["/web"]


# --- JWT-SVIDs ----------------------------------------------------------------------------------


async def token_for(agent: RunningAgent, *audiences: str, spiffe_id: str = "") -> str:
    answer = await agent.stub().FetchJWTSVID(
        JWTSVIDRequest(audience=audiences, spiffe_id=spiffe_id), metadata=SECURITY_METADATA
    )
    return str(answer.svids[0].svid)


async def test_a_token_is_asked_for_once_however_many_want_it(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await entry(broker, "/web")
    await in_mirror(agent, 1)
    tokens = await asyncio.gather(*(token_for(agent, "a", "b") for _ in range(20)))
    assert len({*tokens}) == 1
    assert await token_for(agent, "b", "a") == tokens[0]  # their order says nothing
    assert await token_for(agent, "a") != tokens[0]
    assert agent.agent.report().jwt_svids == 2


async def test_a_revoked_token_is_neither_given_nor_accepted_again(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    from identity_client._wire.workload import ValidateJWTSVIDRequest

    await entry(broker, "/web")
    await in_mirror(agent, 1)
    token = await token_for(agent, "a")
    request = ValidateJWTSVIDRequest(svid=token, audience="a")
    stub = agent.stub()
    await stub.ValidateJWTSVID(request, metadata=SECURITY_METADATA)
    (row,) = [each for each in await broker.ledger() if "JWT" in str(each)]
    await broker.revoke(jti=row.id)
    await agent.until(lambda: agent.agent._mirror.denied.is_revoked(row.id))
    with pytest.raises(grpc.RpcError) as caught:
        await stub.ValidateJWTSVID(request, metadata=SECURITY_METADATA)
    assert reason_of(caught.value) == "TOKEN_INVALID"
    assert await token_for(agent, "a") != token


async def test_a_token_goes_with_its_entry(agent: RunningAgent, broker: RunningBroker) -> None:
    found, _ = await entry(broker, "/web"), await entry(broker, "/api")
    await in_mirror(agent, 2)
    await token_for(agent, "a", spiffe_id="spiffe://example.org/web")
    await delete(broker, found.id)
    await in_mirror(agent, 1)
    assert agent.agent.report().jwt_svids == 0
    with pytest.raises(grpc.RpcError) as caught:
        await token_for(agent, "a", spiffe_id="spiffe://example.org/web")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
