"""A feed of revocations whose every message is the test's, on a Workload API's socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from identity_api.broker.v1 import credential_pb2
from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_client._wire.workload import SECURITY_HEADER, workload_api_handler
from identity_client.clock import utc_now
from support.workload_server import ScriptedWorkloadApi

Script = Callable[["FeedSession"], Awaitable[None]]


class FeedSession:
    """One stream."""

    def __init__(self, requests: Any, context: Any) -> None:
        self._requests = requests
        self._context = context
        self.hello = pb.FollowRequest.Hello()
        self.acks: list[int] = []

    async def greet(self) -> None:
        """Reads the hello."""
        self.hello = (await anext(self._requests)).hello

    async def send(self, message: pb.FollowResponse | bytes) -> None:
        """Sends a message, or octets that may be none."""
        octets = message if isinstance(message, bytes) else message.SerializeToString()
        await self._context.write(octets)

    async def acked(self, sequence: int) -> None:
        """Waits for the acknowledgement of that sequence."""
        while sequence not in self.acks:
            self.acks.append((await anext(self._requests)).ack.sequence)

    async def hang(self) -> None:
        """Says nothing more."""
        await asyncio.Event().wait()


class ScriptedFeed:
    """Streams, each with the next script; the last is repeated."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.sessions: list[FeedSession] = []
        self.headers: list[str] = []

    async def _follow(self, requests: Any, context: Any) -> None:
        session = FeedSession(aiter(requests), context)
        number = len(self.sessions)
        self.sessions.append(session)
        self.headers.append(dict(context.invocation_metadata()).get(SECURITY_HEADER, ""))
        await session.greet()
        await self.scripts[min(number, len(self.scripts) - 1)](session)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, over octets."""
        follow: Any = grpc.stream_stream_rpc_method_handler(
            self._follow, pb.FollowRequest.FromString
        )
        return grpc.method_handlers_generic_handler(
            "identity_api.broker.v1.RevocationFeed", {"Follow": follow}
        )


@asynccontextmanager
async def feeding(
    api: ScriptedWorkloadApi, feed: ScriptedFeed | None, path: Path
) -> AsyncIterator[None]:
    """Serves both on one socket."""
    server = grpc.aio.server()
    handlers = [workload_api_handler(api)] + ([feed.handler()] if feed else [])
    server.add_generic_rpc_handlers(tuple(handlers))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


def told(
    sequence: int,
    previous: int = 0,
    *,
    full: bool = False,
    complete: bool = True,
    revoked: dict[str, str] | None = None,
    released: tuple[str, ...] = (),
    **fields: Any,
) -> pb.FollowResponse:
    """A message; `revoked` is id to SPIFFE ID."""
    expires = int(utc_now().timestamp()) + 3600
    return pb.FollowResponse(
        sequence=sequence,
        previous=previous,
        full=full,
        complete=complete,
        revoked=[
            pb.RevokedCredential(
                id=one,
                spiffe_id=whose,
                kind=credential_pb2.CREDENTIAL_KIND_X509,
                expires_at=expires,
            )
            for one, whose in (revoked or {}).items()
        ],
        released_ids=released,
        heartbeat_ms=fields.pop("heartbeat_ms", 5000),
        **fields,
    )


def says(*messages: pb.FollowResponse | bytes) -> Script:
    """Says these, and then nothing more."""

    async def script(session: FeedSession) -> None:
        for message in messages:
            await session.send(message)
        await session.hang()

    return script
