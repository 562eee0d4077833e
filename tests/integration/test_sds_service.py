"""Envoy's secret discovery on the agent's socket, spoken to message by message.

What Envoy itself makes of it is shown in test_envoy_proxies.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.secret.v3 import sds_pb2_grpc
from structlog.testing import capture_logs

from identity_broker.agent.sds import available
from identity_broker.agent.sds.absent import AbsentSecretDiscovery
from identity_broker.agent.sds.messages import CRL_KEY, PLAIN_KEY
from identity_broker.agent.sds.subscription import MAX_NAMES
from identity_broker.agent.workload_api.limits import Limits
from identity_broker.errors import AgentNotReady
from identity_client._wire.workload import WorkloadApiStub, X509SVIDRequest
from support.sds import SecretStream, ServedSecrets, leaf_pem, secrets_served
from support.workload_api import refusal, refused_as, served
from support.workload_identities import user

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ORDERS = "spiffe://example.org/orders"


def streamed(secrets: ServedSecrets) -> SecretStream:
    return SecretStream(secrets.stub().StreamSecrets())


def delta(secrets: ServedSecrets) -> SecretStream:
    return SecretStream(secrets.stub().DeltaSecrets(), delta=True)


def serial_of(secret: Any) -> str:
    pem = secret.tls_certificate.certificate_chain.inline_bytes
    return f"{x509.load_pem_x509_certificate(pem).serial_number:040x}"


async def test_it_is_there_with_the_extra() -> None:
    assert available()


@pytest.mark.parametrize("open_stream", [streamed, delta])
async def test_what_is_asked_for_comes_at_once_and_once(
    secrets: ServedSecrets, open_stream: Any
) -> None:
    grant = secrets.identities.grant("/orders")
    stream = open_stream(secrets)
    await stream.ask("default", "ROOTCA")
    found = await stream.read()
    assert found.keys() == {"default", "ROOTCA"}
    assert serial_of(found["default"]) == grant.identity.serial
    key = load_pem_private_key(found["default"].tls_certificate.private_key.inline_bytes, None)
    leaf = x509.load_pem_x509_certificate(
        found["default"].tls_certificate.certificate_chain.inline_bytes
    )
    assert key.public_key() == leaf.public_key()
    await stream.answer(*(() if open_stream is delta else ("default", "ROOTCA")))
    assert await stream.is_silent()


@pytest.mark.parametrize("open_stream", [streamed, delta])
async def test_a_rotation_is_pushed(secrets: ServedSecrets, open_stream: Any) -> None:
    grant = secrets.identities.grant("/orders")
    stream = open_stream(secrets)
    await stream.ask(ORDERS)
    first = await stream.read()
    begun = time.monotonic()
    secrets.identities.rotate()
    second = await stream.read()
    assert time.monotonic() - begun < 1
    assert serial_of(second[ORDERS]) == grant.identity.serial != serial_of(first[ORDERS])


async def test_only_what_changed_is_sent_in_the_incremental_variant(
    secrets: ServedSecrets,
) -> None:
    secrets.identities.grant("/orders")
    stream = delta(secrets)
    await stream.ask("default", "ROOTCA", ORDERS)
    assert (await stream.read()).keys() == {"default", "ROOTCA", ORDERS}
    secrets.identities.rotate()
    assert (await stream.read()).keys() == {"default", ORDERS}


async def test_a_stream_that_carries_on_is_sent_nothing_it_has(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders")
    stream = delta(secrets)
    await stream.ask("default", "ROOTCA")
    await stream.read()
    has = {each.name: each.version for each in stream.last.resources}
    stream.call.cancel()
    again = delta(secrets)
    await again.ask("default", "ROOTCA", initial_resource_versions=has)
    assert await again.is_silent()
    secrets.identities.rotate()
    assert (await again.read()).keys() == {"default"}


@pytest.mark.parametrize("open_stream", [streamed, delta])
async def test_a_refusal_is_logged_once_and_answered_by_nothing(
    secrets: ServedSecrets, open_stream: Any
) -> None:
    secrets.identities.grant("/orders")
    stream = open_stream(secrets)
    names = () if open_stream is delta else ("default",)
    with capture_logs() as logs:
        await stream.ask("default")
        await stream.read()
        for _ in range(5):
            await stream.answer(*names, refusal="bad certificate " + "x" * 10_000)
        assert await stream.is_silent()
        secrets.identities.rotate()
        assert (await stream.read()).keys() == {"default"}
        await stream.answer(*names)
        assert await stream.is_silent()
    (line,) = [line for line in logs if line["event"] == "client refused a secret"]
    assert line["error"].startswith("bad certificate")
    assert len(line["error"]) <= 500
    assert line["names"] == ["default"]
    assert line["pid"] == os.getpid()
    assert "PRIVATE KEY" not in str(logs)


async def test_an_unknown_name_is_answered_when_it_appears(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/other")
    stream = streamed(secrets)
    await stream.ask(ORDERS)
    assert await stream.is_silent()
    secrets.identities.rotate()
    assert await stream.is_silent()
    secrets.identities.grant("/orders")
    assert (await stream.read()).keys() == {ORDERS}


async def test_the_incremental_variant_says_at_once_that_a_name_is_unknown(
    secrets: ServedSecrets,
) -> None:
    secrets.identities.grant("/other")
    stream = delta(secrets)
    await stream.ask(ORDERS)
    assert await stream.read() == {}
    assert stream.last.removed_resources == [ORDERS]
    secrets.identities.grant("/orders")
    assert (await stream.read()).keys() == {ORDERS}


async def test_without_an_identity_there_is_nothing(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders", who=user(os.getuid() + 1))
    for stream in (streamed(secrets), delta(secrets)):
        await stream.ask("default", "ROOTCA", "ALL")
        assert refused_as(await refusal(stream.call)) == (DENIED, "NO_IDENTITY")
    fetched = secrets.stub().FetchSecrets(discovery_pb2.DiscoveryRequest())
    assert refused_as(await refusal(fetched)) == (DENIED, "NO_IDENTITY")


async def test_the_last_identity_withdrawn_ends_the_stream(secrets: ServedSecrets) -> None:
    grant = secrets.identities.grant("/orders")
    stream, incremental = streamed(secrets), delta(secrets)
    for each in (stream, incremental):
        await each.ask("default", "ROOTCA")
        await each.read()
    secrets.identities.withdraw(grant)
    assert await incremental.read() == {}
    assert sorted(incremental.last.removed_resources) == ["ROOTCA", "default"]
    for each in (stream, incremental):
        assert refused_as(await refusal(each.call)) == (DENIED, "NO_IDENTITY")
    await secrets.quiet()
    assert secrets.identities.watchers == 0


async def test_one_identity_of_two_withdrawn_goes_away_alone(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/other")
    grant = secrets.identities.grant("/orders")
    both, one, incremental = streamed(secrets), streamed(secrets), delta(secrets)
    await both.ask("default", ORDERS)
    await one.ask(ORDERS)
    await incremental.ask("default", ORDERS)
    for each in (both, one, incremental):
        await each.read()
    secrets.identities.withdraw(grant)
    assert (await both.read()).keys() == {"default"}
    assert await incremental.read() == {}
    assert incremental.last.removed_resources == [ORDERS]
    # Nothing is left of what this stream had, and the variant has no other way to say so.
    assert refused_as(await refusal(one.call)) == (DENIED, "NO_IDENTITY")
    assert await both.is_silent()


async def test_an_agent_that_is_not_ready_is_unavailable(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders")
    secrets.identities.refuse(AgentNotReady())
    stream = streamed(secrets)
    await stream.ask("default")
    assert refused_as(await refusal(stream.call)) == (UNAVAILABLE, "AGENT_NOT_READY")


async def test_an_agent_that_stops_ends_its_streams(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders")
    stream = streamed(secrets)
    await stream.ask("default")
    await stream.read()
    secrets.service.end_streams()
    assert refused_as(await refusal(stream.call)) == (UNAVAILABLE, "AGENT_NOT_READY")


async def test_one_answer_for_who_does_not_stay(secrets: ServedSecrets) -> None:
    grant = secrets.identities.grant("/orders")
    fetch = secrets.stub().FetchSecrets
    answer = await fetch(discovery_pb2.DiscoveryRequest(resource_names=["default", "unknown"]))
    assert len(answer.resources) == 1
    assert answer.version_info
    assert len((await fetch(discovery_pb2.DiscoveryRequest())).resources) == 2
    nothing = await fetch(discovery_pb2.DiscoveryRequest(resource_names=["unknown"]))
    assert len(nothing.resources) == 0
    secrets.identities.rotate(grant)
    rotated = await fetch(discovery_pb2.DiscoveryRequest(resource_names=["default"]))
    assert rotated.version_info != answer.version_info
    assert secrets.identities.watchers == 0


async def test_something_else_than_secrets_is_refused(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders")
    clusters = discovery_pb2.DiscoveryRequest(
        type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster"
    )
    stream = streamed(secrets)
    await stream.call.write(clusters)
    assert refused_as(await refusal(stream.call)) == (INVALID, "MALFORMED_REQUEST")
    fetched = secrets.stub().FetchSecrets(clusters)
    assert refused_as(await refusal(fetched)) == (INVALID, "MALFORMED_REQUEST")
    many = streamed(secrets)
    await many.ask(*(str(number) for number in range(MAX_NAMES + 1)))
    assert refused_as(await refusal(many.call)) == (INVALID, "MALFORMED_REQUEST")


async def test_an_envoy_may_say_a_lot_about_itself(secrets: ServedSecrets) -> None:
    """1.40 says 60 KiB in its first request, and every release a little more."""
    secrets.identities.grant("/orders")
    request = discovery_pb2.DiscoveryRequest(resource_names=["default"])
    for number in range(5000):
        request.node.extensions.add(name=f"envoy.extension.{number}", category="envoy.category")
    assert 150_000 < request.ByteSize() < 500_000
    stream = streamed(secrets)
    await stream.call.write(request)
    assert (await stream.read()).keys() == {"default"}
    too_long = discovery_pb2.DiscoveryRequest(resource_names=["x" * 600_000])
    oversized = streamed(secrets)
    await oversized.call.write(too_long)
    error = await refusal(oversized.call)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await secrets.stub().FetchSecrets(discovery_pb2.DiscoveryRequest())).resources


async def test_bytes_that_are_no_request_are_refused(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders")
    channel = secrets.api.channel()
    service = "/envoy.service.secret.v3.SecretDiscoveryService"
    for method in ("StreamSecrets", "DeltaSecrets"):
        call = channel.stream_stream(f"{service}/{method}")()
        await call.write(b"\xff\xff\xff")
        assert refused_as(await refusal(call)) == (INVALID, "MALFORMED_REQUEST")


async def test_the_metadata_choose_how_authorities_are_written(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders")
    metadata: dict[str, bool]
    for metadata, validator, crl in (
        ({}, True, False),
        ({PLAIN_KEY: False}, True, False),
        ({PLAIN_KEY: True}, False, False),
        ({CRL_KEY: True}, False, True),
    ):
        stream = streamed(secrets)
        await stream.ask("ROOTCA", metadata=metadata)
        context = (await stream.read())["ROOTCA"].validation_context
        assert context.HasField("custom_validator_config") == validator
        assert context.HasField("crl") == crl
        # The node stands in the first request alone; what it asked for holds on.
        secrets.identities.rotate_authority()
        context = (await stream.read())["ROOTCA"].validation_context
        assert context.HasField("custom_validator_config") == validator


async def test_a_revocation_reaches_who_asked_for_the_lists(secrets: ServedSecrets) -> None:
    grant = secrets.identities.grant("/orders")
    stream = streamed(secrets)
    await stream.ask("ROOTCA", metadata={CRL_KEY: True})
    await stream.read()
    serial = secrets.identities.revoke(grant)
    crl = (await stream.read())["ROOTCA"].validation_context.crl.inline_bytes
    assert x509.load_pem_x509_crl(crl).get_revoked_certificate_by_serial_number(int(serial, 16))


async def test_federated_authorities_come_and_go(secrets: ServedSecrets) -> None:
    secrets.identities.federate("partner.test")
    secrets.identities.grant("/orders", federates_with=["partner.test"])
    stream = delta(secrets)
    await stream.ask("ALL", "spiffe://partner.test")
    assert (await stream.read()).keys() == {"ALL", "spiffe://partner.test"}
    secrets.identities.unfederate("partner.test")
    assert (await stream.read()).keys() == {"ALL"}
    assert stream.last.removed_resources == ["spiffe://partner.test"]


async def test_without_the_extra_envoy_is_told_what_is_missing(open_directory: Any) -> None:
    absent = AbsentSecretDiscovery()
    async with served(open_directory, handlers=absent.handlers()) as api:
        stub: Any = sds_pb2_grpc.SecretDiscoveryServiceStub(api.channel())
        refused = await refusal(stub.DeltaSecrets())
        assert refused.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "identity-broker[envoy]" in (refused.details() or "")
        refused = await refusal(WorkloadApiStub(api.channel()).FetchX509SVID(X509SVIDRequest()))
        assert refused_as(refused) == (INVALID, "SECURITY_HEADER_MISSING")


async def test_no_header_is_asked_for_and_the_workload_api_still_asks(
    secrets: ServedSecrets,
) -> None:
    secrets.identities.grant("/orders")
    stub = WorkloadApiStub(secrets.api.channel())
    bare = stub.FetchX509SVID(X509SVIDRequest())
    assert refused_as(await refusal(bare)) == (INVALID, "SECURITY_HEADER_MISSING")
    stream = streamed(secrets)
    await stream.ask("default")
    assert await stream.read()


async def test_who_never_reads_holds_up_nobody(secrets: ServedSecrets) -> None:
    grant = secrets.identities.grant("/orders")
    names = ["default", "ROOTCA", *(f"unknown-{n}" for n in range(100))]
    deaf = streamed(secrets)
    await deaf.ask(*names)
    listening = streamed(secrets)
    await listening.ask("default")
    await listening.read()
    for _ in range(100):
        secrets.identities.rotate()
        latest = await listening.read()
        assert serial_of(latest["default"]) == grant.identity.serial
    # What it finds when it reads at last ends with what is there now.
    while serial_of((await deaf.read())["default"]) != grant.identity.serial:
        pass


async def test_a_process_that_became_another_program_gets_no_further_secret(
    open_directory: Any,
) -> None:
    program = (
        "import os, sys, time, grpc\n"
        "from envoy.service.discovery.v3 import discovery_pb2 as d\n"
        "from envoy.service.secret.v3.sds_pb2_grpc import SecretDiscoveryServiceStub as Stub\n"
        "stub = Stub(grpc.insecure_channel('unix:' + sys.argv[1]))\n"
        "asked = iter([d.DiscoveryRequest(resource_names=['default'])])\n"
        "def forever():\n"
        "    yield next(asked)\n"
        "    time.sleep(3600)\n"
        "call = stub.StreamSecrets(forever())\n"
        "print(len(next(call).resources), flush=True)\n"
        "for descriptor in map(int, os.listdir('/proc/self/fd')):\n"
        "    try:\n"
        "        os.set_inheritable(descriptor, True)\n"
        "    except OSError:\n"
        "        pass\n"
        "sys.stdin.readline()\n"
        "os.execv('/bin/sleep', ['sleep', '60'])\n"
    )
    async with secrets_served(open_directory) as secrets:
        grant = secrets.identities.grant("/orders")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, secrets.socket),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin
        assert process.stdout
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"1\n"
        assert secrets.service.streams == 1
        process.stdin.write(b"\n")
        async with asyncio.timeout(10):
            while b"python" in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                await asyncio.sleep(0.01)
        # The connection is still there, in another program's hands.
        secrets.identities.rotate(grant)
        await secrets.quiet()
        assert secrets.counted("StreamSecrets", "PROCESS_CHANGED") == 1
        process.kill()
        await process.wait()


async def test_streams_and_requests_of_a_process_are_bounded(
    open_directory: Any,
) -> None:
    limits = Limits(calls_per_second=50, burst=60, process_streams=3)
    async with secrets_served(open_directory, limits=limits) as secrets:
        secrets.identities.grant("/orders")
        streams = [streamed(secrets) for _ in range(3)]
        for stream in streams:
            await stream.ask("default")
            await stream.read()
        one_more = streamed(secrets)
        await refusal(one_more.call)
        assert secrets.counted("StreamSecrets", "RATE_LIMITED") == 1
        flooding = streams.pop()
        for _ in range(120):
            try:
                await flooding.answer("default")
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                break
        await refusal(flooding.call)  # gRPC's client says Internal where it still wrote
        assert secrets.counted("StreamSecrets", "RATE_LIMITED") == 2
        secrets.identities.rotate()
        for stream in streams:
            assert (await stream.read()).keys() == {"default"}


async def test_a_client_that_goes_away_leaves_nothing_behind(secrets: ServedSecrets) -> None:
    secrets.identities.grant("/orders")
    for stream in (streamed(secrets), delta(secrets)):
        await stream.ask("default")
        await stream.read()
        stream.call.cancel()
    half_closed = streamed(secrets)
    await half_closed.ask("default")
    await half_closed.read()
    await half_closed.call.done_writing()
    assert await half_closed.call.code() is grpc.StatusCode.OK
    await secrets.quiet()
    assert secrets.identities.watchers == 0


async def test_equal_secrets_have_equal_versions_on_every_stream(secrets: ServedSecrets) -> None:
    """So that a restarted agent does not make Envoy load everything again."""
    secrets.identities.grant("/orders")
    told = []
    for _ in range(2):
        stream = streamed(secrets)
        await stream.ask("default")
        told.append((leaf_pem((await stream.read())["default"]), stream.last.version_info))
    assert told[0] == told[1]
