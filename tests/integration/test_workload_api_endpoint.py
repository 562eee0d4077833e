"""The Workload Endpoint (SPIFFE_Workload_Endpoint.md): EP-1 to EP-5 and EP-9 to EP-11, our side.

What a client must do (EP-4, EP-6 to EP-8) is shown with our SDK and with py-spiffe beside it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from identity_broker import errors
from identity_broker.agent.rpc_status import abort_arguments
from identity_broker.agent.workload_api.limits import Limits
from identity_broker.errors import AgentNotReady, BrokerError, Kind, NoIdentity
from identity_client._wire.workload import (
    METHODS,
    SECURITY_METADATA,
    SERVICE_NAME,
    JWTSVIDRequest,
    X509SVIDRequest,
    X509SVIDResponse,
)
from support.rpc import leaves
from support.workload_api import (
    ServedWorkloadApi,
    details_of,
    header,
    line_of,
    probe,
    refusal,
    refused_as,
    served,
)
from support.workload_identities import user

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "SECURITY_HEADER_MISSING")
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.mark.clause("EP-1")
async def test_the_endpoint_speaks_grpc(workload_api: ServedWorkloadApi) -> None:
    """HTTP/2 with prior knowledge: a connection preface, and the server's SETTINGS in return."""
    reader, writer = await asyncio.open_unix_connection(workload_api.socket)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    frame = await asyncio.wait_for(reader.readexactly(9), 5)
    assert frame[3] == 4  # SETTINGS
    writer.close()
    workload_api.identities.grant("/a")
    call = workload_api.stub().FetchX509SVID(X509SVIDRequest(), metadata=header())
    assert len((await call.read()).svids) == 1


@pytest.mark.clause("EP-2")
async def test_the_endpoint_is_a_unix_socket_and_nothing_else(tmp_path: Path) -> None:
    def listening() -> set[object]:
        return {
            each.laddr
            for each in psutil.Process().net_connections("inet")
            if each.status == psutil.CONN_LISTEN
        }

    before = listening()
    async with served(tmp_path) as api:
        assert api.address == f"unix://{tmp_path}/api.sock"
        assert listening() == before
        assert stat.S_ISSOCK(Path(api.socket).stat().st_mode)


