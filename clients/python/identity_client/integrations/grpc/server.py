"""The server's half: credentials that follow rotation, and who may call.

- Deny by default: without an accepted, unexpired, unrevoked X.509-SVID no handler runs.
- A server whose own identity was revoked or has expired refuses every call.
- The check reads memory alone and costs a few microseconds; handlers are wrapped once each.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import grpc
import grpc.aio
from spiffe import SpiffeId

from identity_client._wire.status import refusal_status
from identity_client.authorization import Authorize, PeerRule, check_allowed, peer_rule
from identity_client.credential import IdentitySnapshot
from identity_client.errors import IdentityError, PeerRejected, SourceError
from identity_client.integrations.grpc.running_calls import (
    AioCall,
    AioThreadCall,
    RunningCall,
    RunningCalls,
    SyncCall,
)
from identity_client.peer import Peer, check_current, peer_from_pem
from identity_client.staleness import StalenessPolicy
from identity_client.tls import SnapshotSource

__all__ = ["authorize_peers", "authorize_peers_aio", "peer_spiffe_id", "server_credentials"]

_CERTIFICATE = "x509_pem_cert"
_MAX_HANDLERS = 4096


def server_credentials(source: SnapshotSource) -> grpc.ServerCredentials:
    """Credentials for `add_secure_port` (sync and aio) that every handshake reads anew.

    Clients must show a certificate that leads to the bundle; who may call is for
    `authorize_peers` to say, and without it everybody of the trust domain may.

    Raises:
        SourceError: there is no identity yet; wait for the source first.
    """
    configured = source.snapshot()
    initial = _configuration(configured)

    def newest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal configured
        try:
            snapshot = source.snapshot()
        except SourceError:
            return None  # Keeps the old one; the interceptor refuses the calls and says why.
        if snapshot is configured:
            return None
        configured = snapshot
        return _configuration(snapshot)

    # The stubs leave out that None means "unchanged".
    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", newest)
    return grpc.dynamic_ssl_server_credentials(initial, fetch, require_client_authentication=True)


def _configuration(snapshot: IdentitySnapshot) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(snapshot.x509.key_pem, snapshot.x509.chain_pem)],
        root_certificates=snapshot.bundle.roots_pem,
    )


def peer_spiffe_id(context: Any) -> SpiffeId:
    """The caller's SPIFFE ID, in a handler (sync or aio).

    Raises:
        PeerRejected: the caller showed no X.509-SVID.
    """
    return _peer(context).spiffe_id


def authorize_peers(
    source: SnapshotSource, authorize: Authorize, *, staleness: StalenessPolicy | None = None
) -> grpc.ServerInterceptor:
    """Refuses every call whose peer `authorize` does not name, that has expired or is revoked.

    The calls of a peer that is revoked while they run are ended, streams where nobody says
    anything included. Refusals carry google.rpc.ErrorInfo: PEER_REJECTED (PERMISSION_DENIED),
    PEER_REVOKED and PEER_EXPIRED (UNAUTHENTICATED); REVOCATIONS_STALE, and IDENTITY_REVOKED and
    IDENTITY_EXPIRED when this server itself has no identity any more (UNAVAILABLE).

    Args:
        source: whose revocations to follow.
        authorize: SPIFFE IDs, or a rule (see `identity_client.authorization`).
        staleness: what silence about revocations means here; None for the source's policy.

    Raises:
        SettingsInvalid: a SPIFFE ID in `authorize` is not one.
    """
    return _Interceptor(_Gate(source, peer_rule(authorize), staleness))


def authorize_peers_aio(
    source: SnapshotSource, authorize: Authorize, *, staleness: StalenessPolicy | None = None
) -> grpc.aio.ServerInterceptor:
    """The same for `grpc.aio.server`."""
    return _AioInterceptor(_Gate(source, peer_rule(authorize), staleness))


class _Gate:
    """Decides on one call."""

    __slots__ = ("__weakref__", "_rule", "_running", "_source", "_staleness")

    def __init__(
        self, source: SnapshotSource, rule: PeerRule, staleness: StalenessPolicy | None
    ) -> None:
        self._source = source
        self._rule = rule
        self._staleness = staleness
        self._running = RunningCalls(source, self._check_current)

    def check(self, context: Any) -> Peer:
        """The peer of a call that may go on.

        Raises:
            PeerRejected, SourceError.
        """
        peer = _peer(context)
        check_allowed(peer, self._rule, bundle=self._source.snapshot().bundle)
        self._check_current(peer)
        return peer

    def recheck(self, peer: Peer) -> None:
        """What may change while a stream is open."""
        self._source.snapshot()
        self._check_current(peer)

    def begin(self, call: RunningCall) -> None:
        """The call runs until `end`, and no longer than its peer is not revoked.

        Raises:
            PeerRejected: it has been revoked in between.
        """
        self._running.begin(call)

    def end(self, call: RunningCall) -> None:
        """The call's handler is done."""
        self._running.end(call)

    def _check_current(self, peer: Peer) -> None:
        check_current(peer, self._source.denied, staleness=self._staleness)


def _peer(context: Any) -> Peer:
    certificates = context.auth_context().get(_CERTIFICATE)
    if not certificates:
        raise PeerRejected("the caller showed no certificate")
    return peer_from_pem(certificates[0])


