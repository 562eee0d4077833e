"""What every call on the agent's socket passes through, in one order, written once.

    header → caller → limits → message → the service → the caller once more → the answer

- header   before anything: what a browser can be made to send goes no further (EP-3)
- caller   from the connection, never from what the call says (EP-9)
- limits   before any work: the budget is the process's and its user's
- once more: the process may have ended, or become another program, while the answer was made

Nothing leaves but an answer or a refusal with a reason. A stream ends when its process ends, and
is ended with Unavailable when the agent stops.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, Self, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError, Message

from identity_broker.agent.identity import Caller
from identity_broker.agent.rpc_status import CANCELLED, OK, AbortArguments, abort_arguments
from identity_broker.agent.workload_api.limits import CallerLimits
from identity_broker.domain.buckets import Buckets
from identity_broker.errors import (
    AgentNotReady,
    BrokerError,
    CallerUnknown,
    DeadlineExceeded,
    InvariantViolated,
    Kind,
    MalformedRequest,
    SecurityHeaderMissing,
)
from identity_broker.telemetry.logs import bind_call, get_logger
from identity_broker.telemetry.metrics import Metrics
from identity_client._wire.workload import SECURITY_HEADER, SECURITY_VALUE

Callers: TypeAlias = Callable[[str], Caller]
UnaryFunction: TypeAlias = Callable[[Any, Caller], Awaitable[Message]]
StreamFunction: TypeAlias = Callable[[Any, Caller], AsyncIterator[Message]]
End: TypeAlias = Callable[[BrokerError], None]
FollowFunction: TypeAlias = Callable[[Any, Caller, End], AsyncIterator[bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

UNARY_SECONDS: Final = 30.0
_HELD_UP_SECONDS: Final = 10.0
_LOG_DEPTH: Final = 20.0  # lines of one user and reason at once; then one a second
_LEVELS: Final[Mapping[Kind, str]] = {
    Kind.DENIED: "info",  # a client that waits for its entry asks again and again
    Kind.UNAUTHENTICATED: "info",  # processes end
    Kind.DEADLINE: "error",
    Kind.CONFIG: "critical",
    Kind.INTERNAL: "critical",
}

_log = get_logger("workload api")


class Front:
    """Turns functions into handlers.

    Args:
        callers: the process behind gRPC's peer name; raises CallerUnknown.
        limits: what a process and a user may do.
        metrics: where calls are counted.
        header: whether the security header is asked for. Only for a service that is not the
            Workload API and whose clients cannot send it.
        longest: bytes a request may have; None: what the listener takes.
        unary_seconds: how long a unary call may take.
    """

    def __init__(
        self,
        callers: Callers,
        limits: CallerLimits,
        metrics: Metrics,
        *,
        header: bool = True,
        longest: int | None = None,
        unary_seconds: float = UNARY_SECONDS,
    ) -> None:
        self._parts = _Parts(
            callers,
            limits,
            metrics,
            asks_header=header,
            longest=longest,
            seconds=unary_seconds,
        )

    def unary(self, name: str, request: type[Message], function: UnaryFunction) -> Handler:
        """A handler for one message in, one out; `name` is the full method."""
        return grpc.unary_unary_rpc_method_handler(
            cast("Any", _Method(self._parts, name, request, function).unary)
        )

    def stream(self, name: str, request: type[Message], function: StreamFunction) -> Handler:
        """A handler for one message in, any number out."""
        return grpc.unary_stream_rpc_method_handler(
            cast("Any", _Method(self._parts, name, request, function).stream)
        )

    def duplex(self, name: str, request: type[Message], function: StreamFunction) -> Handler:
        """A handler for any number of messages in and out; each one in counts as a call."""
        return grpc.stream_stream_rpc_method_handler(
            cast("Any", _Method(self._parts, name, request, function).duplex)
        )

    def follow(self, name: str, request: type[Message], function: FollowFunction) -> Handler:
        """As `duplex`, for what goes to many followers alike.

        Its messages go out as the octets they are. Those that come in are not charged: `function`
        bounds them. It is also given what ends the stream with a refusal, even while a message
        waits for a slow reader.
        """
        return grpc.stream_stream_rpc_method_handler(
            cast("Any", _Method(self._parts, name, request, function).follow)
        )

    @property
    def streams(self) -> int:
        """Streams being served."""
        return len(self._parts.streams)

    def end_streams(self) -> None:
        """End every stream with Unavailable: the agent stops, and clients come back later."""
        for stream in list(self._parts.streams):
            stream.end(AgentNotReady("the agent is shutting down", hint="call again in a moment"))


class _Parts:
    """What the methods of one front share."""

    def __init__(
        self,
        callers: Callers,
        limits: CallerLimits,
        metrics: Metrics,
        *,
        asks_header: bool,
        longest: int | None,
        seconds: float,
    ) -> None:
        self._callers = callers
        self._asks_header = asks_header
        self._log_budget: Buckets[tuple[int, str]] = Buckets(1024)
        self._prefix = secrets.token_hex(5)
        self._counter = itertools.count(1)
        self.limits = limits
        self.metrics = metrics
        self.seconds = seconds
        self.longest = longest
        self.streams: set[_Supervision] = set()

    def begun(self, context: Context) -> Caller:
        """The steps before a call's message is looked at."""
        if self._asks_header and not has_security_header(context.invocation_metadata()):
            raise SecurityHeaderMissing
        caller = self._callers(context.peer())
        self.limits.charge(caller)
        return caller

    def correlation_id(self) -> str:
        """One per call; in the log and in the refusal."""
        return f"{self._prefix}-{next(self._counter):x}"

    def may_log(self, caller: Caller | None, reason: str) -> bool:
        """Whether a line about such a refusal may be written: nobody floods the log."""
        uid = -1 if caller is None else caller.uid
        return not self._log_budget.take((uid, reason), 1.0, _LOG_DEPTH, time.monotonic())


