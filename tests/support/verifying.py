"""A verifier that follows the broker's feed with bare gRPC: the client's side of it, checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_api.broker.v1 import revocation_feed_pb2_grpc, revocation_pb2, svid_pb2, types_pb2
from support.line import AttestedClient, RunningBroker, csr_for, new_key

SECONDS = 15.0
HEARTBEAT_MS = 5000


@dataclass
class Known:
    """What a verifier knows; it outlives its streams."""

    sequence: int = 0
    revoked: dict[str, pb.RevokedCredential] = field(default_factory=dict)
    epochs: dict[str, pb.IdentityEpoch] = field(default_factory=dict)
    denied: list[str] = field(default_factory=list)


class FollowingVerifier:
    """One stream: applies and acknowledges what comes, and asserts that it fits.

    Args:
        known: where the verifier stands; fresh, it asks for everything.
        acknowledges: whether it does.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        known: Known | None = None,
        *,
        name: str = "",
        acknowledges: bool = True,
        hello: pb.FollowRequest.Hello | None = None,
    ) -> None:
        self.known = known or Known()
        self.messages: list[pb.FollowResponse] = []
        self.acknowledges = acknowledges
        self._requests: asyncio.Queue[pb.FollowRequest | None] = asyncio.Queue()
        self._stands: int | None = self.known.sequence or None
        self._full = False
        position = pb.FollowRequest.Hello(
            resume_from=self.known.sequence, name=name, version="test"
        )
        self.say(pb.FollowRequest(hello=hello or position))
        stub: Any = revocation_feed_pb2_grpc.RevocationFeedStub(channel)
        self.call = stub.Follow(self._said())

    async def _said(self) -> AsyncIterator[pb.FollowRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    def say(self, request: pb.FollowRequest | None) -> None:
        """Send a request; None says no more."""
        self._requests.put_nowait(request)

    def acknowledge(self, sequence: int | None = None) -> None:
        """Acknowledge a message; the last one."""
        at = self.known.sequence if sequence is None else sequence
        self.say(pb.FollowRequest(ack=pb.FollowRequest.Ack(sequence=at)))

    async def message(self) -> pb.FollowResponse:
        """The next message, applied."""
        async with asyncio.timeout(SECONDS):
            message = await self.call.read()
        if message is grpc.aio.EOF:
            raise AssertionError("the stream has ended")
        self._apply(message)
        self.messages.append(message)
        if self.acknowledges:
            self.acknowledge()
        return pb.FollowResponse.FromString(message.SerializeToString())

    async def update(self) -> list[pb.FollowResponse]:
        """Messages up to the one that completes a state."""
        messages = [await self.message()]
        while not messages[-1].complete:
            messages.append(await self.message())
        return messages

    def _apply(self, message: pb.FollowResponse) -> None:
        known = self.known
        count = len(message.revoked) + len(message.released_ids) + len(message.epochs)
        assert count <= 1000
        assert message.heartbeat_ms == HEARTBEAT_MS
        assert message.sent_at_ms > 0
        if message.full:
            assert not self._full, "full twice"
            assert message.previous == 0
            assert message.HasField("denied_authorities")
            assert not message.released_ids
            known.revoked.clear()
            known.epochs.clear()
        else:
            assert self._stands is not None
            assert message.previous == self._stands, "a gap"
            assert message.sequence >= self._stands
        revoked = {one.id: one for one in message.revoked}
        assert revoked.keys().isdisjoint(message.released_ids)
        assert not any(one.instance or one.entry_id for one in message.revoked)
        known.revoked.update(revoked)
        for credential_id in message.released_ids:
            known.revoked.pop(credential_id, None)
        known.epochs.update((one.spiffe_id, one) for one in message.epochs)
        if message.HasField("denied_authorities"):
            known.denied = list(message.denied_authorities.ids)
        self._stands = known.sequence = message.sequence
        self._full = message.full and not message.complete

    async def until(self, condition: Any) -> None:
        """Follow until `condition(known)` holds."""
        async with asyncio.timeout(SECONDS):
            while not condition(self.known):
                await self.message()

    async def refusal(self) -> grpc.aio.AioRpcError:
        """Follow until the broker refuses; return how."""
        try:
            async with asyncio.timeout(SECONDS):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError(f"no refusal, but {await self.call.code()}")


@asynccontextmanager
async def verifying(
    channel: grpc.aio.Channel, known: Known | None = None, **options: Any
) -> AsyncIterator[FollowingVerifier]:
    """A stream for as long as the block lasts, its first state applied; then it breaks."""
    verifier = FollowingVerifier(channel, known, **options)
    try:
        await verifier.update()
        yield verifier
    finally:
        verifier.call.cancel()


@dataclass
class Workload:
    """A workload with an SVID of its own, and a link to the broker."""

    svid: types_pb2.X509Svid
    key: ec.EllipticCurvePrivateKey
    channel: grpc.aio.Channel

    async def back(self, broker: RunningBroker) -> Workload:
        """The same workload at another broker, or at the same one that was restarted."""
        return Workload(self.svid, self.key, await broker.mtls(self.key, self.svid))


async def workload(broker: RunningBroker, node: AttestedClient, entry_id: str) -> Workload:
    """A workload of that entry."""
    key = new_key()
    svid = (await node.issue(entry_id, csr_for(key))).svid
    return Workload(svid, key, await broker.mtls(key, svid))


async def tokens(node: AttestedClient, entry_id: str, count: int) -> list[str]:
    """Issue JWT-SVIDs; return their jtis."""
    item = svid_pb2.BatchIssueJwtRequest.Item(entry_id=entry_id, audiences=["reports"])
    jtis = []
    for at in range(0, count, 500):
        items = [item] * min(500, count - at)
        answer = await node.svids.BatchIssueJwt(svid_pb2.BatchIssueJwtRequest(items=items))
        jtis += [result.svid.jti for result in answer.results]
    assert all(jtis)
    return jtis


async def status(broker: RunningBroker, order_id: str, wait_ms: int = 0) -> Any:
    """Call Revocation.Get."""
    revocations = await broker.revocations()
    return await revocations.Get(revocation_pb2.GetRevocationRequest(id=order_id, wait_ms=wait_ms))


async def closed(broker: RunningBroker, order_id: str) -> Any:
    """Wait until a revocation has its statement; return the answer of Revocation.Get."""
    async with asyncio.timeout(3 * SECONDS):
        while not (answer := await status(broker, order_id)).statement:
            await asyncio.sleep(0.1)
    return answer
