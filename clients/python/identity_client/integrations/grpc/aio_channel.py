"""A `grpc.aio.Channel` whose connection follows rotation.

- Multi-callables and stubs made once keep working: each call asks for the newest generation.
- A call keeps its generation until it ends, however it ends.
- A call that may only be made once its server was looked at (`guard`) is handed out at once and
  begins after that: it is a call of grpc.aio's with an interceptor, of a channel that never
  connects, and the interceptor makes the call itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Self

import grpc
import grpc.aio
from spiffe import SpiffeId

from identity_client.credential import IdentitySnapshot
from identity_client.integrations.grpc.channel_arguments import (
    channel_credentials,
    channel_options,
)
from identity_client.integrations.grpc.guard import ServerGuard, ServerRevoked, Unsettled
from identity_client.rotation import Generation, Pins, Rotation
from identity_client.staleness import StalenessPolicy
from identity_client.tls import SnapshotSource

__all__ = ["RotatingAioChannel", "secure_channel_aio"]


def secure_channel_aio(
    source: SnapshotSource,
    target: str,
    *,
    peer: str | SpiffeId,
    options: Sequence[tuple[str, Any]] | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
    staleness: StalenessPolicy | None = None,
) -> RotatingAioChannel:
    """A channel to the service at `target`, which must be exactly `peer`.

    Calls raise `SourceError` while there is no identity to call with, and
    `grpc.aio.AioRpcError` as ever. When the server's certificate is revoked, or its authority,
    calls under way are cancelled, and calls raise `PeerRevoked` (a `grpc.RpcError` here) for as
    long as the server shows it. Where silence about revocations is to be refused, they raise
    `RevocationsStale` (likewise).

    Args:
        source: whose identity to show.
        target: as for `grpc.aio.secure_channel`.
        peer: the SPIFFE ID the server must have.
        options: as for `grpc.aio.secure_channel`; the verified name is not theirs to change.
        interceptors: as for `grpc.aio.secure_channel`.
        staleness: what silence about revocations means here; None for the source's policy.

    Raises:
        SettingsInvalid: `peer` is not a SPIFFE ID, or its trust domain not a DNS name.
    """
    return RotatingAioChannel(
        source, target, str(peer), channel_options(peer, options), interceptors, staleness
    )


class RotatingAioChannel(grpc.aio.Channel):
    """See `secure_channel_aio`. Belongs to one event loop."""

    def __init__(
        self,
        source: SnapshotSource,
        target: str,
        peer: str,
        options: tuple[tuple[str, Any], ...],
        interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
        staleness: StalenessPolicy | None = None,
    ) -> None:
        self._target = target
        self._options = options
        self._interceptors = interceptors
        self._closing: set[asyncio.Task[None]] = set()
        self._rotation: Rotation[grpc.aio.Channel] = Rotation(
            source.snapshot, self._open, self._close_later
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._guard = ServerGuard(source, peer, target, self._cut, staleness)
        self._server = _Server(self._rotation, self._guard, self._closing)

    def __repr__(self) -> str:
        return f"RotatingAioChannel({self._target!r})"

    @property
    def draining(self) -> int:
        """How many old connections still have calls under way."""
        return self._rotation.draining

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Closes every connection; calls under way are cancelled."""
        self._rotation.close()
        self._server.close()
        await asyncio.gather(*self._closing)

    def get_state(
        self,
        try_to_connect: bool = False,  # noqa: FBT001, FBT002 - grpc's signature
    ) -> grpc.ChannelConnectivity:
        """The newest generation's state."""
        known = self._guard.known()
        if isinstance(known, Unsettled):
            return grpc.ChannelConnectivity.IDLE
        generation = self._rotation.acquire(known)
        try:
            return generation.connection.get_state(try_to_connect)
        finally:
            self._rotation.release(generation)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Waits on the newest generation."""
        generation = await self._server.acquire()
        try:
            await generation.connection.wait_for_state_change(last_observed_state)
        finally:
            self._rotation.release(generation)

    async def channel_ready(self) -> None:
        """Waits until the newest generation is connected."""
        generation = await self._server.acquire()
        try:
            await generation.connection.channel_ready()
        finally:
            self._rotation.release(generation)

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._server, "unary_unary", arguments, keywords)

    def unary_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._server, "unary_stream", arguments, keywords)

    def stream_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._server, "stream_unary", arguments, keywords)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._server, "stream_stream", arguments, keywords)

    def _cut(
        self, doomed: Callable[[Generation[grpc.aio.Channel]], bool], why: ServerRevoked
    ) -> None:
        if self._loop is not None:  # else no call was ever made
            with suppress(RuntimeError):  # The loop has ended, and every call with it.
                self._loop.call_soon_threadsafe(self._rotation.cut, doomed, why)

    def _open(self, snapshot: IdentitySnapshot, pins: Pins | None) -> grpc.aio.Channel:
        self._loop = asyncio.get_running_loop()
        return grpc.aio.secure_channel(
            self._target,
            channel_credentials(snapshot, pins),
            self._options,
            interceptors=self._interceptors,
        )

    def _close_later(self, channel: grpc.aio.Channel) -> None:
        # Called when the last call has ended, from inside that call's own callback.
        task = asyncio.get_running_loop().create_task(_close(channel))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(channel: grpc.aio.Channel) -> None:
    await channel.close()


class _Server:
    """The server of one channel, through whichever generation a call gets."""

    def __init__(
        self,
        rotation: Rotation[grpc.aio.Channel],
        guard: ServerGuard,
        closing: set[asyncio.Task[None]],
    ) -> None:
        self.rotation = rotation
        self.guard = guard
        self._closing = closing
        self._fronts: list[grpc.aio.Channel] = []

    async def acquire(self) -> Generation[grpc.aio.Channel]:
        """The generation for one call, once it is known what the server may show."""
        known = self.guard.known()
        if isinstance(known, Unsettled):
            known = await asyncio.to_thread(self.guard.pins)
        return self.rotation.acquire(known)

    def front(self, begin: Callable[..., Awaitable[Any]]) -> grpc.aio.Channel:
        """A channel that connects to nobody: `begin` makes its calls."""
        interceptors = [kind(begin) for kind in _FRONT_KINDS]
        channel = grpc.aio.insecure_channel("ipv4:127.0.0.1:9", interceptors=interceptors)
        self._fronts.append(channel)
        return channel

    def close(self) -> None:
        """Closes what is in front."""
        for channel in self._fronts:
            task = asyncio.get_running_loop().create_task(_close(channel))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._fronts = []


class _Callable:
    """One method, on whichever generation a call gets."""

    def __init__(
        self,
        server: _Server,
        kind: str,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> None:
        self._server = server
        self._kind = kind
        self._arguments = arguments
        self._keywords = keywords
        self._made: tuple[Generation[grpc.aio.Channel] | None, Any] = (None, None)
        self._front: Any = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        known = self._server.guard.known()
        if isinstance(known, Unsettled):
            if self._front is None:
                self._front = self._of(self._server.front(self._begin))
            return self._front(*arguments, **keywords)
        return self._call(self._server.rotation.acquire(known), *arguments, **keywords)

    async def _begin(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(await self._server.acquire(), *arguments, **keywords)

    def _call(
        self, generation: Generation[grpc.aio.Channel], *arguments: Any, **keywords: Any
    ) -> Any:
        try:
            call = self._on(generation)(*arguments, **keywords)
        except BaseException:
            self._server.rotation.release(generation)
            raise
        call.add_done_callback(lambda call: self._ended(generation, call))
        return call

    def _ended(self, generation: Generation[grpc.aio.Channel], call: Any) -> None:
        self._server.rotation.release(generation)
        if generation.pins is None or call.cancelled():
            return
        # Asked of the call's own task: an intercepted call knows its code only there.
        task = asyncio.get_running_loop().create_task(self._doubt(generation, call))
        _doubts.add(task)
        task.add_done_callback(_doubts.discard)

    async def _doubt(self, generation: Generation[grpc.aio.Channel], call: Any) -> None:
        if await call.code() is grpc.StatusCode.UNAVAILABLE:
            self._server.guard.doubt(generation)

    def _on(self, generation: Generation[grpc.aio.Channel]) -> Any:
        made_for, method = self._made
        if made_for is not generation:
            method = self._of(generation.connection)
            self._made = (generation, method)
        return method

    def _of(self, channel: grpc.aio.Channel) -> Any:
        return getattr(channel, self._kind)(*self._arguments, **self._keywords)


_doubts: set[asyncio.Task[None]] = set()


class _Front:
    """Makes a call by other means than the channel it was asked of."""

    def __init__(self, begin: Callable[..., Awaitable[Any]]) -> None:
        self._begin = begin

    async def _make(self, _: Any, details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        return await self._begin(
            request,
            timeout=details.timeout,
            metadata=details.metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )


class _FrontUnaryUnary(_Front, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary: Any = _Front._make


class _FrontUnaryStream(_Front, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream: Any = _Front._make


class _FrontStreamUnary(_Front, grpc.aio.StreamUnaryClientInterceptor):
    intercept_stream_unary: Any = _Front._make


class _FrontStreamStream(_Front, grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream: Any = _Front._make


_FRONT_KINDS = (_FrontUnaryUnary, _FrontUnaryStream, _FrontStreamUnary, _FrontStreamStream)
