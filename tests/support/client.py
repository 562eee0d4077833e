"""A tiny gRPC service over bytes, sync and asyncio, and sources of a real broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from identity_client.integrations.grpc import (
    authorize_peers,
    authorize_peers_aio,
    peer_spiffe_id,
    server_credentials,
)
from identity_client.node import NodeKeeper
from support.line import RunningBroker

NAMES = {
    "unary_unary": "/test.Echo/Unary",
    "unary_stream": "/test.Echo/Repeat",
    "stream_unary": "/test.Echo/Join",
    "stream_stream": "/test.Echo/Chat",
}


def _unary(request: bytes, context: Any) -> bytes:
    return request + b"|" + str(peer_spiffe_id(context)).encode()


def _repeat(request: bytes, context: Any) -> Iterator[bytes]:
    for _ in range(int(request)):
        yield b"x"
        time.sleep(0.01)


def _join(requests: Iterator[bytes], context: Any) -> bytes:
    return b",".join(requests)


def _chat(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    yield from requests


async def _unary_aio(request: bytes, context: Any) -> bytes:
    return _unary(request, context)


async def _repeat_aio(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for _ in range(int(request)):
        yield b"x"
        await asyncio.sleep(0.01)


async def _join_aio(requests: AsyncIterator[bytes], context: Any) -> bytes:
    return b",".join([one async for one in requests])


async def _chat_aio(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for one in requests:
        yield one


def _service(unary: Any, repeat: Any, join: Any, chat: Any) -> grpc.GenericRpcHandler:
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Repeat": grpc.unary_stream_rpc_method_handler(repeat),
        "Join": grpc.stream_unary_rpc_method_handler(join),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
    }
    return grpc.method_handlers_generic_handler("test.Echo", handlers)


@contextmanager
def echo_server(source: Any, authorize: Any) -> Iterator[str]:
    """A threaded server; yields its address."""
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=8),
        interceptors=[authorize_peers(source, authorize)],
    )
    server.add_generic_rpc_handlers((_service(_unary, _repeat, _join, _chat),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(source))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@asynccontextmanager
async def echo_server_aio(source: Any, authorize: Any) -> AsyncIterator[str]:
    """An asyncio server; yields its address."""
    server = grpc.aio.server(interceptors=[authorize_peers_aio(source, authorize)])
    server.add_generic_rpc_handlers((_service(_unary_aio, _repeat_aio, _join_aio, _chat_aio),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(source))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def source_arguments(broker: RunningBroker) -> dict[str, Any]:
    """What every source needs to find `broker`."""
    return {
        "address": broker.addresses.address,
        "bootstrap_address": broker.addresses.bootstrap_address,
        "trust_domain": "example.org",
        "bundle_file": broker.settings.server.bundle_file,
    }


def due_now(keeper: NodeKeeper) -> None:
    """Makes the node's renewal due."""
    node = keeper._node
    assert node is not None
    keeper._node = replace(node, due=node.material.received)
    keeper._wake.set()


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until `condition` holds; fails the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)
