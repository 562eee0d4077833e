"""A `grpc.Channel` whose connection follows rotation.

- Multi-callables and stubs made once keep working: each call asks for the newest generation.
- A call keeps its generation until it ends, however it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import grpc
from spiffe import SpiffeId

from identity_client.credential import IdentitySnapshot
from identity_client.integrations.grpc.channel_arguments import (
    channel_credentials,
    channel_options,
)
from identity_client.integrations.grpc.guard import ServerGuard, ServerRevoked
from identity_client.rotation import Generation, Pins, Rotation
from identity_client.staleness import StalenessPolicy
from identity_client.tls import SnapshotSource

__all__ = ["RotatingChannel", "secure_channel"]

_LAST_POLL_SECONDS = 0.5


def secure_channel(
    source: SnapshotSource,
    target: str,
    *,
    peer: str | SpiffeId,
    options: Sequence[tuple[str, Any]] | None = None,
    staleness: StalenessPolicy | None = None,
) -> RotatingChannel:
    """A channel to the service at `target`, which must be exactly `peer`.

    Calls raise `SourceError` while there is no identity to call with, and `grpc.RpcError` as ever.
    When the server's certificate is revoked, or its authority, calls under way are cancelled, and
    calls raise `PeerRevoked` (a `grpc.RpcError` here) for as long as the server shows it. Where
    silence about revocations is to be refused, they raise `RevocationsStale` (likewise).

    Args:
        source: whose identity to show.
        target: as for `grpc.secure_channel`.
        peer: the SPIFFE ID the server must have.
        options: as for `grpc.secure_channel`; the verified name is not theirs to change.
        staleness: what silence about revocations means here; None for the source's policy.

    Raises:
        SettingsInvalid: `peer` is not a SPIFFE ID, or its trust domain not a DNS name.
    """
    return RotatingChannel(source, target, str(peer), channel_options(peer, options), staleness)


class RotatingChannel(grpc.Channel):
    """See `secure_channel`."""

    def __init__(
        self,
        source: SnapshotSource,
        target: str,
        peer: str,
        options: tuple[tuple[str, Any], ...],
        staleness: StalenessPolicy | None = None,
    ) -> None:
        self._target = target
        self._options = options
        self._watchers: dict[Callable[..., None], bool] = {}
        self._watched = False
        self._rotation: Rotation[grpc.Channel] = Rotation(source.snapshot, self._open, self._close)
        self._guard = ServerGuard(source, peer, target, self._cut, staleness)

    def __repr__(self) -> str:
        return f"RotatingChannel({self._target!r})"

    @property
    def draining(self) -> int:
        """How many old connections still have calls under way."""
        return self._rotation.draining

    def subscribe(
        self,
        callback: Callable[[grpc.ChannelConnectivity], None],
        try_to_connect: bool | None = False,  # noqa: FBT001, FBT002 - grpc's signature
    ) -> None:
        """Tells `callback` of connectivity changes, of later generations too."""
        generation = self._rotation.acquire(self._guard.pins())
        try:
            self._watchers[callback], self._watched = bool(try_to_connect), True
            generation.connection.subscribe(callback, bool(try_to_connect))
        finally:
            self._rotation.release(generation)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """Ends a subscription."""
        if self._watchers.pop(callback, None) is None:
            return
        generation = self._rotation.acquire(self._guard.pins())
        try:
            generation.connection.unsubscribe(callback)
        finally:
            self._rotation.release(generation)

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.Channel."""
        return _BlockingCallable(self._rotation, self._guard, "unary_unary", arguments, keywords)

    def unary_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.Channel."""
        return _StreamCallable(self._rotation, self._guard, "unary_stream", arguments, keywords)

    def stream_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.Channel."""
        return _BlockingCallable(self._rotation, self._guard, "stream_unary", arguments, keywords)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.Channel."""
        return _StreamCallable(self._rotation, self._guard, "stream_stream", arguments, keywords)

    def close(self) -> None:
        """Closes every connection, calls under way included."""
        self._rotation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        self.close()

    def _cut(self, doomed: Callable[[Generation[grpc.Channel]], bool], why: ServerRevoked) -> None:
        if not self._rotation.has(doomed):
            return
        # Closing waits for the calls' own threads; the source's must not.
        threading.Thread(
            target=self._rotation.cut, args=(doomed, why), name="identity-cut", daemon=True
        ).start()

    def _open(self, snapshot: IdentitySnapshot, pins: Pins | None) -> grpc.Channel:
        credentials = channel_credentials(snapshot, pins)
        channel = grpc.secure_channel(self._target, credentials, self._options)
        for callback, try_to_connect in self._watchers.items():
            channel.subscribe(callback, try_to_connect)
        return channel

    def _close(self, channel: grpc.Channel) -> None:
        if not self._watched:
            channel.close()
            return
        # grpcio polls a watched channel's state every 0.2 s, and a poll that meets a closed
        # channel dies with a traceback: let the last one end first.
        for callback in tuple(self._watchers):
            channel.unsubscribe(callback)
        closing = threading.Timer(_LAST_POLL_SECONDS, channel.close)
        closing.daemon = True
        closing.start()


class _Callable:
    """One method, on whichever generation a call gets."""

    def __init__(
        self,
        rotation: Rotation[grpc.Channel],
        guard: ServerGuard,
        kind: str,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> None:
        self._rotation = rotation
        self._guard = guard
        self._kind = kind
        self._arguments = arguments
        self._keywords = keywords
        self._made: tuple[Generation[grpc.Channel] | None, Any] = (None, None)

    def _on(self, generation: Generation[grpc.Channel]) -> Any:
        made_for, method = self._made
        if made_for is not generation:
            make = getattr(generation.connection, self._kind)
            method = make(*self._arguments, **self._keywords)
            self._made = (generation, method)
        return method

    def _start(self, begin: Callable[[Any], Any]) -> Any:
        """Begins a call that ends later, and gives its generation back then."""
        generation = self._rotation.acquire(self._guard.pins())
        try:
            with self._explained(generation):
                call = begin(self._on(generation))
        except BaseException:
            self._rotation.release(generation)
            raise

        def ended() -> None:
            self._rotation.release(generation)
            if generation.pins is not None and call.code() is grpc.StatusCode.UNAVAILABLE:
                self._guard.doubt(generation)

        if not call.add_callback(ended):
            ended()  # It has ended already.
        return call

    @contextmanager
    def _explained(self, generation: Generation[grpc.Channel]) -> Iterator[None]:
        """Says why, where a call is ended because its server is revoked."""
        try:
            yield
        except (grpc.RpcError, ValueError) as exc:
            # ValueError: the channel was closed before the call had begun.
            if generation.cut_because is not None:
                raise ServerRevoked.because(generation.cut_because) from exc
            if isinstance(exc, grpc.Call) and exc.code() is grpc.StatusCode.UNAVAILABLE:
                self._guard.doubt(generation)
            raise


class _BlockingCallable(_Callable):
    """unary_unary and stream_unary."""

    def __call__(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        generation = self._rotation.acquire(self._guard.pins())
        try:
            with self._explained(generation):
                return self._on(generation)(request, *arguments, **keywords)
        finally:
            self._rotation.release(generation)

    def with_call(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        generation = self._rotation.acquire(self._guard.pins())
        try:
            with self._explained(generation):
                return self._on(generation).with_call(request, *arguments, **keywords)
        finally:
            self._rotation.release(generation)

    def future(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._start(lambda method: method.future(request, *arguments, **keywords))


class _StreamCallable(_Callable):
    """unary_stream and stream_stream."""

    def __call__(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._start(lambda method: method(request, *arguments, **keywords))
