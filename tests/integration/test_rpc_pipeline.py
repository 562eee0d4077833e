from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status as RpcStatus

from identity_api.broker.v1 import bundle_pb2, entry_pb2, node_attestation_pb2, svid_pb2
from identity_broker import errors
from identity_broker.config.settings import LogLevel
from identity_broker.domain.caller import Caller, CallerClass, ListenerKind
from identity_broker.errors import BrokerError, InvariantViolated
from identity_broker.server.rpc.listener import BootstrapListener
from identity_broker.server.rpc.methods import METHODS, Rate, RateName
from identity_broker.server.rpc.reflection import METHOD as REFLECTION
from identity_broker.server.rpc.reflection import reflection_services
from identity_broker.server.rpc.status import item_status
from identity_broker.telemetry import logs
from identity_client._wire.status import error_from_item, error_from_rpc
from support.rpc import (
    ATTEST,
    ENTRY_LIST,
    GET,
    ISSUE,
    WATCH,
    Shell,
    empty_bundle,
    everybody,
    leaves,
)

WIRE_LEAVES = [
    leaf
    for leaf in leaves(BrokerError)
    if leaf.__module__ == errors.__name__ and leaf is not errors.ConfigError
]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


async def drained(call: Any) -> list[bytes]:
    return [message async for message in call]


def info_of(error: grpc.aio.AioRpcError) -> ErrorInfo:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            info = ErrorInfo()
            assert isinstance(value, bytes)
            RpcStatus.FromString(value).details[0].Unpack(info)
            return info
    raise AssertionError("no details")


async def test_every_error_survives_the_wire_unary_and_streaming() -> None:
    raising: list[type[BrokerError]] = []

    async def get(_request: Any, _call: Any) -> Any:
        raise raising[0](detail="INTERNALS", hint="do that", retry_after=1.25, secret="INTERNALS")

    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        yield bundle_pb2.WatchBundleResponse()
        raise raising[0](detail="INTERNALS", hint="do that", retry_after=1.25)

    shell = Shell({GET: get, WATCH: watch})
    async with shell.bootstrap() as channel:
        for leaf in WIRE_LEAVES:
            raising[:] = [leaf]
            for call in (
                channel.unary_unary(GET)(b"", metadata=(("x-correlation-id", "abc.1"),)),
                drained(
                    channel.unary_stream(WATCH)(b"", metadata=(("x-correlation-id", "abc.1"),))
                ),
            ):
                error = await refusal(call)
                assert "INTERNALS" not in repr(error), leaf
                seen = error_from_rpc(error)
                assert seen.reason == leaf.reason
                assert str(seen.message) == leaf.sentence
                assert seen.hint == "do that"
                assert seen.retry_after == 1.25
                assert seen.correlation_id == "abc.1"
                assert info_of(error).domain == "identity-broker"
            assert shell.count(GET, leaf.reason) == 1
            assert shell.count(WATCH, leaf.reason) == 1


@pytest.mark.parametrize("leaf", WIRE_LEAVES)
def test_every_error_survives_as_an_item_of_a_batch(leaf: type[BrokerError]) -> None:
    status = item_status(leaf(detail="INTERNALS", retry_after=0.2))
    seen = error_from_item(status)
    assert seen is not None
    assert seen.reason == leaf.reason
    assert seen.retry_after == 1
    assert status.code != 0
    assert "INTERNALS" not in str(status)
    assert error_from_item(item_status(None)) is None


async def test_a_bug_becomes_internal_and_its_detail_stays_here() -> None:
    async def get(_request: Any, _call: Any) -> Any:
        raise KeyError("internal/path")

    async def forgets(_request: Any, _call: Any) -> Any:
        raise TimeoutError("somebody's socket")

    log = io.StringIO()
    logs.configure(LogLevel.INFO, stream=log)
    error: grpc.aio.AioRpcError | None = None
    for function in (get, forgets):
        shell = Shell({GET: function})
        async with shell.bootstrap() as channel:
            error = await refusal(channel.unary_unary(GET)(b""))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert error.details() == "the broker failed; this is a bug"
        assert shell.count(GET, "INTERNAL") == 1
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    refused = [line for line in lines if line["event"] == "rpc refused"]
    assert [line["level"] for line in refused] == ["critical", "critical"]
    assert "internal/path" in refused[0]["exception"]
    assert error is not None
    assert refused[1]["correlation_id"] == info_of(error).metadata["correlation_id"]