async def test_anybody_may_connect_and_nobody_else_may_reach_the_server(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        async with served(tmp_path / "made") as api:
            assert stat.S_IMODE(Path(api.socket).stat().st_mode) == 0o666
            assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o755
            inner = tmp_path / "made" / ".api.sock"
            assert stat.S_IMODE(inner.stat().st_mode) == 0o700
    finally:
        os.umask(old)
    assert not inner.exists()
    assert not os.path.lexists(api.socket)


@pytest.mark.clause("EP-3")
@pytest.mark.clause("EP-4")
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("workload.spiffe.io", "True"),),
        (("workload.spiffe.io", "TRUE"),),
        (("workload.spiffe.io", "false"),),
        (("workload.spiffe.io", ""),),
        (("workload.spiffe.io", "true "),),
        (("workload.spiffe.io", "true"), ("workload.spiffe.io", "false")),
        (("workload-spiffe-io", "true"),),
    ],
    ids=["none", "True", "TRUE", "false", "empty", "trailing space", "twice", "another name"],
)
async def test_a_request_without_the_header_is_refused_before_anything(
    tmp_path: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    # One call in a very long while: whoever has passed the header would have spent it.
    limits = Limits(calls_per_second=0.001, burst=1)
    async with served(tmp_path, limits=limits) as api:
        api.identities.grant("/a")
        channel = api.channel()
        names = [*METHODS.values(), HEALTH, REFLECTION, "/no.Such/Method", f"/{SERVICE_NAME}/New"]
        for name in names:
            call = channel.unary_stream(name)(b"not even a message \xff", metadata=metadata)
            if metadata == (("workload.spiffe.io", "true "),) and name == names[0]:
                # HTTP/2 field values have no outer white space; some stacks strip it.
                error = await refusal(call)
                assert refused_as(error) in {INVALID, (grpc.StatusCode.INTERNAL, "")}
                return
            assert refused_as(await refusal(call)) == INVALID
        fetched = api.stub().FetchX509SVID(X509SVIDRequest(), metadata=SECURITY_METADATA)
        assert (await fetched.read()).svids


@pytest.mark.clause("EP-5")
async def test_tls_is_not_asked_for(workload_api: ServedWorkloadApi) -> None:
    workload_api.identities.grant("/a")
    channel: Any
    async with grpc.aio.insecure_channel(f"unix:{workload_api.socket}") as channel:
        fetch = channel.unary_stream(
            METHODS["FetchX509SVID"], response_deserializer=X509SVIDResponse.FromString
        )
        call = fetch(b"", metadata=header())
        assert (await call.read()).svids[0].spiffe_id == "spiffe://example.org/a"


@pytest.mark.clause("EP-9")
async def test_a_workload_is_known_by_its_process_and_need_do_nothing(
    workload_api: ServedWorkloadApi,
) -> None:
    workload_api.identities.grant("/mine", who=user(os.getuid()))
    workload_api.identities.grant("/theirs", who=user(os.getuid() + 1))
    # Whatever a call says of itself changes nothing.
    lies = header(uid=str(os.getuid() + 1), authorization="Bearer x")
    call = workload_api.stub().FetchX509SVID(X509SVIDRequest(), metadata=lies)
    answer = await call.read()
    assert [each.spiffe_id for each in answer.svids] == ["spiffe://example.org/mine"]


@pytest.mark.clause("EP-9")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")
async def test_two_users_on_one_socket_get_their_own(workload_api: ServedWorkloadApi) -> None:
    for uid in (12001, 12002):
        workload_api.identities.grant(f"/of-{uid}", who=user(uid))
    for uid in (12001, 12002):
        async with probe(workload_api, "x509", uid=uid) as process:
            assert await line_of(process) == f'{{"ids": ["spiffe://example.org/of-{uid}"]}}'
    async with probe(workload_api, "x509", uid=12003) as process:
        assert await line_of(process) == '{"end": "PERMISSION_DENIED"}'


@pytest.mark.clause("EP-10")
@pytest.mark.clause("API-2")
async def test_the_workload_api_is_the_standard_s_and_new_things_are_new_services(
    workload_api: ServedWorkloadApi,
) -> None:
    workload_api.identities.grant("/a")
    assert set(METHODS) == {
        *("FetchX509SVID", "FetchX509Bundles"),
        *("FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"),
    }
    call = workload_api.stub().FetchX509SVID(X509SVIDRequest(), metadata=header())
    # Nothing in an answer that the standard's message does not know.
    answer = await call.read()
    before = answer.SerializeToString()
    answer.DiscardUnknownFields()
    assert answer.SerializeToString() == before
    error = await refusal(
        workload_api.channel().unary_unary(f"/{SERVICE_NAME}/FetchEverything")(
            b"", metadata=header()
        )
    )
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.clause("EP-10")
async def test_reflection_shows_what_is_served(workload_api: ServedWorkloadApi) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(workload_api.channel())
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
    ]
    answers = [
        each async for each in stub.ServerReflectionInfo(iter(asked), metadata=header(), timeout=5)
    ]
    listed = [each.name for each in answers[0].list_services_response.service]
    assert listed == sorted(
        [SERVICE_NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
    )
    files = [
        FileDescriptorProto.FromString(raw)
        for raw in answers[1].file_descriptor_response.file_descriptor_proto
    ]
    methods = {m.name for f in files for s in f.service for m in s.method}
    assert methods == set(METHODS)


async def test_health_says_whether_the_agent_can_answer(tmp_path: Path) -> None:
    healthy = True
    async with served(tmp_path, is_serving=lambda: healthy) as api:
        check = api.channel().unary_unary(
            HEALTH,
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        watch = api.channel().unary_stream(
            HEALTH.replace("Check", "Watch"),
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(), metadata=header())
        serving = health_pb2.HealthCheckResponse.SERVING
        for name in ("", SERVICE_NAME):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await check(request, metadata=header())).status == serving
        assert (await watch.read()).status == serving
        healthy = False
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        unknown = health_pb2.HealthCheckRequest(service="no.Such")
        error = await refusal(check(unknown, metadata=header()))
        assert refused_as(error) == (grpc.StatusCode.NOT_FOUND, "SERVICE_NOT_FOUND")


@pytest.mark.clause("EP-11")
@pytest.mark.parametrize("leaf", leaves(BrokerError))
def test_every_refusal_has_one_of_the_standard_s_codes(leaf: type[BrokerError]) -> None:
    code, message, _ = abort_arguments(leaf(detail="INTERNALS"), "c-1")
    allowed = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.PERMISSION_DENIED,
    }
    if leaf.kind in {Kind.INTERNAL, Kind.CONFIG}:
        allowed = {grpc.StatusCode.INTERNAL}
    elif leaf.kind is Kind.NOT_FOUND:
        allowed = {grpc.StatusCode.NOT_FOUND}  # grpc.health.v1's own, and of no SPIFFE method
    assert code in allowed
    assert message
    assert "INTERNALS" not in message


