"""Envoy's secret discovery service: SVIDs and authorities, pushed when they change.

- Every secret is the caller's own: what its process may know by the Workload API, under Envoy's
  names. The front attests and checks the process again before each response.
- A response is sent when something differs, never because a client refused the last one.
- The state-of-the-world variant cannot take a secret back: its stream ends with PermissionDenied
  when nothing is left of what it was sent. The incremental one says what was removed.
- No security header: Envoy's own configuration knows none for it, and this is not the Workload API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final, Generic, Protocol, TypeVar, cast

import grpc
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.message import Message

from identity_broker.agent.identity import Caller, WorkloadIdentities, WorkloadState
from identity_broker.agent.sds import messages
from identity_broker.agent.sds.resources import ClientWishes, resources_of
from identity_broker.agent.sds.subscription import (
    Answer,
    Incremental,
    Receipt,
    Resolve,
    StateOfTheWorld,
)
from identity_broker.agent.workload_api.front import Callers, Front
from identity_broker.agent.workload_api.limits import CallerLimits
from identity_broker.domain.buckets import Buckets
from identity_broker.errors import NoIdentity
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import Metrics

SERVICE_NAME: Final = "envoy.service.secret.v3.SecretDiscoveryService"
_MAX_LOGGED: Final = 500
_LOG_DEPTH: Final = 20.0  # refusals of one process logged at once; then one a second

_log = get_logger("sds")

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class _Subscription(Protocol[R_contra]):
    """Either variant of a stream."""

    def receive(self, request: R_contra) -> Receipt: ...

    def owed(self, resolve: Resolve) -> Answer | None: ...


class SecretDiscovery:
    """The service, as handlers of a gRPC server.

    Args:
        identities: what processes get.
        callers: the process behind gRPC's peer name; raises CallerUnknown.
        limits: what a process and a user may do; may be shared with other services.
        metrics: where calls are counted.
    """

    def __init__(
        self,
        identities: WorkloadIdentities,
        callers: Callers,
        *,
        limits: CallerLimits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._identities = identities
        self._front = Front(callers, limits or CallerLimits(), metrics or Metrics(), header=False)
        self._log_budget: Buckets[tuple[int, int]] = Buckets(1024)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What the listener serves."""
        front = self._front
        request, delta = discovery_pb2.DiscoveryRequest, discovery_pb2.DeltaDiscoveryRequest
        methods = {
            "StreamSecrets": front.duplex(_full("StreamSecrets"), request, self._stream_secrets),
            "DeltaSecrets": front.duplex(_full("DeltaSecrets"), delta, self._delta_secrets),
            "FetchSecrets": front.unary(_full("FetchSecrets"), request, self._fetch_secrets),
        }
        return [grpc.method_handlers_generic_handler(SERVICE_NAME, methods)]

    @property
    def streams(self) -> int:
        """Streams being served."""
        return self._front.streams

    def end_streams(self) -> None:
        """End every stream with Unavailable; for when the agent stops."""
        self._front.end_streams()

    # --- the three methods --------------------------------------------------------------------

    async def _stream_secrets(
        self, requests: AsyncIterator[Any], caller: Caller
    ) -> AsyncIterator[Message]:
        answers = self._answers(StateOfTheWorld(), messages.request_of, requests, caller)
        async with aclosing(cast("Any", answers)) as owed:
            async for answer in owed:
                if not answer.resources:
                    raise NoIdentity("nothing that this stream was sent is there any longer")
                yield messages.response_of(answer)

    async def _delta_secrets(
        self, requests: AsyncIterator[Any], caller: Caller
    ) -> AsyncIterator[Message]:
        subscription = Incremental()
        answers = self._answers(subscription, messages.delta_request_of, requests, caller)
        try:
            async with aclosing(cast("Any", answers)) as owed:
                async for answer in owed:
                    yield messages.delta_response_of(answer)
        except NoIdentity:
            if answer := subscription.withdrawn():
                yield messages.delta_response_of(answer)
            raise

    async def _fetch_secrets(self, message: Any, caller: Caller) -> Message:
        subscription = StateOfTheWorld()
        subscription.receive(messages.request_of(message))
        wishes = messages.wishes_of(message) or ClientWishes()
        async with aclosing(cast("Any", self._identities.watch(caller))) as states:
            state = await anext(states)
        answer = subscription.owed(_resolver(state, wishes))
        return messages.response_of(answer or Answer(nonce="", version="", resources=()))

    # --- what the two streams share -----------------------------------------------------------

    async def _answers(
        self,
        subscription: _Subscription[R],
        read: Callable[[Any], R],
        requests: AsyncIterator[Any],
        caller: Caller,
    ) -> AsyncIterator[Answer]:
        """The responses that a stream is owed, as its requests and the process's state change."""
        # Not before the client asks: refused while it still writes, gRPC tells it nothing useful.
        if (message := await anext(requests, None)) is None:
            return
        # The node stands in a stream's first request alone.
        wishes = messages.wishes_of(message) or ClientWishes()
        subscription.receive(read(message))
        state: WorkloadState | None = None
        told: Answer | None = None
        both = _Either(requests, self._identities.watch(caller))
        async with aclosing(cast("Any", both.items())) as items:
            async for message, change in items:
                state = change or state
                if message is not None:
                    receipt = subscription.receive(read(message))
                    if receipt is Receipt.REFUSED:
                        self._log_refusal(message, told, caller)
                if state is not None and (answer := subscription.owed(_resolver(state, wishes))):
                    told = answer
                    yield answer

    def _log_refusal(self, message: Any, told: Answer | None, caller: Caller) -> None:
        process = caller.process
        key = (process.pid, process.start_time)
        if self._log_budget.take(key, 1.0, _LOG_DEPTH, time.monotonic()):
            return
        _log.warning(
            "client refused a secret",
            error=message.error_detail.message[:_MAX_LOGGED],
            pid=process.pid,
            uid=caller.uid,
            names=[resource.name for resource in told.resources[:20]] if told else [],
            hint="nothing more is sent until the secret changes; the client keeps what it has",
        )


def _full(method: str) -> str:
    return f"/{SERVICE_NAME}/{method}"


def _resolver(state: WorkloadState, wishes: ClientWishes) -> Resolve:
    return lambda names, wildcard: resources_of(state, names, wildcard=wildcard, wishes=wishes)


A = TypeVar("A")
B = TypeVar("B")


class _Either(Generic[A, B]):
    """Two iterators as one: whichever has something first.

    - At most one item of each is held: what is not taken is not asked for.
    - It ends with either iterator, and raises what either raises.
    """

    def __init__(self, first: AsyncIterator[A], second: AsyncIterator[B]) -> None:
        self._first = first
        self._second = second

    async def items(self) -> AsyncIterator[tuple[A | None, B | None]]:
        """Pairs of which at least one half is there."""
        first = asyncio.ensure_future(_next_or_none(self._first))
        second = asyncio.ensure_future(_next_or_none(self._second))
        try:
            while True:
                await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
                one = first.result() if first.done() else None
                other = second.result() if second.done() else None
                if (first.done() and one is None) or (second.done() and other is None):
                    return
                if first.done():
                    first = asyncio.ensure_future(_next_or_none(self._first))
                if second.done():
                    second = asyncio.ensure_future(_next_or_none(self._second))
                yield one, other
        finally:
            for task in (first, second):
                task.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
            if (close := getattr(self._second, "aclose", None)) is not None:
                await close()


async def _next_or_none(iterator: AsyncIterator[A]) -> A | None:
    """The next item; None at the end."""
    return await anext(iterator, None)
