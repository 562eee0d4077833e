"""The revocation feed of this machine: whoever has an identity here may follow what is revoked.

- `identity_api.broker.v1.RevocationFeed`, beside the Workload API and by its rules: the security
  header, the caller from the connection, a stream that ends with its process or its identity.
- A call says from where it goes on, and acknowledges what it has applied; nothing else it says
  counts. By what name the broker knows it is the agent's word: SPIFFE ID, slash, process number.
- Acknowledgements are not charged as calls: there are never more of them than messages.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, Final, Protocol, cast

import grpc

from identity_broker.agent.identity import Caller
from identity_broker.agent.relay import Follower, Relay
from identity_broker.agent.workload_api.front import Callers, End, Front
from identity_broker.agent.workload_api.limits import CallerLimits
from identity_broker.errors import BrokerError, InvariantViolated, MalformedRequest
from identity_broker.telemetry.metrics import Metrics
from identity_client._wire.relay import FOLLOW, SERVICE_NAME, FollowRequest

__all__ = ["SERVICE_NAME", "RevocationFeed"]

_HELLO_SECONDS: Final = 10.0
_LONGEST: Final = 1024
_MOST_VERSION_BYTES: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Names(Protocol):
    """Knows who calls: `identities.Identities`."""

    def watch_name(self, caller: Caller) -> AsyncIterator[str]:
        """Yield the caller's SPIFFE ID, and again when it is another; ends by raising."""
        ...


class RevocationFeed:
    """The service, as handlers of a gRPC server.

    Args:
        relay: what followers are told.
        names: who they are.
        callers: the process behind gRPC's peer name; raises CallerUnknown.
        limits: what a process and a user may do; may be shared with other services.
        metrics: where calls are counted.
    """

    def __init__(
        self,
        relay: Relay,
        names: Names,
        callers: Callers,
        *,
        limits: CallerLimits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._relay = relay
        self._names = names
        self._front = Front(
            callers, limits or CallerLimits(), metrics or Metrics(), longest=_LONGEST
        )

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What the listener serves."""
        methods = {"Follow": self._front.follow(FOLLOW, FollowRequest, self._follow)}
        return [grpc.method_handlers_generic_handler(SERVICE_NAME, methods)]

    @property
    def streams(self) -> int:
        """Streams being served."""
        return self._front.streams

    def end_streams(self) -> None:
        """End every stream with Unavailable; for when the agent stops."""
        self._front.end_streams()

    async def _follow(
        self, requests: AsyncIterator[Any], caller: Caller, end: End
    ) -> AsyncIterator[bytes]:
        resume_from = await _hello(requests)
        async with aclosing(cast("Any", self._names.watch_name(caller))) as names:
            named = _named(caller, await anext(names))
            follower = self._relay.join(named, caller.uid, resume_from, end)
            # Beside this generator, which may be stuck in sending.
            beside = [
                _beside(self._rename(names, caller, follower), follower),
                _beside(_read(requests, follower), follower),
            ]
            try:
                async with aclosing(cast("Any", follower.messages())) as messages:
                    async for message in messages:
                        yield message
            finally:
                self._relay.leave(follower)
                for task in beside:
                    task.cancel()
                # The iterators are in use until then, and could not be closed.
                await asyncio.wait(beside)

    async def _rename(self, names: AsyncIterator[str], caller: Caller, follower: Follower) -> None:
        async for name in names:
            self._relay.rename(follower, _named(caller, name))


def _beside(work: Coroutine[Any, Any, None], follower: Follower) -> asyncio.Task[None]:
    """Work beside a follower's stream; what it raises ends the stream."""

    def ended(task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, BrokerError):
            bug = InvariantViolated(detail=f"{type(error).__name__}: {error}")
            bug.__cause__ = error
            error = bug
        follower.refuse(error)

    task = asyncio.create_task(work, name="follower")
    task.add_done_callback(ended)
    return task


async def _hello(requests: AsyncIterator[Any]) -> int:
    """Where the follower says it stands.

    Raises:
        MalformedRequest: it says anything else, or nothing for a while.
    """
    try:
        async with asyncio.timeout(_HELLO_SECONDS):
            first = await anext(requests, None)
    except TimeoutError as error:
        raise MalformedRequest("the first message did not come in time") from error
    if first is None or first.WhichOneof("step") != "hello":
        raise MalformedRequest("the first message must be hello")
    hello = first.hello
    if hello.name and not _NAME.fullmatch(hello.name):
        raise MalformedRequest("hello.name must be at most 64 of [A-Za-z0-9._:-]")
    if len(hello.version.encode()) > _MOST_VERSION_BYTES:
        raise MalformedRequest(f"hello.version must be at most {_MOST_VERSION_BYTES} bytes")
    return int(hello.resume_from)


async def _read(requests: AsyncIterator[Any], follower: Follower) -> None:
    """Take acknowledgements until the follower says no more.

    Raises:
        MalformedRequest: it says anything else.
    """
    async for request in requests:
        if request.WhichOneof("step") != "ack":
            raise MalformedRequest("every message after the first must be ack")
        follower.acknowledge(request.ack.sequence)
    follower.finish()


def _named(caller: Caller, spiffe_id: str) -> str:
    return f"{spiffe_id}/{caller.process.pid}"
