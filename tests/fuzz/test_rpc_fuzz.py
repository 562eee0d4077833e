"""Any bytes to any method: an answer with a reason, and the broker serves on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.server.rpc.methods import METHODS
from identity_client._wire.status import error_from_rpc
from support.rpc import Shell

POOL = descriptor_pool.Default()
FINE = {"MALFORMED_REQUEST", "METHOD_DENIED"}


def described(name: str) -> Any:
    service, _, method = name[1:].partition("/")
    return POOL.FindServiceByName(service).methods_by_name[method]


def services() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in METHODS:
        method = described(name)
        answer = message_factory.GetMessageClass(method.output_type)()
        made[name] = (
            stream(answer, method.client_streaming) if method.server_streaming else unary(answer)
        )
    return made


def unary(answer: Any) -> Any:
    async def function(_request: Any, _call: Any) -> Any:
        return answer

    return function


def stream(answer: Any, takes_many: bool) -> Any:
    async def function(requests: Any, _call: Any) -> AsyncIterator[Any]:
        if takes_many:
            async for _ in requests:
                yield answer
        else:
            yield answer

    return function


BYTES = st.binary(max_size=64) | st.builds(
    lambda tag, body: bytes([tag, len(body) & 0x7F]) + body,
    st.integers(0, 127),
    st.binary(max_size=40),
)


@given(st.lists(st.tuples(st.sampled_from(sorted(METHODS)), BYTES), min_size=1, max_size=60))
def test_any_bytes_to_any_method(calls: list[tuple[str, bytes]]) -> None:
    asyncio.run(send(calls))


async def send(calls: list[tuple[str, bytes]]) -> None:
    shell = Shell(services())
    async with shell.mtls() as listener:
        client = shell.authority.issue("spiffe://example.org/idb/node/x/a")
        async with shell.channel(listener.address, client) as channel:
            for name, raw in calls:
                method = described(name)
                try:
                    if method.client_streaming:
                        async for _ in channel.stream_stream(name)(iter([raw]), timeout=10):
                            pass
                    elif method.server_streaming:
                        async for _ in channel.unary_stream(name)(raw, timeout=10):
                            pass
                    else:
                        await channel.unary_unary(name)(raw, timeout=10)
                except grpc.aio.AioRpcError as exc:
                    assert error_from_rpc(exc).reason in FINE  # noqa: PT017
            await channel.unary_unary("/identity_api.broker.v1.Bundle/Get")(b"", timeout=10)
