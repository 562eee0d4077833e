"""What every call passes through, in one order, written once.

    context → errors → observe → audit → authn → authz → limits → the service

- context    first, so that everything below, failures too, carries a correlation id
- errors     around the rest: nothing leaves but a refusal with a reason
- observe    inside errors' view of the outcome: every call is counted, refused ones too
- audit      before authn: a refusal for who the caller is must be kept
- authn      from memory, on every call: a connection outlives certificates, bans, revocations
- authz      the method's row against the caller's proven classes
- limits     last: the budget is the proven caller's, and strangers cannot spend it

No interceptor chain: one wrapper a method, built when the broker starts, straight-line inside.
A stream's caller is authenticated again every second for as long as the stream lives. A stream
without a deadline has no end of its own: soon after the broker starts to drain, it ends here.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, TypeAlias, cast

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from structlog.typing import FilteringBoundLogger

from identity_broker.domain.caller import (
    Caller,
    CallerClass,
    ListenerKind,
    LocalPeer,
    PeerCertificate,
)
from identity_broker.errors import (
    BrokerError,
    BrokerStopping,
    DeadlineExceeded,
    InvariantViolated,
    Kind,
    MalformedRequest,
    MethodDenied,
    Unauthenticated,
)
from identity_broker.server.rpc.call import Call
from identity_broker.server.rpc.limits import RateLimiter, network_of
from identity_broker.server.rpc.methods import METHODS, AuditLevel, MethodRow
from identity_broker.server.rpc.peer_certificate import PeerCertificates
from identity_broker.server.rpc.status import CANCELLED, OK, abort_arguments
from identity_broker.telemetry.logs import bind_call
from identity_broker.telemetry.metrics import Metrics

UnaryFunction: TypeAlias = Callable[[Any, Call], Awaitable[Any]]
StreamFunction: TypeAlias = Callable[[Any, Call], AsyncIterator[Any]]
ServiceFunction: TypeAlias = UnaryFunction | StreamFunction
Authenticate: TypeAlias = Callable[[ListenerKind, PeerCertificate | LocalPeer | None, str], Caller]

CORRELATION_KEY: Final = "x-correlation-id"
RECHECK_SECONDS: Final = 1.0
DRAIN_SECONDS: Final = 0.2  # for a last word, such as NOT_SERVING
DEADLINE_PRECISION_SECONDS: Final = 0.1
UNKNOWN_METHOD: Final = "unknown"
_CORRELATION_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_WHO: Final = frozenset({Kind.UNAUTHENTICATED, Kind.DENIED})
_LEVELS: Final[Mapping[Kind, str]] = {
    Kind.INVALID: "warning",
    Kind.UNAUTHENTICATED: "warning",
    Kind.DENIED: "warning",
    Kind.NOT_FOUND: "info",
    Kind.CONFLICT: "info",
    Kind.STALE: "info",
    Kind.EXHAUSTED: "warning",
    Kind.UNAVAILABLE: "error",
    Kind.DEADLINE: "error",
    Kind.CONFIG: "critical",
    Kind.INTERNAL: "critical",
}

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class LocalPeers(Protocol):
    """Knows which process is behind a connection of the admin socket."""

    def of(self, peer: str) -> LocalPeer:
        """The process behind gRPC's peer name.

        Raises:
            Unauthenticated: no connection of ours has that name.
        """
        ...


@dataclass(frozen=True, slots=True)
class RefusedCall:
    """A call refused for who the caller is; for the audit.

    `caller` is a proven identity or user, or else a stranger's network: `proven` says which.
    """

    method: str
    caller: str
    proven: bool
    reason: str
    detail: str
    correlation_id: str


@dataclass(frozen=True, slots=True)
class _Parts:
    """What all wrappers of one listener share."""

    listener: ListenerKind
    authenticate: Authenticate
    limiter: RateLimiter
    metrics: Metrics
    log: FilteringBoundLogger
    stopping: asyncio.Event
    local_peers: LocalPeers | None
    on_refused: Callable[[RefusedCall], None] | None
    certificates: PeerCertificates
    deadlines: _Deadlines
    drain: _Drain
    correlation_prefix: str
    counter: itertools.count[int]


def build_handlers(
    services: Mapping[str, ServiceFunction],
    *,
    listener: ListenerKind,
    authenticate: Authenticate,
    limiter: RateLimiter,
    metrics: Metrics,
    log: FilteringBoundLogger,
    stopping: asyncio.Event,
    local_peers: LocalPeers | None = None,
    on_refused: Callable[[RefusedCall], None] | None = None,
    methods: Mapping[str, MethodRow] = METHODS,
) -> list[grpc.GenericRpcHandler]:
    """The handlers a listener serves.

    Args:
        services: full method ("/package.Service/Method") → function.
        local_peers: who is behind the admin socket; `ListenerKind.LOCAL` needs it.
        on_refused: told of every call refused for who the caller is. Must not block.
        methods: the method table; tests bring their own.

    Raises:
        InvariantViolated: a function's method has no row in the table, or no descriptor.
    """
    parts = _Parts(
        listener=listener,
        authenticate=authenticate,
        limiter=limiter,
        metrics=metrics,
        log=log,
        stopping=stopping,
        local_peers=local_peers,
        on_refused=on_refused,
        certificates=PeerCertificates(),
        deadlines=_Deadlines(),
        drain=_Drain(stopping),
        correlation_prefix=secrets.token_hex(5),
        counter=itertools.count(1),
    )
    return [
        _Dispatch(
            {name: _handler(name, function, methods, parts) for name, function in services.items()},
            metrics,
        )
    ]


class _Dispatch(grpc.GenericRpcHandler):
    """Finds the wrapper by name. gRPC answers UNIMPLEMENTED where there is none."""

    def __init__(
        self, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]], metrics: Metrics
    ) -> None:
        self._handlers = handlers
        self._unknown = metrics.rpc_total.labels(UNKNOWN_METHOD, "METHOD_UNKNOWN")

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = self._handlers.get(handler_call_details.method)
        if handler is None:
            self._unknown.inc()
        return handler


def _handler(
    name: str, function: ServiceFunction, methods: Mapping[str, MethodRow], parts: _Parts
) -> grpc.RpcMethodHandler[Any, Any]:
    row = methods.get(name)
    if row is None:
        raise InvariantViolated(detail=f"{name} has no row in the method table")
    service_name, _, method_name = name.removeprefix("/").partition("/")
    try:
        service = descriptor_pool.Default().FindServiceByName(service_name)
        method = service.methods_by_name[method_name]
    except KeyError as exc:
        raise InvariantViolated(detail=f"{name} has no descriptor") from exc
    if method.client_streaming and not method.server_streaming:
        raise InvariantViolated(detail=f"{name}: client streaming is not built")
    request_type = message_factory.GetMessageClass(method.input_type)
    timed = not method.server_streaming
    wrapper = _Wrapper(name, function, row, request_type, timed=timed, parts=parts)
    # Messages are parsed and serialized in the wrappers, where a failure gets its reason.
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(cast("Any", wrapper.duplex))
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(cast("Any", wrapper.stream))
    return grpc.unary_unary_rpc_method_handler(cast("Any", wrapper.unary))


class _Wrapper:
    """One method, ready to be served."""

    def __init__(
        self,
        name: str,
        function: ServiceFunction,
        row: MethodRow,
        request_type: type[Message],
        *,
        timed: bool,
        parts: _Parts,
    ) -> None:
        self._timed = timed  # a stream's length says nothing of the broker
        self._name = name
        self._function = function
        self._row = row
        self._parse = request_type.FromString
        self._parts = parts
        self._deadline = None if row.deadline is None else row.deadline.total_seconds()
        self._endless = row.deadline is None
        self._anyone = CallerClass.ANYONE in row.callers
        self._ended = parts.metrics.rpc_total
        self._ended_ok = parts.metrics.rpc_total.labels(name, OK)
        self._seconds = parts.metrics.rpc_seconds.labels(name)
        self._open = parts.metrics.streams_open.labels(name)
        # What is issued stands in the ledger, and reads change nothing: their successes are
        # debug lines, which cost nothing where they are not written.
        changes = row.audit is AuditLevel.CHANGES
        self._log_success = parts.log.info if changes else parts.log.debug

    # --- the three shapes of a call -----------------------------------------------------------

    async def unary(self, raw: bytes, context: Context) -> bytes:
        """One message in, one out."""
        started = time.perf_counter()
        correlation_id = self._begin(context)
        peer = context.peer()
        deadlines = self._parts.deadlines
        task = asyncio.current_task()
        credential = caller = None
        try:
            credential = self._credential(context, peer)
            caller = self._authenticated(credential, peer)
            self._authorized(caller)
            request = self._parsed(raw)
            self._charged(caller, peer, request)
            call = self._call(caller, correlation_id)
            function = cast("UnaryFunction", self._function)
            deadlines.begin(task, self._limit(context))
            response = await function(request, call)
            answer = cast("bytes", response.SerializeToString())
        except BrokerError as exc:
            error = exc
        except asyncio.CancelledError:
            if not deadlines.expired(task):
                self._ended.labels(self._name, CANCELLED).inc()
                raise
            error = DeadlineExceeded()
        except Exception as exc:  # noqa: BLE001  # becomes INTERNAL, logged with its traceback
            error = _bug(exc)
        else:
            elapsed = time.perf_counter() - started
            self._ended_ok.inc()
            self._seconds.observe(elapsed)
            self._log_success("rpc", reason=OK, duration_ms=_milliseconds(elapsed))
            return answer
        finally:
            deadlines.end(task)
        self._refused(error, caller or credential, peer, correlation_id, started)
        await context.abort(*abort_arguments(error, correlation_id))
        raise error  # pragma: no cover  # abort always raises

    async def stream(self, raw: bytes, context: Context) -> None:
        """One message in, any number out."""
        await self._stream(raw, None, context)

    async def duplex(self, messages: AsyncIterator[bytes], context: Context) -> None:
        """Any number of messages in and out."""
        await self._stream(None, messages, context)

    async def _stream(
        self, raw: bytes | None, messages: AsyncIterator[bytes] | None, context: Context
    ) -> None:
        started = time.perf_counter()
        correlation_id = self._begin(context)
        peer = context.peer()
        scope: asyncio.Timeout | None = None
        credential = caller = None
        self._open.inc()
        try:
            credential = self._credential(context, peer)
            caller = self._authenticated(credential, peer)
            self._authorized(caller)
            self._charged(caller, peer, None)
            request = self._parsed(raw) if raw is not None else self._each_parsed(messages)
            call = self._call(caller, correlation_id)
            function = cast("StreamFunction", self._function)
            supervision = _Supervision(
                lambda: self._recheck(credential, peer, call),
                self._parts.drain if self._endless else None,
            )
            with self._parts.limiter.stream(caller, peer) if self._endless else nullcontext():
                async with (
                    asyncio.timeout(self._limit(context)) as scope,
                    supervision,
                    aclosing(cast("Any", function(request, call))) as responses,
                ):
                    async for response in responses:
                        await context.write(response.SerializeToString())
        except BrokerError as exc:
            error = exc
        except asyncio.CancelledError:
            self._ended.labels(self._name, CANCELLED).inc()
            raise
        except TimeoutError as exc:
            # Ours; or one that somebody forgot to translate.
            late = scope is not None and scope.expired()
            error = DeadlineExceeded() if late else _bug(exc)
        except Exception as exc:  # noqa: BLE001  # becomes INTERNAL, logged with its traceback
            error = _bug(exc)
        else:
            elapsed = time.perf_counter() - started
            self._ended_ok.inc()
            self._log_success("rpc", reason=OK, duration_ms=_milliseconds(elapsed))
            return
        finally:
            self._open.dec()
        self._refused(error, caller or credential, peer, correlation_id, started)
        await context.abort(*abort_arguments(error, correlation_id))

    # --- context ------------------------------------------------------------------------------

    def _begin(self, context: Context) -> str:
        """The call's correlation id, the caller's own where it is well-formed."""
        correlation_id = ""
        for key, value in context.invocation_metadata() or ():
            if key == CORRELATION_KEY:
                if _CORRELATION_ID.fullmatch(cast("str", value)):
                    correlation_id = cast("str", value)
                break
        if not correlation_id:
            parts = self._parts
            correlation_id = f"{parts.correlation_prefix}-{next(parts.counter):x}"
        return correlation_id

    def _call(self, caller: Caller, correlation_id: str) -> Call:
        bind_call(correlation_id, self._name, caller.name)
        return Call(self._name, caller, correlation_id, self._parts.stopping)

    def _limit(self, context: Context) -> float | None:
        """Our own deadline, or None where gRPC's (the caller's) comes first."""
        remaining = cast("float | None", context.time_remaining())
        if self._deadline is None or (remaining is not None and remaining <= self._deadline):
            return None
        return self._deadline

    # --- errors, observe, audit ---------------------------------------------------------------

    def _refused(
        self,
        error: BrokerError,
        who: Caller | PeerCertificate | LocalPeer | None,
        peer: str,
        correlation_id: str,
        started: float,
    ) -> None:
        elapsed = time.perf_counter() - started
        parts = self._parts
        name = _proven_name(error, who)
        bind_call(correlation_id, self._name, name or peer)
        self._ended.labels(self._name, error.reason).inc()
        if self._timed:
            self._seconds.observe(elapsed)
        # A thousand agents are told that the broker stops: that is no thousand errors.
        level = "debug" if isinstance(error, BrokerStopping) else _LEVELS[error.kind]
        getattr(parts.log, level)(
            "rpc refused",
            reason=error.reason,
            detail=error.detail or error.public,
            peer=peer,
            duration_ms=_milliseconds(elapsed),
            facts=error.fields or None,
            exc_info=error if error.kind is Kind.INTERNAL else None,
        )
        if (
            parts.on_refused is not None
            and error.kind in _WHO
            and self._row.audit is not AuditLevel.NONE
        ):
            parts.on_refused(
                RefusedCall(
                    method=self._name,
                    caller=name or network_of(peer),
                    proven=bool(name),
                    reason=error.reason,
                    detail=error.detail,
                    correlation_id=correlation_id,
                )
            )

    # --- authn, authz, limits -----------------------------------------------------------------

    def _credential(self, context: Context, peer: str) -> PeerCertificate | LocalPeer | None:
        """What the listener saw of the caller."""
        parts = self._parts
        if parts.listener is ListenerKind.MTLS:
            pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
            if pem is None:
                raise Unauthenticated
            return parts.certificates.of(pem)
        if parts.listener is ListenerKind.LOCAL:
            if parts.local_peers is None:
                raise InvariantViolated(detail="the local listener was built without its peers")
            return parts.local_peers.of(peer)
        return None

    def _authenticated(self, credential: PeerCertificate | LocalPeer | None, peer: str) -> Caller:
        return self._parts.authenticate(self._parts.listener, credential, peer)

    def _recheck(
        self, credential: PeerCertificate | LocalPeer | None, peer: str, call: Call
    ) -> None:
        try:
            self._authorized(self._authenticated(credential, peer))
        except BrokerError as refusal:
            for ended in call.endings:
                ended(refusal)
            raise
        for check in call.checks:
            check()

    def _authorized(self, caller: Caller) -> None:
        if self._anyone or not self._row.callers.isdisjoint(caller.classes):
            return
        listener = self._parts.listener
        raise MethodDenied(
            hint="call it on the mTLS listener, or on the admin socket"
            if listener is ListenerKind.BOOTSTRAP
            else "callers that may: " + ", ".join(sorted(self._row.callers)),
            detail=f"the caller is {', '.join(sorted(caller.classes)) or 'of no class'}",
        )

    def _charged(self, caller: Caller, peer: str, request: Message | None) -> None:
        row = self._row
        if row.rate is None:
            return
        cost = 1
        if row.counted and request is not None:
            cost = max(1, len(getattr(request, row.counted)))
        self._parts.limiter.charge(caller, peer, self._name, row.rate, cost)

    # --- messages -----------------------------------------------------------------------------

    def _parsed(self, raw: bytes) -> Message:
        try:
            return self._parse(raw)
        except DecodeError as exc:
            raise MalformedRequest("the request is not a message of this method") from exc

    async def _each_parsed(self, messages: AsyncIterator[bytes] | None) -> AsyncIterator[Message]:
        if messages is not None:
            async for raw in messages:
                yield self._parsed(raw)


class _Deadlines:
    """Cancels unary calls that outlive their method's deadline.

    One coarse timer for all calls: `asyncio.timeout` for each would cost more than the rest of
    the pipeline, and a deadline of seconds does not need its precision.
    """

    def __init__(self) -> None:
        self._ends: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._armed = False

    def begin(self, task: asyncio.Task[Any] | None, seconds: float | None) -> None:
        """Watch the task; None seconds: no deadline."""
        if seconds is None or task is None:
            return
        self._ends[task] = time.monotonic() + seconds
        if not self._armed:
            self._arm()

    def end(self, task: asyncio.Task[Any] | None) -> None:
        """Forget the task."""
        self._ends.pop(cast("asyncio.Task[Any]", task), None)
        if self._late:
            self._late.discard(cast("asyncio.Task[Any]", task))

    def expired(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether the CancelledError just caught was the deadline's and nobody else's."""
        return task is not None and task in self._late and task.uncancel() == 0

    def _arm(self) -> None:
        self._armed = True
        asyncio.get_running_loop().call_later(DEADLINE_PRECISION_SECONDS, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        for task in [task for task, end in self._ends.items() if end <= now]:
            del self._ends[task]
            self._late.add(task)
            task.cancel()
        self._armed = False
        if self._ends:
            self._arm()


class _Drain:
    """Ends streams soon after the broker starts to drain; one task for all of them."""

    def __init__(self, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        self._streams: set[_Supervision] = set()
        self._watching: asyncio.Task[None] | None = None

    def enter(self, stream: _Supervision) -> None:
        """End this stream, too."""
        self._streams.add(stream)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="drain")

    def leave(self, stream: _Supervision) -> None:
        """It has ended."""
        self._streams.discard(stream)
        if not self._streams and self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _watch(self) -> None:
        await self._stopping.wait()
        while True:  # until the last one has left
            await asyncio.sleep(DRAIN_SECONDS)
            for stream in self._streams:
                stream.end()


class _Supervision:
    """Ends the task it is entered in: with a refusal, or in peace when the broker drains.

    Args:
        check: raises the refusal; asked every second.
        drain: calls `end`.
    """

    def __init__(
        self,
        check: Callable[[], object],
        drain: _Drain | None = None,
        seconds: float = RECHECK_SECONDS,
    ) -> None:
        self._check = check
        self._drain = drain
        self._seconds = seconds
        self._refusal: BaseException | None = None
        self._ended = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._arm()
        if self._drain is not None:
            self._drain.enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _traceback: object
    ) -> bool:
        if self._timer is not None:
            self._timer.cancel()
        if self._drain is not None:
            self._drain.leave(self)
        if self._task is None or not (self._ended or self._refusal):
            return False
        cancelled = isinstance(exc, asyncio.CancelledError)
        ours = self._task.uncancel() == 0 or not cancelled
        if ours and self._refusal is not None:
            raise self._refusal from exc
        return ours and cancelled

    def end(self) -> None:
        """End the task as if its work were done. Twice is once."""
        if self._task is not None and not (self._ended or self._refusal):
            self._ended = True
            self._task.cancel()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._tick)

    def _tick(self) -> None:
        if self._ended:
            return
        try:
            self._check()
        except Exception as exc:  # noqa: BLE001  # raised in the stream's own task
            self._refusal = exc
            if self._task is not None:
                self._task.cancel()
        else:
            self._arm()


def _proven_name(error: BrokerError, who: Caller | PeerCertificate | LocalPeer | None) -> str:
    """Whom a refusal is about, or "" when that is a stranger.

    A certificate that was refused in itself proves nothing, whatever name is in it; one whose
    holder was refused does.
    """
    if isinstance(who, Caller):
        return "" if who.is_anonymous else who.name
    if isinstance(who, LocalPeer):
        return f"uid:{who.uid}"
    if who is not None and error.kind is Kind.DENIED:
        return str(who.spiffe_id)
    return ""


def _bug(error: Exception) -> InvariantViolated:
    refusal = InvariantViolated(detail=f"{type(error).__name__}: {error}")
    refusal.__cause__ = error
    return refusal


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
