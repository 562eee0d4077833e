"""RevocationFeed: what verifiers with a link of their own follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Final

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_broker.domain.clock import Clock
from identity_broker.errors import BrokerError, BrokerStopping, MalformedRequest
from identity_broker.lifecycle import followers
from identity_broker.lifecycle.feed import Batch, RevocationFeed
from identity_broker.lifecycle.followers import Follower
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import revocation_feed as convert
from identity_broker.server.rpc.greeting import greeting
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.telemetry.metrics import Metrics

_RETRY_SECONDS: Final = 1.0


class RevocationFeedService:
    """Keeps verifiers up to date."""

    def __init__(self, feed: RevocationFeed, metrics: Metrics, clock: Clock) -> None:
        self._feed = feed
        self._clock = clock
        self._messages = metrics.feed_messages_total
        self._full = metrics.feed_full_total
        self._bodies = convert.Bodies()

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        return {"/identity_api.broker.v1.RevocationFeed/Follow": self.follow}

    async def follow(
        self, requests: AsyncIterator[pb.FollowRequest], call: Call
    ) -> AsyncIterator[convert.Serialized]:
        """Send the verifier what it lacks, then every change."""
        if call.stopping.is_set():
            raise BrokerStopping(retry_after=_RETRY_SECONDS)
        hello = (await greeting(requests)).hello
        follower = await self._feed.open(convert.from_hello(hello, call.caller))
        call.checks.append(follower.check)
        call.endings.append(follower.end)
        # Beside this generator, which may be stuck in sending.
        reading = asyncio.create_task(self._read(requests, follower), name="acks")
        try:
            while (batch := await self._feed.next(follower)) is not None:
                if batch.full:
                    self._full.inc()
                for message in self._told(batch, follower):
                    yield message
                    follower.moved()
                    self._messages.inc()
            await reading  # the verifier says no more; a bug that ended it is raised here
        finally:
            self._feed.close(follower)
            reading.cancel()
            # The iterator is in use until then, and could not be closed.
            await asyncio.wait({reading})

    def _told(self, batch: Batch, follower: Follower) -> Iterator[convert.Serialized]:
        first = True
        for body, last in self._bodies.of(batch):
            envelope = convert.to_envelope(
                batch,
                first=first,
                complete=last,
                now=self._clock.now(),
                heartbeat=followers.HEARTBEAT_SECONDS,
                spread=self._feed.spread,
            )
            follower.handed(batch.sequence, None, complete=last)
            yield convert.Serialized(envelope + body)
            first = False

    async def _read(self, requests: AsyncIterator[pb.FollowRequest], follower: Follower) -> None:
        """Take acknowledgements until the verifier says no more, then end its stream."""
        refusal: BrokerError | None = None
        try:
            async for request in requests:
                if request.WhichOneof("step") != "ack":
                    raise MalformedRequest("every message after the first must be ack")
                self._feed.acknowledged(follower, request.ack.sequence)
        except BrokerError as error:
            refusal = error
        finally:
            follower.end(refusal)