class _Method:
    """One method, ready to be served."""

    def __init__(
        self,
        parts: _Parts,
        name: str,
        request: type[Message],
        function: UnaryFunction | StreamFunction | FollowFunction,
    ) -> None:
        self._parts = parts
        self._name = name
        self._parse = request.FromString
        self._function = function
        metrics = parts.metrics
        self._ended = metrics.rpc_total
        self._ended_ok = metrics.rpc_total.labels(name, OK)
        self._seconds = metrics.rpc_seconds.labels(name)
        self._open = metrics.streams_open.labels(name)

    async def unary(self, raw: bytes, context: Context) -> bytes:
        """One message in, one out."""
        started = time.perf_counter()
        scope = asyncio.timeout(self._parts.seconds)
        caller: Caller | None = None
        try:
            caller = self._parts.begun(context)
            function = cast("UnaryFunction", self._function)
            async with scope:
                answer = await function(self._parsed(raw), caller)
            caller.check()
            sent = answer.SerializeToString()
        except BrokerError as exc:
            error = exc
        except asyncio.CancelledError:
            self._ended.labels(self._name, CANCELLED).inc()
            raise
        except TimeoutError as exc:
            error = DeadlineExceeded() if scope.expired() else _bug(exc)
        except Exception as exc:  # noqa: BLE001  # becomes INTERNAL, logged with its traceback
            error = _bug(exc)
        else:
            elapsed = time.perf_counter() - started
            self._ended_ok.inc()
            self._seconds.observe(elapsed)
            return sent
        self._seconds.observe(time.perf_counter() - started)
        await context.abort(*self._refused(error, caller))
        raise error  # pragma: no cover  # abort always raises

    async def stream(self, raw: bytes, context: Context) -> None:
        """One message in, any number out."""

        def begin(caller: Caller, _end: End) -> AsyncIterator[Message]:
            return cast("StreamFunction", self._function)(self._parsed(raw), caller)

        await self._stream(begin, context)

    async def duplex(self, messages: AsyncIterator[bytes], context: Context) -> None:
        """Any number of messages in and out."""

        def begin(caller: Caller, _end: End) -> AsyncIterator[Message]:
            each = self._each_parsed(messages, caller)
            return cast("StreamFunction", self._function)(each, caller)

        await self._stream(begin, context)

    async def follow(self, messages: AsyncIterator[bytes], context: Context) -> None:
        """As `duplex`; see `Front.follow`."""

        def begin(caller: Caller, end: End) -> AsyncIterator[bytes]:
            each = self._each_parsed(messages, None)
            return cast("FollowFunction", self._function)(each, caller, end)

        await self._stream(begin, context)

    async def _stream(
        self, begin: Callable[[Caller, End], AsyncIterator[Message | bytes]], context: Context
    ) -> None:
        parts = self._parts
        caller: Caller | None = None
        writing = False
        self._open.inc()
        try:
            caller = parts.begun(context)
            with parts.limits.stream(caller):
                async with (
                    _Supervision(caller, parts.streams) as supervision,
                    aclosing(cast("Any", begin(caller, supervision.end))) as answers,
                ):
                    async for answer in answers:
                        # The answer may have waited for a slow reader.
                        caller.check()
                        writing = True
                        await context.write(
                            answer if isinstance(answer, bytes) else answer.SerializeToString()
                        )
                        writing = False
        except BrokerError as exc:
            error = exc
        except asyncio.CancelledError:
            self._ended.labels(self._name, CANCELLED).inc()
            raise
        except Exception as exc:  # noqa: BLE001  # becomes INTERNAL, logged with its traceback
            if context.cancelled() or context.done():
                # The peer went away while we wrote.
                self._ended.labels(self._name, CANCELLED).inc()
                return
            error = _bug(exc)
        else:
            self._ended_ok.inc()
            return
        finally:
            self._open.dec()
        told = self._refused(error, caller)
        if writing:
            # The peer does not read, and gRPC takes nothing more before it does: no last word.
            # The connection's end, or the server's, ends this call.
            await asyncio.sleep(_HELD_UP_SECONDS)
        await context.abort(*told)

    def _parsed(self, raw: bytes) -> Message:
        longest = self._parts.longest
        if longest is not None and len(raw) > longest:
            raise MalformedRequest(f"a request of this service has at most {longest} bytes")
        try:
            return self._parse(raw)
        except DecodeError as exc:
            raise MalformedRequest("the request is not a message of this method") from exc

    async def _each_parsed(
        self, messages: AsyncIterator[bytes], charged: Caller | None
    ) -> AsyncIterator[Message]:
        async for raw in messages:
            if charged is not None:
                self._parts.limits.charge(charged)
            yield self._parsed(raw)

    def _refused(self, error: BrokerError, caller: Caller | None) -> AbortArguments:
        """Count and log a refusal; what `abort` takes."""
        correlation_id = self._parts.correlation_id()
        self._ended.labels(self._name, error.reason).inc()
        if error.kind is Kind.INTERNAL or self._parts.may_log(caller, error.reason):
            bind_call(correlation_id, self._name, "" if caller is None else f"uid:{caller.uid}")
            getattr(_log, _LEVELS.get(error.kind, "warning"))(
                "call refused",
                reason=error.reason,
                detail=error.detail or error.public,
                pid=None if caller is None else caller.process.pid,
                facts=error.fields or None,
                exc_info=error if error.kind is Kind.INTERNAL else None,
            )
        return abort_arguments(error, correlation_id)


