"""NodeSync: one stream for each node agent, and the wait for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_broker.domain.buckets import Buckets
from identity_broker.domain.clock import Clock
from identity_broker.errors import BrokerError, BrokerStopping, MalformedRequest, RateLimited
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.node_stream import NodeStream
from identity_broker.lifecycle.roster import Roster
from identity_broker.lifecycle.sync import NodeSync
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.convert import node_sync as convert
from identity_broker.server.rpc.convert import scalars
from identity_broker.server.rpc.convert.revocation_feed import Serialized
from identity_broker.server.rpc.greeting import greeting
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.server.rpc.services.svid import calling_node
from identity_broker.telemetry.metrics import Metrics

_RETRY_SECONDS: Final = 1.0
_MOST_VERSION_BYTES: Final = 64

# Who follows through a node is heard so often, and takes at most a tenth of our time.
_REPORT_SECONDS: Final = 0.05
_REST: Final = 10
# Messages that acknowledge nothing new: 100 a second, and 300 more at once.
_UNASKED_COST: Final = 1 / 100
_UNASKED_DEPTH: Final = 3.0
_CROWDED_RETRY_SECONDS: Final = 10.0


class NodeSyncService:
    """What node agents follow, and what operators wait for."""

    def __init__(
        self,
        sync: NodeSync,
        roster: Roster,
        directory: Directory,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._sync = sync
        self._roster = roster
        self._directory = directory
        self._clock = clock
        self._messages = metrics.sync_messages_total
        self._full = metrics.sync_full_total
        self._ack_seconds = metrics.sync_ack_seconds
        self._shared = convert.SharedMessages()

    def functions(self) -> Mapping[str, ServiceFunction]:
        """Full method name to service function."""
        service = "/identity_api.broker.v1.NodeSync/"
        return {f"{service}Sync": self.sync, f"{service}Await": self.wait}

    async def sync(
        self, requests: AsyncIterator[pb.SyncRequest], call: Call
    ) -> AsyncIterator[Serialized]:
        """Send the node what it lacks, then every change that concerns it."""
        if call.stopping.is_set():
            raise BrokerStopping(retry_after=_RETRY_SECONDS)
        hello = (await greeting(requests)).hello
        stream = await self._sync.open(
            calling_node(call),
            convert.from_hello(hello),
            scalars.from_text(hello.version, "hello.version", _MOST_VERSION_BYTES),
        )
        call.checks.append(stream.check)
        call.endings.append(stream.end)
        # Beside this generator, which may be stuck in sending.
        reading = asyncio.create_task(self._read(requests, stream), name="acks")
        try:
            while (news := await self._sync.next(stream)) is not None:
                if news.full:
                    self._full.inc()
                for message in convert.to_sync_responses(
                    news, stream.node_id, self._shared, self._roster.spread, self._clock.now()
                ):
                    yield message
                    stream.moved()
                    self._messages.inc()
            await reading  # the node says no more; a bug that ended it is raised here
        finally:
            self._sync.close(stream)
            reading.cancel()
            # The iterator is in use until then, and could not be closed.
            await asyncio.wait({reading})

    async def wait(self, request: pb.AwaitNodesRequest, _call: Call) -> pb.AwaitNodesResponse:
        """Wait until the connected nodes have applied what committed before the call."""
        node_ids, timeout = convert.from_await(request)
        await self._directory.sync()
        applied = await self._roster.applied(self._directory.seq, node_ids, timeout)
        return convert.to_applied(applied)

    async def _read(self, requests: AsyncIterator[pb.SyncRequest], stream: NodeStream) -> None:
        """Take what the node says until it says no more, then end its stream."""
        refusal: BrokerError | None = None
        reports = _Reports(
            lambda message: self._sync.report(
                stream, convert.from_verifiers(message, self._sync.trust_domain)
            ),
            stream.end,
        )
        try:
            async for request in requests:
                step = request.WhichOneof("step")
                if step == "ack":
                    took = stream.acknowledge(request.ack.revision)
                    if not took:
                        reports.charge()
                    for seconds in took:
                        self._ack_seconds.observe(seconds)
                    self._roster.progressed(stream)
                elif step == "verifiers":
                    reports.charge()
                    convert.check_verifiers(request.verifiers)
                    reports.take(request.verifiers)
                else:
                    raise MalformedRequest("every message after the first is ack or verifiers")
        except BrokerError as error:
            refusal = error
        finally:
            reports.close()
            stream.end(refusal)


class _Reports:
    """The reports on one stream: the newest now and then, whatever a node sends.

    Args:
        apply: parses and applies one.
        end: ends the stream, when that fails.
    """

    def __init__(
        self,
        apply: Callable[[pb.SyncRequest.Verifiers], None],
        end: Callable[[BrokerError], None],
    ) -> None:
        self._apply = apply
        self._end = end
        self._newest: pb.SyncRequest.Verifiers | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._budget: Buckets[None] = Buckets(1)

    def charge(self) -> None:
        """Count a message that acknowledges nothing.

        Raises:
            RateLimited: there are too many.
        """
        if self._budget.take(None, _UNASKED_COST, _UNASKED_DEPTH, time.monotonic()):
            raise RateLimited(
                "too many messages on this stream",
                hint="report the verifiers at most every 50 ms",
                retry_after=_CROWDED_RETRY_SECONDS,
            )

    def take(self, message: pb.SyncRequest.Verifiers) -> None:
        """Apply it now, or soon unless a newer one comes.

        Raises:
            MalformedRequest: it is not a proper report.
        """
        self._newest = message
        if self._timer is None:
            self._take()

    def close(self) -> None:
        """Apply nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _take(self) -> None:
        message, self._newest = self._newest, None
        self._timer = None
        if message is None:
            return
        began = time.monotonic()
        self._apply(message)
        took = time.monotonic() - began
        pause = max(_REPORT_SECONDS, took * _REST)
        self._timer = asyncio.get_running_loop().call_later(pause, self._due)

    def _due(self) -> None:
        try:
            self._take()
        except BrokerError as error:
            self._end(error)
