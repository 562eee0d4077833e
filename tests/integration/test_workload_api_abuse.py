"""What bad callers and bad luck cannot do to the Workload API, and to everybody else on it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from identity_broker.agent.workload_api.limits import CallerLimits, Limits
from identity_broker.agent.workload_api.service import MAX_REQUEST_BYTES
from identity_broker.errors import RateLimited
from identity_client._wire.workload import (
    METHODS,
    JWTSVIDRequest,
    ValidateJWTSVIDRequest,
    X509SVIDRequest,
)
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
from support.workload_identities import FakeIdentities, user

FETCH = METHODS["FetchX509SVID"]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ROOT = os.geteuid() == 0
OTHER_USER = 12345 if ROOT else os.getuid()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def fetch(api: ServedWorkloadApi) -> Any:
    return api.stub().FetchX509SVID(X509SVIDRequest(), metadata=header())


# --- processes that end, or become another one ----------------------------------------------------


async def test_a_stream_ends_with_its_process(workload_api: ServedWorkloadApi) -> None:
    workload_api.identities.grant("/a")
    async with probe(workload_api, "x509") as process:
        await line_of(process)
        assert workload_api.service.streams == 1
        process.kill()
        await until(lambda: workload_api.service.streams == workload_api.identities.watchers == 0)
        await until(lambda: workload_api.listener.count == 0)


async def test_a_child_that_inherits_the_connection_gets_nothing_once_its_parent_ends(
    workload_api: ServedWorkloadApi,
) -> None:
    workload_api.identities.grant("/a")
    async with probe(workload_api, "heir") as process:
        await line_of(process)
        assert process.stdin
        process.stdin.write(b"go\n")
        child = json.loads(await line_of(process))["child"]
        try:
            process.kill()
            await process.wait()
            assert psutil.pid_exists(child)  # and holds the socket open
            await until(lambda: workload_api.service.streams == 0)
            await until(lambda: workload_api.listener.count == 0)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_a_process_that_became_another_program_is_given_nothing_more(
    workload_api: ServedWorkloadApi,
) -> None:
    grant = workload_api.identities.grant("/a")
    async with probe(workload_api, "exec") as process:
        await line_of(process)
        assert process.stdin
        process.stdin.write(b"go\n")
        name = Path(f"/proc/{process.pid}/comm")
        await until(lambda: name.read_text() == "sleep\n")
        before = workload_api.counted(FETCH, "PROCESS_CHANGED")
        workload_api.identities.rotate(grant)  # there is something to send
        await until(lambda: workload_api.service.streams == 0)
        assert workload_api.counted(FETCH, "PROCESS_CHANGED") == before + 1
        await until(lambda: workload_api.listener.count == 0)  # the connection is gone as well
        assert psutil.pid_exists(process.pid)


async def test_a_process_that_ends_while_its_answer_is_made_gets_none(
    open_directory: Path,
) -> None:
    """The answer waits; meanwhile the caller is killed. Nobody is left to be told."""
    waiting, going_on = asyncio.Event(), asyncio.Event()
    finished = asyncio.Event()

    class Slow(FakeIdentities):
        async def watch(self, caller: Any) -> Any:
            waiting.set()
            try:
                await going_on.wait()
            finally:
                finished.set()
            async for state in super().watch(caller):
                yield state

    async with served(open_directory, Slow()) as api:
        api.identities.grant("/a")
        async with probe(api, "x509") as process:
            await asyncio.wait_for(waiting.wait(), 10)
            process.kill()
            await asyncio.wait_for(finished.wait(), 10)
            await process.wait()
            assert process.stdout
            assert await process.stdout.read() == b""
        await until(lambda: api.service.streams == api.listener.count == 0)


# --- floods ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not ROOT, reason="only root can start processes of two users")
async def test_ten_thousand_connections_of_one_user_leave_room_for_another(
    open_directory: Path,
) -> None:
    async with served(open_directory, limit=600, per_uid_limit=300) as api:
        api.identities.grant("/a", who=user(12346))
        async with probe(api, "flood", "10000", uid=12345) as flooding:
            told: dict[str, int] = {}
            while "open" not in told:
                # While they come, and when they are there.
                async with probe(api, "x509", uid=12346) as process:
                    assert await line_of(process) == '{"ids": ["spiffe://example.org/a"]}'
                if "connected" in told or api.listener.count >= 300:
                    told |= json.loads(await line_of(flooding))
            assert told == {"connected": 10000, "open": 300}
            assert api.listener.count <= 302
            async with probe(api, "x509", uid=12346) as process:
                assert await line_of(process) == '{"ids": ["spiffe://example.org/a"]}'
        await until(lambda: api.listener.count <= 1)


async def test_the_connections_of_one_user_are_bounded_below_the_total(
    open_directory: Path,
) -> None:
    """The arithmetic of the test above, for whoever is not root."""
    async with served(open_directory, limit=60, per_uid_limit=40) as api:
        api.identities.grant("/a")
        async with probe(api, "flood", "500", uid=OTHER_USER) as flooding:
            assert json.loads(await line_of(flooding)) == {"connected": 500}
            assert json.loads(await line_of(flooding)) == {"open": 40}
            assert api.listener.count == 40  # 20 are left for others
        await until(lambda: api.listener.count == 0)
        assert (await fetch(api).read()).svids  # and the user itself may come back


async def test_a_client_that_never_reads_holds_little_and_harms_nobody(
    open_directory: Path,
) -> None:
    identities = FakeIdentities()
    identities.federate("other.org")
    grants = [identities.grant(f"/service-{n}", federates_with=["other.org"]) for n in range(20)]
    async with served(open_directory, identities) as api:
        good = fetch(api)
        assert len((await good.read()).svids) == 20
        async with probe(api, "deaf", "50") as process:
            assert json.loads(await line_of(process)) == {"streams": 50}
            await until(lambda: identities.watchers == 51)
            once = fetch(api)
            size = len((await once.read()).SerializeToString())
            once.cancel()
            assert size > 30_000
            before = psutil.Process().memory_info().rss
            for _ in range(60):
                identities.announce()  # as costly for the server as a rotation
                assert len((await good.read()).svids) == 20
            grown = psutil.Process().memory_info().rss - before
            # Sent and not read: 60 messages to each of 50 streams would be 90 MB and more.
            assert 60 * 50 * size > 90_000_000
            assert grown < 40_000_000, grown
            identities.rotate(grants[0])
            assert len((await good.read()).svids) == 20
            process.kill()
            await until(lambda: identities.watchers == 1)


async def test_a_request_longer_than_512_kib_is_refused_and_the_connection_lives(
    workload_api: ServedWorkloadApi,
) -> None:
    workload_api.identities.grant("/a")
    stub = workload_api.stub()
    for length, expected in (
        (MAX_REQUEST_BYTES - 100, (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_INVALID")),
        (MAX_REQUEST_BYTES, (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")),
        # Not even read: gRPC refuses it by the length it says it has.
        (5_000_000, (grpc.StatusCode.RESOURCE_EXHAUSTED, "")),
    ):
        request = ValidateJWTSVIDRequest(audience="a", svid="x" * length)
        error = await refusal(stub.ValidateJWTSVID(request, metadata=header()))
        assert refused_as(error) == expected
    answer = await stub.FetchJWTSVID(JWTSVIDRequest(audience=["x"]), metadata=header())
    assert answer.svids


async def test_headers_longer_than_8_kib_are_refused(workload_api: ServedWorkloadApi) -> None:
    workload_api.identities.grant("/a")
    stub = workload_api.stub()
    call = stub.FetchX509SVID(X509SVIDRequest(), metadata=header(padding="x" * 100_000))
    assert (await refusal(call)).code() is not grpc.StatusCode.OK
    assert (await fetch(workload_api).read()).svids


async def test_streams_of_one_process_and_one_user_are_bounded(open_directory: Path) -> None:
    limits = Limits(process_streams=5, user_streams=8)
    async with served(open_directory, limits=limits) as api:
        api.identities.grant("/a")
        mine = [fetch(api) for _ in range(5)]
        for each in mine:
            await each.read()
        error = await refusal(fetch(api))
        assert refused_as(error) == (UNAVAILABLE, "RATE_LIMITED")
        assert details_of(error)[1]
        # Another process of the user may hold what is left of the user's.
        async with probe(api, "deaf", "5") as process:
            await line_of(process)
            await until(lambda: api.identities.watchers == 8)
            await until(lambda: api.counted(FETCH, "RATE_LIMITED") == 3)
        await until(lambda: api.identities.watchers == 5)
        mine.pop().cancel()
        await until(lambda: api.identities.watchers == 4)
        assert (await fetch(api).read()).svids


async def test_streams_of_one_connection_are_bounded(open_directory: Path) -> None:
    """By HTTP/2 itself: what is too much is not begun, and a client that behaves waits."""
    limits = Limits(process_streams=1000)
    async with served(open_directory, limits=limits) as api:
        api.identities.grant("/a")
        async with probe(api, "deaf", "300"):
            await until(lambda: api.identities.watchers >= 100)
            await asyncio.sleep(0.3)
            assert api.identities.watchers == 100


async def test_calls_of_one_process_are_bounded_and_another_s_are_not(
    open_directory: Path,
) -> None:
    limits = Limits(calls_per_second=0.1, burst=30, user_factor=2)
    async with served(open_directory, limits=limits) as api:
        api.identities.grant("/a")
        stub = api.stub()
        refused = []
        for _ in range(40):
            try:
                await stub.FetchJWTSVID(JWTSVIDRequest(audience=["x"]), metadata=header())
            except grpc.aio.AioRpcError as error:
                refused.append(error)
        assert 8 <= len(refused) <= 10
        assert {refused_as(each) for each in refused} == {(UNAVAILABLE, "RATE_LIMITED")}
        assert all(0 < (details_of(each)[1] or 0) <= 10.1 for each in refused)
        # Opening streams is a call, too.
        assert refused_as(await refusal(fetch(api))) == (UNAVAILABLE, "RATE_LIMITED")
        async with probe(api, "x509") as process:
            assert await line_of(process) == '{"ids": ["spiffe://example.org/a"]}'


async def test_reflection_costs_a_call_for_each_question(open_directory: Path) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    limits = Limits(calls_per_second=0.01, burst=10)
    async with served(open_directory, limits=limits) as api:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(api.channel())
        call = stub.ServerReflectionInfo(metadata=header())
        answered = 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            while answered < 50:
                await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                assert await call.read() is not grpc.aio.EOF
                answered += 1
        assert answered == 9  # opening the stream was one, too
        assert refused_as(refused.value) == (UNAVAILABLE, "RATE_LIMITED")


def test_a_user_s_budget_is_larger_than_one_process_s_and_not_endless() -> None:
    now = [0.0]
    limits = CallerLimits(
        Limits(calls_per_second=10, burst=10, user_factor=3), monotonic=lambda: now[0]
    )

    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid
            self.start_time = 7

        def check(self) -> None: ...

    class Someone:
        uid = 5

        def __init__(self, pid: int) -> None:
            self.process = Process(pid)

    done = 0
    for pid in range(100):  # as many processes as one likes
        for _ in range(20):
            try:
                limits.charge(Someone(pid))  # type: ignore[arg-type]
            except RateLimited:
                break
            done += 1
    assert done == 30
    now[0] += 1
    limits.charge(Someone(1000))  # type: ignore[arg-type]


# --- the agent stops ------------------------------------------------------------------------------


async def test_streams_end_with_unavailable_when_the_agent_stops(open_directory: Path) -> None:
    async with served(open_directory) as api:
        api.identities.grant("/a")
        call = fetch(api)
        await call.read()
        api.service.end_streams()
        assert refused_as(await refusal(call)) == (UNAVAILABLE, "AGENT_NOT_READY")


async def test_a_client_that_waits_finds_the_agent_again(open_directory: Path) -> None:
    """The agent is restarted below a client; the same channel works on."""
    channel: Any = grpc.aio.insecure_channel(
        f"unix:{open_directory}/api.sock",
        [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)],
    )
    try:
        for path in ("/first", "/second"):
            async with served(open_directory) as api:
                api.identities.grant(path)
                call = channel.unary_stream(FETCH)(b"", metadata=header(), wait_for_ready=True)
                assert path.encode() in await asyncio.wait_for(call.read(), 10)
    finally:
        await channel.close()


async def test_stopping_does_not_wait_for_streams(open_directory: Path) -> None:
    async with served(open_directory) as api:
        api.identities.grant("/a")
        calls = [fetch(api) for _ in range(5)]
        for call in calls:
            await call.read()
        loop = asyncio.get_running_loop()
        began = loop.time()
        api.service.end_streams()
        await api.listener.stop(timedelta(seconds=5))
        assert loop.time() - began < 2


async def test_stopping_does_not_wait_for_a_client_that_never_reads(open_directory: Path) -> None:
    """Its stream cannot even be told: the connection's end must do."""
    identities = FakeIdentities()
    for number in range(100):
        identities.grant(f"/service-{number}")
    async with served(open_directory, identities) as api:
        async with probe(api, "deaf", "20"):
            await until(lambda: identities.watchers == 20)
            await asyncio.sleep(0.3)  # more than the socket takes is on its way
            loop = asyncio.get_running_loop()
            began = loop.time()
            api.service.end_streams()
            await api.listener.stop(timedelta(seconds=0.5))
            assert loop.time() - began < 2
        await until(lambda: api.service.streams == identities.watchers == 0)
