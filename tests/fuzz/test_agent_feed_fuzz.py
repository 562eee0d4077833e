"""Any messages to an agent's revocation feed: it refuses or goes on, and tells the others."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from hypothesis import given
from hypothesis import strategies as st

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_broker.agent.identity import Caller
from identity_broker.agent.listener import WorkloadListener
from identity_broker.agent.mirror import Mirror
from identity_broker.agent.relay import Relay
from identity_broker.agent.revocation_feed import RevocationFeed
from identity_broker.domain.clock import SystemClock
from identity_ca.spiffe_id import TrustDomain
from identity_client._wire.relay import FOLLOW
from identity_client._wire.workload import SECURITY_METADATA
from identity_client.node.values import SyncedBundle, SyncedRevocation, SyncUpdate
from support.feed import until, verifier

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SHORT = timedelta(seconds=0.2)
REFUSED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE}

field = st.builds(
    lambda tag, body: bytes([tag, len(body)]) + body, st.integers(0, 127), st.binary(max_size=60)
)
hello = st.builds(
    lambda resume, name: pb.FollowRequest(
        hello=pb.FollowRequest.Hello(resume_from=resume, name=name)
    ).SerializeToString(),
    st.integers(0, 2**64 - 1) | st.integers(0, 9),
    st.text(max_size=8) | st.just(""),
)
ack = st.builds(
    lambda sequence: pb.FollowRequest(
        ack=pb.FollowRequest.Ack(sequence=sequence)
    ).SerializeToString(),
    st.integers(0, 2**64 - 1) | st.integers(0, 9),
)
message = hello | ack | st.lists(field, max_size=4).map(b"".join) | st.binary(max_size=1200)


class Everybody:
    """Everybody is the same workload."""

    async def watch_name(self, caller: Caller) -> AsyncIterator[str]:
        yield "spiffe://example.org/web"
        await caller.ended()


async def unacknowledged(_revision: int) -> None: ...


def update(revision: int, *, full: bool = False) -> SyncUpdate:
    revoked = SyncedRevocation(
        f"{revision:040x}", "x509", "spiffe://example.org/web", NOW + timedelta(days=1), NOW
    )
    return SyncUpdate(
        revision=revision,
        previous=revision - 1,
        full=full,
        entries=(),
        removed_ids=(),
        bundle=SyncedBundle("example.org", (b"root",), (), 1, timedelta(minutes=1)),
        revocations=(revoked,),
        released_ids=(),
        epochs=(),
        denied_authorities=(),
        crls=(),
        entries_digest=0,
        sent_at=NOW,
        _acknowledge=unacknowledged,
    )


@given(st.lists(st.lists(message, max_size=6), min_size=1, max_size=12))
def test_any_messages_to_the_feed(streams: list[list[bytes]]) -> None:
    async def scenario() -> None:
        mirror = Mirror(TrustDomain("example.org"))
        relay = Relay(mirror, SystemClock(), is_fresh=lambda: True)

        def tell(revision: int, *, full: bool = False) -> None:
            changed = mirror.apply(update(revision, full=full), now=NOW, tick=0.0)
            relay.told(changed.denied)

        tell(1, full=True)
        with tempfile.TemporaryDirectory() as directory:
            listener = WorkloadListener(Path(directory) / "run" / "w.sock")
            feed = RevocationFeed(relay, Everybody(), listener.callers.of)
            await listener.start(feed.handlers())
            address = listener.address.replace("unix://", "unix:")
            try:
                async with (
                    grpc.aio.insecure_channel(address) as channel,
                    verifier(channel) as one,
                ):
                    for messages in streams:
                        await send(channel, messages)
                    tell(2)
                    await until(lambda: one.complete_at == 2)
                    assert not one.over
            finally:
                feed.end_streams()
                await listener.stop(SHORT)

    asyncio.run(scenario())


async def send(channel: grpc.aio.Channel, messages: list[bytes]) -> None:
    """Say all of it, and be refused or not."""
    call: Any = channel.stream_stream(FOLLOW)(metadata=SECURITY_METADATA)
    try:
        for each in messages:
            await call.write(each)
        await call.done_writing()
        async with asyncio.timeout(10):
            async for _ in call:
                pass
    except asyncio.InvalidStateError:
        assert await call.code() in REFUSED
    except grpc.aio.AioRpcError as error:
        # INTERNAL is gRPC's own word for a message that meets the end of its call.
        local = error.code() is grpc.StatusCode.INTERNAL and not error.trailing_metadata()
        assert local or error.code() in REFUSED, error  # noqa: PT017
    finally:
        call.cancel()