async def test_bytes_that_are_no_message_are_refused_and_the_broker_serves_on() -> None:
    async def attest(requests: Any, _call: Any) -> AsyncIterator[Any]:
        async for _ in requests:
            yield node_attestation_pb2.AttestResponse(challenge=b"c")

    shell = Shell({GET: empty_bundle, ATTEST: attest})
    async with shell.bootstrap() as channel:
        error = await refusal(channel.unary_unary(GET)(b"\xff\xff\xff"))
        assert error_from_rpc(error).reason == "MALFORMED_REQUEST"
        stream = channel.stream_stream(ATTEST)()
        await stream.write(b"\x0a\x02\x0a\x00")
        assert await stream.read() != grpc.aio.EOF
        await stream.write(b"\xff\xff\xff")
        error = await refusal(stream.read())
        assert error_from_rpc(error).reason == "MALFORMED_REQUEST"
        await channel.unary_unary(GET)(b"")


async def test_a_message_beyond_four_mebibytes_is_refused() -> None:
    shell = Shell({GET: empty_bundle})
    async with shell.bootstrap() as channel:
        error = await refusal(channel.unary_unary(GET)(b"\x0a" * (4 * 1024 * 1024 + 1)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await channel.unary_unary(GET)(b"")


def test_a_method_without_a_row_is_not_served() -> None:
    shell = Shell({GET: empty_bundle}, methods={})
    with pytest.raises(InvariantViolated, match="has no row in the method table"):
        shell.handlers(ListenerKind.BOOTSTRAP)


def test_a_row_without_a_descriptor_is_not_served() -> None:
    name = "/identity_api.broker.v1.Bundle/Gone"
    shell = Shell({name: empty_bundle}, methods={name: METHODS[GET]})
    with pytest.raises(InvariantViolated, match="has no descriptor"):
        shell.handlers(ListenerKind.BOOTSTRAP)


async def test_a_method_nobody_serves_is_unimplemented() -> None:
    shell = Shell({GET: empty_bundle})
    async with shell.bootstrap() as channel:
        error = await refusal(channel.unary_unary("/identity_api.broker.v1.Bundle/Nothing")(b""))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert error_from_rpc(error).reason == "METHOD_UNKNOWN"
    assert shell.count("unknown", "METHOD_UNKNOWN") == 1


async def test_a_caller_of_another_class_is_denied_and_the_audit_hears_of_it() -> None:
    async def entries(_request: Any, _call: Any) -> Any:
        return entry_pb2.ListEntriesResponse()

    shell = Shell({ENTRY_LIST: entries, GET: empty_bundle})
    async with shell.bootstrap() as channel:
        error = await refusal(channel.unary_unary(ENTRY_LIST)(b""))
        assert error_from_rpc(error).reason == "METHOD_DENIED"
        assert "mTLS listener" in error_from_rpc(error).hint
        await channel.unary_unary(GET)(b"")
    assert [(r.method, r.reason) for r in shell.refused] == [(ENTRY_LIST, "METHOD_DENIED")]
    assert shell.refused[0].correlation_id == info_of(error).metadata["correlation_id"]


async def test_correlation_ids_are_taken_when_well_formed_and_made_otherwise() -> None:
    seen: list[str] = []

    async def get(_request: Any, call: Any) -> Any:
        seen.append(call.correlation_id)
        assert logs.current_correlation_id() == call.correlation_id
        return bundle_pb2.GetBundleResponse()

    shell = Shell({GET: get})
    async with shell.bootstrap() as channel:
        for sent in ("job-7_a.B", "a" * 64, "a" * 65, "a b", "", "a;b", "%0a"):
            await channel.unary_unary(GET)(b"", metadata=(("x-correlation-id", sent),))
        await channel.unary_unary(GET)(b"")
    assert seen[:2] == ["job-7_a.B", "a" * 64]
    made = seen[2:]
    assert len(set(made)) == len(made) == 6
    assert all(0 < len(m) <= 64 and m.isascii() and " " not in m for m in made)


async def test_the_method_s_deadline_ends_a_call_and_the_caller_s_may_be_shorter() -> None:
    ended: list[str] = []

    async def get(_request: Any, _call: Any) -> Any:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    row = dataclasses.replace(METHODS[GET], deadline=timedelta(seconds=0.3))
    shell = Shell({GET: get}, methods={GET: row})
    loop = asyncio.get_running_loop()
    async with shell.bootstrap() as channel:
        for timeout in (None, 20):
            started = loop.time()
            error = await refusal(channel.unary_unary(GET)(b"", timeout=timeout))
            assert 0.2 < loop.time() - started < 5
            assert error_from_rpc(error).reason == "DEADLINE_EXCEEDED"
            assert info_of(error).reason == "DEADLINE_EXCEEDED"
        error = await refusal(channel.unary_unary(GET)(b"", timeout=0.05))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            while len(ended) < 3:
                await asyncio.sleep(0.01)
    assert shell.count(GET, "DEADLINE_EXCEEDED") == 2


async def test_a_stream_with_a_deadline_ends_and_one_without_stays() -> None:
    async def attest(requests: Any, _call: Any) -> AsyncIterator[Any]:
        async for _ in requests:
            yield node_attestation_pb2.AttestResponse(challenge=b"c")

    row = dataclasses.replace(METHODS[ATTEST], deadline=timedelta(seconds=0.2))
    shell = Shell({ATTEST: attest}, methods={ATTEST: row})
    async with shell.bootstrap() as channel:
        stream = channel.stream_stream(ATTEST)()
        error = await refusal(stream.read())
        assert error_from_rpc(error).reason == "DEADLINE_EXCEEDED"


async def test_a_caller_that_hangs_up_cancels_its_call() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        try:
            yield bundle_pb2.WatchBundleResponse()
            started.set()
            await asyncio.sleep(30)
        finally:
            ended.set()

    shell = Shell({WATCH: watch})
    async with shell.bootstrap() as channel:
        call = channel.unary_stream(WATCH)(b"")
        await call.read()
        await asyncio.wait_for(started.wait(), 5)
        call.cancel()
        await asyncio.wait_for(ended.wait(), 5)
        async with asyncio.timeout(5):
            while not shell.count(WATCH, "CANCELLED"):
                await asyncio.sleep(0.01)
    gauge = shell.metrics.registry.get_sample_value("idb_streams_open", {"method": WATCH})
    assert gauge == 0


async def test_limits_are_per_caller_and_method_and_batches_count_their_items() -> None:
    async def issue(_request: Any, _call: Any) -> Any:
        return svid_pb2.BatchIssueX509Response()

    shell = Shell({ISSUE: issue, GET: empty_bundle}, rates={RateName.ISSUE: Rate(0.1, 10)})
    batch = svid_pb2.BatchIssueX509Request(items=[svid_pb2.BatchIssueX509Request.Item()] * 6)
    one = shell.authority.issue("spiffe://example.org/idb/node/join_token/a")
    two = shell.authority.issue("spiffe://example.org/idb/node/join_token/b")
    async with shell.mtls() as listener:
        async with shell.channel(listener.address, one) as channel:
            issue_call = channel.unary_unary(ISSUE)
            await issue_call(batch.SerializeToString())
            error = error_from_rpc(await refusal(issue_call(batch.SerializeToString())))
            assert error.reason == "RATE_LIMITED"
            assert error.retry_after == pytest.approx(20, abs=1)
            await channel.unary_unary(GET)(b"")  # another method, another budget
        async with shell.channel(listener.address, two) as channel:
            await channel.unary_unary(ISSUE)(batch.SerializeToString())


async def test_an_open_stream_ends_when_its_caller_is_banned() -> None:
    banned = asyncio.Event()
    finished = asyncio.Event()

    def authenticate(*arguments: Any) -> Caller:
        if banned.is_set():
            raise errors.NodeBanned
        return everybody(*arguments)

    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        try:
            yield bundle_pb2.WatchBundleResponse()
            await asyncio.sleep(60)
        finally:
            finished.set()

    shell = Shell({WATCH: watch, GET: empty_bundle}, authenticate=authenticate)
    node = shell.authority.issue("spiffe://example.org/idb/node/join_token/a")
    async with shell.mtls() as listener, shell.channel(listener.address, node) as channel:
        stream = channel.unary_stream(WATCH)(b"")
        await stream.read()
        await asyncio.sleep(1.3)  # one check has passed
        assert not stream.done()
        banned.set()
        started = asyncio.get_running_loop().time()
        error = await refusal(stream.read())
        assert asyncio.get_running_loop().time() - started < 1.5
        assert error_from_rpc(error).reason == "NODE_BANNED"
        assert finished.is_set()
        error = await refusal(channel.unary_unary(GET)(b""))
        assert error_from_rpc(error).reason == "NODE_BANNED"


async def test_an_open_stream_ends_when_its_caller_loses_the_class() -> None:
    classes = [CallerClass.ADMIN]

    def authenticate(*_arguments: Any) -> Caller:
        return Caller(frozenset(classes), "admin")

    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        while True:
            yield entry_pb2.WatchEntriesResponse()
            await asyncio.sleep(0.05)

    shell = Shell({"/identity_api.broker.v1.Entry/Watch": watch}, authenticate=authenticate)
    async with shell.bootstrap() as channel:
        stream = channel.unary_stream("/identity_api.broker.v1.Entry/Watch")(b"")
        await stream.read()
        classes[:] = [CallerClass.WORKLOAD]

        async def to_the_end() -> None:
            while await stream.read() is not grpc.aio.EOF:
                pass

        error = await refusal(to_the_end())
        assert error_from_rpc(error).reason == "METHOD_DENIED"


async def test_a_service_that_will_not_be_cancelled_cannot_keep_a_refused_stream_open() -> None:
    banned = asyncio.Event()

    def authenticate(*arguments: Any) -> Caller:
        if banned.is_set():
            raise errors.CredentialRevoked
        return everybody(*arguments)

    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        yield bundle_pb2.WatchBundleResponse()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return  # wrong, and harmless

    shell = Shell({WATCH: watch}, authenticate=authenticate)
    async with shell.bootstrap() as channel:
        stream = channel.unary_stream(WATCH)(b"")
        await stream.read()
        banned.set()
        error = await refusal(stream.read())
        assert error_from_rpc(error).reason == "CREDENTIAL_REVOKED"


async def test_successes_of_issuing_are_debug_lines_and_changes_are_info_lines() -> None:
    async def issue(_request: Any, _call: Any) -> Any:
        return svid_pb2.BatchIssueX509Response()

    async def attest(_requests: Any, _call: Any) -> AsyncIterator[Any]:
        yield node_attestation_pb2.AttestResponse()

    log = io.StringIO()
    logs.configure(LogLevel.INFO, stream=log)
    shell = Shell({ISSUE: issue, ATTEST: attest})
    node = shell.authority.issue("spiffe://example.org/idb/node/join_token/a")
    async with shell.mtls() as listener, shell.channel(listener.address, node) as channel:
        await channel.unary_unary(ISSUE)(b"")
        await drained(channel.stream_stream(ATTEST)(iter([b""])))
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    calls = [line for line in lines if line["event"] == "rpc"]
    assert [line["method"] for line in calls] == [ATTEST]
    assert calls[0]["caller"] == "spiffe://example.org/idb/node/join_token/a"
    assert calls[0]["reason"] == "OK"
    assert calls[0]["duration_ms"] > 0
    assert calls[0]["correlation_id"]


async def test_a_rate_limited_stranger_is_known_by_address() -> None:
    shell = Shell({GET: empty_bundle}, rates={RateName.READ: Rate(0.01, 2)})
    async with shell.bootstrap() as first:
        await first.unary_unary(GET)(b"")
        await first.unary_unary(GET)(b"")
        error = await refusal(first.unary_unary(GET)(b""))
        assert error_from_rpc(error).reason == "RATE_LIMITED"
    assert not shell.refused  # a limit is no matter for the audit


async def test_the_local_listener_needs_its_peers() -> None:
    shell = Shell({GET: empty_bundle})
    tls = shell.authority.broker()
    listener = BootstrapListener("127.0.0.1:0", current_tls=lambda: tls)
    await listener.start(shell.handlers(ListenerKind.LOCAL))
    try:
        async with shell.channel(listener.address, None) as channel:
            error = await refusal(channel.unary_unary(GET)(b""))
            assert error_from_rpc(error).reason == "INTERNAL"
    finally:
        await listener.stop(timedelta(0))


async def test_streams_without_an_end_end_in_peace_when_the_broker_drains() -> None:
    finished = asyncio.Event()

    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        try:
            yield bundle_pb2.WatchBundleResponse()
            await asyncio.sleep(60)
        finally:
            finished.set()

    async def attest(requests: Any, _call: Any) -> AsyncIterator[Any]:
        yield node_attestation_pb2.AttestResponse()
        await asyncio.sleep(0.6)  # its work is not cut short
        yield node_attestation_pb2.AttestResponse()

    services = {GET: empty_bundle}
    shell = Shell({**services, WATCH: watch, ATTEST: attest, **reflection_services(services)})
    async with shell.bootstrap() as channel:
        watching = channel.unary_stream(WATCH)(b"")
        await watching.read()
        reflecting = channel.stream_stream(REFLECTION)()
        await reflecting.write(b"")
        await reflecting.read()
        attesting = channel.stream_stream(ATTEST)(iter([b""]))
        await attesting.read()
        shell.stopping.set()
        started = asyncio.get_running_loop().time()
        assert await watching.read() is grpc.aio.EOF
        assert await reflecting.read() is grpc.aio.EOF
        assert asyncio.get_running_loop().time() - started < 0.55
        assert finished.is_set()
        assert await attesting.read() is not grpc.aio.EOF
        assert await attesting.read() is grpc.aio.EOF
    assert shell.count(WATCH, "OK") == 1
    assert shell.count(REFLECTION, "OK") == 1
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "drain"]


async def test_a_stranger_holds_sixteen_streams_and_a_node_more() -> None:
    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        yield bundle_pb2.WatchBundleResponse()
        await asyncio.sleep(60)

    shell = Shell({WATCH: watch})
    node = shell.authority.issue("spiffe://example.org/idb/node/join_token/a")
    async with shell.bootstrap() as channel:
        held = [channel.unary_stream(WATCH)(b"") for _ in range(16)]
        for stream in held:
            await stream.read()
        error = error_from_rpc(await refusal(channel.unary_stream(WATCH)(b"").read()))
        assert error.reason == "RATE_LIMITED"
        assert error.retry_after
        held[0].cancel()
        while shell.count(WATCH, "CANCELLED") < 1:
            await asyncio.sleep(0.01)
        await channel.unary_stream(WATCH)(b"").read()
    async with shell.mtls() as listener, shell.channel(listener.address, node) as channel:
        for _ in range(20):
            await channel.unary_stream(WATCH)(b"").read()


async def test_a_refusal_is_about_an_identity_or_a_network() -> None:
    refusals: list[BrokerError] = [errors.NodeBanned(), errors.Unauthenticated()]

    def authenticate(*_arguments: Any) -> Caller:
        raise refusals.pop(0)

    async def entries(_request: Any, _call: Any) -> Any:
        return entry_pb2.ListEntriesResponse()

    shell = Shell({ENTRY_LIST: entries}, authenticate=authenticate)
    name = "spiffe://example.org/idb/node/join_token/a"
    node = shell.authority.issue(name)
    async with shell.mtls() as listener, shell.channel(listener.address, node) as channel:
        await refusal(channel.unary_unary(ENTRY_LIST)(b""))
        await refusal(channel.unary_unary(ENTRY_LIST)(b""))
    assert [(call.caller, call.proven) for call in shell.refused] == [
        (name, True),
        ("127.0.0.1", False),
    ]
    shell = Shell({ENTRY_LIST: entries})
    async with shell.bootstrap() as channel:
        await refusal(channel.unary_unary(ENTRY_LIST)(b""))
    assert [(call.caller, call.proven) for call in shell.refused] == [("127.0.0.1", False)]
