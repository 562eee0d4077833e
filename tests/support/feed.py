"""A verifier as the protocol asks for one: follows an agent's revocation feed over raw gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import grpc

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_api.broker.v1 import revocation_feed_pb2_grpc
from identity_client._wire.workload import SECURITY_METADATA


class Verifier:
    """What one verifier was told on one stream; it acknowledges as it applies.

    Attributes:
        at: the sequence of the last message; `complete_at`: of the last complete state.
        messages: all it was sent.
        ended: why the stream ended.
    """

    def __init__(self, call: Any, *, resume_from: int = 0, acks: bool = True) -> None:
        self.call = call
        self.resume_from = resume_from
        self.acks = acks
        self.at = resume_from
        self.complete_at = 0
        self.denied: set[str] = set()
        self.epochs: dict[str, int] = {}
        self.authorities: set[str] = set()
        self.messages: list[pb.FollowResponse] = []
        self.heard: list[float] = []
        self.ended: grpc.aio.AioRpcError | None = None
        self.over = False

    async def run(self) -> None:
        """Follow until the stream ends."""
        try:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self.say(hello=pb.FollowRequest.Hello(resume_from=self.resume_from, name="t"))
                async for message in self.call:
                    self.apply(message)
                    if self.acks:
                        await self.say(ack=pb.FollowRequest.Ack(sequence=message.sequence))
            # A write may meet the end before the reader does: the call itself knows why it ended.
            if await self.call.code() is not grpc.StatusCode.OK:
                self.ended = await _why(self.call)
        finally:
            self.over = True

    async def say(self, **step: Any) -> None:
        """Send one message."""
        await self.call.write(pb.FollowRequest(**step))

    def apply(self, message: pb.FollowResponse) -> None:
        """As revocation_feed.proto says; a gap fails the test."""
        self.messages.append(message)
        self.heard.append(monotonic())
        if message.full:
            assert message.HasField("denied_authorities") or not message.complete
            self.denied, self.epochs, self.authorities = set(), {}, set()
        else:
            assert message.previous == self.at, f"{message.previous} after {self.at}"
        assert message.full or message.sequence >= self.at
        assert message.heartbeat_ms > 0
        self.at = message.sequence
        self.denied |= {each.id for each in message.revoked}
        self.denied -= set(message.released_ids)
        self.epochs |= {each.spiffe_id: each.not_before for each in message.epochs}
        if message.HasField("denied_authorities"):
            self.authorities = set(message.denied_authorities.ids)
        if message.complete:
            self.complete_at = message.sequence

    @property
    def reason(self) -> str:
        """Why the stream ended, as its trailer says."""
        from support.line import reason_of

        return "" if self.ended is None else reason_of(self.ended)


async def _why(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
    )


@asynccontextmanager
async def verifier(
    channel: grpc.aio.Channel,
    *,
    resume_from: int = 0,
    acks: bool = True,
    metadata: Any = SECURITY_METADATA,
) -> AsyncIterator[Verifier]:
    """Follow for as long as the block lasts."""
    call = revocation_feed_pb2_grpc.RevocationFeedStub(channel).Follow(metadata=metadata)
    found = Verifier(call, resume_from=resume_from, acks=acks)
    task = asyncio.create_task(found.run())
    try:
        yield found
    finally:
        call.cancel()
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is not None:
            task.result()


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait until something is so; how long that took."""
    started = monotonic()
    while not holds():
        assert monotonic() - started < seconds, "it did not come about"
        await asyncio.sleep(0.002)
    return monotonic() - started