@pytest.mark.clause("EP-11")
async def test_codes_reasons_and_when_to_come_back_arrive(workload_api: ServedWorkloadApi) -> None:
    stub = workload_api.stub()
    for error, expected in (
        (NoIdentity(), (grpc.StatusCode.PERMISSION_DENIED, "NO_IDENTITY")),
        (AgentNotReady(retry_after=1.5), (grpc.StatusCode.UNAVAILABLE, "AGENT_NOT_READY")),
        (errors.CallerUnknown(), (grpc.StatusCode.PERMISSION_DENIED, "CALLER_UNKNOWN")),
        (errors.TokenInvalid(), (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_INVALID")),
    ):
        workload_api.identities.refuse(error)
        told = await refusal(stub.FetchX509SVID(X509SVIDRequest(), metadata=header()))
        assert refused_as(told) == expected
        assert details_of(told)[1] == error.retry_after
        request = JWTSVIDRequest(audience=["x"])
        told = await refusal(stub.FetchJWTSVID(request, metadata=header()))
        assert refused_as(told) == expected


async def test_a_bug_is_internal_and_says_nothing_of_itself(
    workload_api: ServedWorkloadApi,
) -> None:
    class Broken(BrokerError):
        pass

    workload_api.identities.refusal = Broken(detail="INTERNALS")
    told = await refusal(workload_api.stub().FetchX509SVID(X509SVIDRequest(), metadata=header()))
    assert told.code() is grpc.StatusCode.INTERNAL
    assert "INTERNALS" not in repr(told)


async def test_a_second_agent_does_not_take_the_socket_of_a_live_one(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        with pytest.raises(errors.ConfigError, match="listens"):
            async with served(tmp_path):
                pass
        api.identities.grant("/a")
        call = api.stub().FetchX509SVID(X509SVIDRequest(), metadata=header())
        assert (await call.read()).svids


async def test_a_killed_agent_s_socket_is_taken_over(tmp_path: Path) -> None:
    left_over = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left_over.bind(str(tmp_path / "api.sock"))
    left_over.close()
    (tmp_path / ".api.sock").mkdir()
    (tmp_path / ".api.sock" / "s").touch()
    async with served(tmp_path) as api:
        api.identities.grant("/a")
        call = api.stub().FetchX509SVID(X509SVIDRequest(), metadata=header())
        assert (await call.read()).svids


async def test_a_path_that_no_socket_can_have_is_refused_with_the_room_there_is(
    tmp_path: Path,
) -> None:
    with pytest.raises(errors.ConfigError, match="at most"):
        async with served(tmp_path / ("x" * 120)):
            pass