class _Supervision:
    """Ends the task it is entered in when the caller's process ends, or when told to."""

    def __init__(self, caller: Caller, streams: set[_Supervision]) -> None:
        self._caller = caller
        self._streams = streams
        self._refusal: BrokerError | None = None
        self._task: asyncio.Task[Any] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._watch = asyncio.create_task(self._until_ended(), name="caller ended")
        self._streams.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _traceback: object
    ) -> None:
        self._streams.discard(self)
        if self._watch is not None:
            self._watch.cancel()
        if self._task is None or self._refusal is None:
            return
        ours = self._task.uncancel() == 0 or not isinstance(exc, asyncio.CancelledError)
        if ours:
            raise self._refusal from exc

    def end(self, refusal: BrokerError) -> None:
        """End the task with that refusal. The first one counts."""
        if self._task is not None and self._refusal is None:
            self._refusal = refusal
            self._task.cancel()

    async def _until_ended(self) -> None:
        await self._caller.ended()
        self.end(CallerUnknown("the process behind this connection has ended"))


def has_security_header(metadata: Any) -> bool:
    """Whether the metadata carry `workload.spiffe.io: true`, once and in that spelling (EP-3)."""
    values = [value for key, value in metadata or () if key == SECURITY_HEADER]
    return values == [SECURITY_VALUE]


def _bug(error: Exception) -> InvariantViolated:
    refusal = InvariantViolated(detail=f"{type(error).__name__}: {error}")
    refusal.__cause__ = error
    return refusal