class _WrappedHandlers:
    """Wraps each method's handler once; servers return the same handler object for every call."""

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        self._wrap = wrap
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    def of(self, method: str, handler: Any) -> Any:
        known = self._wrapped.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = self._wrap(handler)
        if len(self._wrapped) < _MAX_HANDLERS:
            self._wrapped[method] = (handler, wrapped)
        return wrapped


class _Interceptor(grpc.ServerInterceptor):
    def __init__(self, gate: _Gate) -> None:
        self._gate = gate
        self._handlers = _WrappedHandlers(self._wrap)

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        return self._handlers.of(handler_call_details.method, handler)

    def _wrap(self, handler: Any) -> Any:
        return _rebuild(handler, _guard(self._gate, handler))


def _guard(
    gate: _Gate, handler: Any, running: type[SyncCall | AioThreadCall] = SyncCall
) -> Callable[[Any], Any]:
    """Wraps a handler that runs in a thread."""

    def guard(behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def unary(request: Any, context: Any) -> Any:
            call = _admit(gate, context, running)
            try:
                if handler.request_streaming:
                    request = _checked(gate, call.peer, request, context)
                return behavior(request, context)
            finally:
                gate.end(call)

        def stream(request: Any, context: Any) -> Iterator[Any]:
            call = _admit(gate, context, running)
            try:
                if handler.request_streaming:
                    request = _checked(gate, call.peer, request, context)
                messages = _checked(gate, call.peer, behavior(request, context), context)
                for message in messages:
                    if not call.hold():
                        return
                    yield message
                    if (refusal := call.free()) is not None:
                        _abort(context, refusal)
                    break
                yield from messages
            finally:
                gate.end(call)

        return stream if handler.response_streaming else unary

    return guard


def _admit(
    gate: _Gate, context: Any, running: type[SyncCall | AioThreadCall]
) -> SyncCall | AioThreadCall:
    try:
        call = running(gate.check(context), context)
        gate.begin(call)
    except IdentityError as error:
        _abort(context, error)
        raise
    return call


def _checked(gate: _Gate, peer: Peer, messages: Iterator[Any], context: Any) -> Iterator[Any]:
    for message in messages:
        try:
            gate.recheck(peer)
        except IdentityError as error:
            _abort(context, error)
            raise
        yield message


def _abort(context: Any, error: IdentityError) -> None:
    context.abort_with_status(refusal_status(error))


class _AioInterceptor(grpc.aio.ServerInterceptor):
    def __init__(self, gate: _Gate) -> None:
        self._gate = gate
        self._handlers = _WrappedHandlers(self._wrap)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._handlers.of(handler_call_details.method, handler)

    def _wrap(self, handler: Any) -> Any:
        return _rebuild(handler, _guard_aio(self._gate, handler))


def _guard_aio(gate: _Gate, handler: Any) -> Callable[[Any], Any]:
    """Wraps a handler that runs on the event loop."""
    in_thread = _guard(gate, handler, AioThreadCall)

    def guard(behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def awaited(request: Any, context: Any) -> Any:
            call = await _admit_aio(gate, context)
            try:
                if handler.request_streaming:
                    request = _checked_aio(gate, call.peer, request, context)
                if handler.response_streaming:
                    context = _WritingContext(call, context)
                return await behavior(request, context)
            finally:
                gate.end(call)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            call = await _admit_aio(gate, context)
            try:
                if handler.request_streaming:
                    request = _checked_aio(gate, call.peer, request, context)
                messages = _checked_aio(gate, call.peer, behavior(request, context), context)
                async for message in messages:
                    if not call.hold():
                        return
                    yield message
                    if (refusal := call.free()) is not None:
                        await _abort_aio(context, refusal)
                    break
                async for message in messages:
                    yield message
            finally:
                gate.end(call)

        # As grpc.aio itself tells them apart: what is neither runs in its thread pool.
        if inspect.isasyncgenfunction(behavior):
            return stream
        return awaited if inspect.iscoroutinefunction(behavior) else in_thread(behavior)

    return guard


class _WritingContext:
    """The context of a handler that writes its answers itself."""

    def __init__(self, call: AioCall, context: Any) -> None:
        self._call = call
        self._context = context
        self._has_written = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        if self._has_written:
            await self._context.write(message)
            return
        self._call.hold()
        await self._context.write(message)
        self._has_written = True
        if (refusal := self._call.free()) is not None:
            await _abort_aio(self._context, refusal)


async def _admit_aio(gate: _Gate, context: Any) -> AioCall:
    try:
        call = AioCall(gate.check(context), context)
        gate.begin(call)
    except IdentityError as error:
        await _abort_aio(context, error)
        raise
    return call


async def _checked_aio(
    gate: _Gate, peer: Peer, messages: AsyncIterator[Any], context: Any
) -> AsyncIterator[Any]:
    async for message in messages:
        try:
            gate.recheck(peer)
        except IdentityError as error:
            await _abort_aio(context, error)
            raise
        yield message


async def _abort_aio(context: Any, error: IdentityError) -> None:
    status = refusal_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _rebuild(handler: Any, guard: Callable[[Any], Any]) -> Any:
    kinds = (
        (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    )
    behavior, make = next(kind for kind in kinds if kind[0] is not None)
    return make(
        guard(behavior),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
