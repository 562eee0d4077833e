"""A node that follows its broker with bare gRPC: the client's side of NodeSync.Sync, checked."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_api.broker.v1 import node_sync_pb2_grpc, types_pb2
from support.line import TRUST_DOMAIN, AttestedClient, RunningBroker

SECONDS = 15.0


def digest_of(entries: dict[str, types_pb2.RegistrationEntry]) -> int:
    """The digest of entries, from the words of node_sync.proto alone."""
    digest = 0
    for entry in entries.values():
        octets = hashlib.sha256(entry.id.encode() + b"\0" + str(entry.revision).encode()).digest()
        digest ^= int.from_bytes(octets[:8], "big")
    return digest


@dataclass
class State:
    """What a node has; it outlives its streams."""

    revision: int = 0
    entries: dict[str, types_pb2.RegistrationEntry] = field(default_factory=dict)
    bundle: types_pb2.TrustBundle | None = None
    revoked: set[str] = field(default_factory=set)
    epochs: dict[str, int] = field(default_factory=dict)
    denied: list[str] | None = None
    crls: list[bytes] = field(default_factory=list)

    @property
    def digest(self) -> int:
        return digest_of(self.entries)

    @property
    def paths(self) -> set[str]:
        return {entry.spiffe_id.split("/", 3)[-1] for entry in self.entries.values()}


class FollowingNode:
    """One stream: applies and acknowledges what comes, and asserts that it fits.

    Args:
        state: where the node stands; a fresh one asks for everything.
        acknowledges: whether it does.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        state: State | None = None,
        *,
        acknowledges: bool = True,
        hello: pb.SyncRequest.Hello | None = None,
    ) -> None:
        self.state = state or State()
        self.messages: list[pb.SyncResponse] = []
        self.acknowledges = acknowledges
        self._requests: asyncio.Queue[pb.SyncRequest | None] = asyncio.Queue()
        self._joined: list[pb.SyncResponse] = []
        position = pb.SyncRequest.Hello(
            resume_from=self.state.revision,
            entries_digest=self.state.digest if self.state.revision else 0,
            version="test",
        )
        self.say(pb.SyncRequest(hello=hello or position))
        stub: Any = node_sync_pb2_grpc.NodeSyncStub(channel)
        self.call = stub.Sync(self._said())

    async def _said(self) -> AsyncIterator[pb.SyncRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    def say(self, request: pb.SyncRequest | None) -> None:
        """Send a request; None says no more."""
        self._requests.put_nowait(request)

    def acknowledge(self) -> None:
        """Acknowledge where the node stands."""
        self.say(pb.SyncRequest(ack=pb.SyncRequest.Ack(revision=self.state.revision)))

    def report(self, **verifiers: int) -> None:
        """Say who follows through the node: path → the revision its process 7 acknowledged."""
        told = [
            pb.SyncRequest.Verifier(name=f"spiffe://{TRUST_DOMAIN}/{name}/7", revision=revision)
            for name, revision in verifiers.items()
        ]
        self.say(pb.SyncRequest(verifiers=pb.SyncRequest.Verifiers(verifiers=told)))

    async def update(self) -> list[pb.SyncResponse]:
        """The messages of one whole update, applied."""
        while True:
            async with asyncio.timeout(SECONDS):
                message = await self.call.read()
            if message is grpc.aio.EOF:
                raise AssertionError("the stream has ended")
            self._joined.append(message)
            if message.complete:
                joined, self._joined = self._joined, []
                self._apply(joined)
                self.messages += joined
                if self.acknowledges:
                    self.acknowledge()
                return joined

    def _apply(self, joined: list[pb.SyncResponse]) -> None:
        state, first = self.state, joined[0]
        assert not any(message.full for message in joined[1:])
        assert all(message.revision == first.revision for message in joined)
        if first.full:
            assert joined[0].HasField("bundle")
            assert any(message.HasField("lists") for message in joined)
            assert any(message.HasField("denied_authorities") for message in joined)
            assert not any(message.released_ids for message in joined)
            state.entries.clear()
            state.revoked.clear()
            state.epochs.clear()
        else:
            assert first.previous == state.revision, "a gap"
        assert first.revision >= (0 if first.full else state.revision)
        for message in joined:
            assert len(message.changed) <= 500
            assert len(message.revocations) + len(message.released_ids) <= 1000
            assert message.ByteSize() < 4 * 1024 * 1024
            state.entries.update((entry.id, entry) for entry in message.changed)
            for entry_id in message.removed_ids:
                state.entries.pop(entry_id, None)
            if message.HasField("bundle"):
                state.bundle = message.bundle
            if message.HasField("lists"):
                state.crls = list(message.lists.crls)
            revoked = {item.id for item in message.revocations}
            assert revoked.isdisjoint(message.released_ids)
            state.revoked.update(revoked)
            state.revoked.difference_update(message.released_ids)
            state.epochs.update((one.spiffe_id, one.not_before) for one in message.epochs)
            if message.HasField("denied_authorities"):
                state.denied = list(message.denied_authorities.ids)
        state.revision = joined[-1].revision
        assert joined[-1].entries_digest == state.digest
        assert joined[-1].sent_at_ms > 0

    async def until(self, condition: Any) -> None:
        """Follow until `condition(state)` holds."""
        async with asyncio.timeout(SECONDS):
            while not condition(self.state):
                await self.update()

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
async def following(
    node: AttestedClient, state: State | None = None, **options: Any
) -> AsyncIterator[FollowingNode]:
    """A stream for as long as the block lasts, its first update applied; then it breaks."""
    follower = FollowingNode(node.channel, state, **options)
    try:
        await follower.update()
        yield follower
    finally:
        follower.call.cancel()


async def applied_by(
    broker: RunningBroker, *nodes: str, timeout_ms: int = 10_000
) -> pb.AwaitNodesResponse:
    """Call NodeSync.Await."""
    stub = await broker.stub(node_sync_pb2_grpc.NodeSyncStub)
    answer = await stub.Await(pb.AwaitNodesRequest(node_ids=nodes, timeout_ms=timeout_ms))
    return pb.AwaitNodesResponse.FromString(answer.SerializeToString())
