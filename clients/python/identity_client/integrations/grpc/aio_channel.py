"""A `grpc.aio.Channel` whose connection follows rotation.

- Multi-callables and stubs made once keep working: each call asks for the newest generation.
- A call keeps its generation until it ends, however it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self

import grpc
import grpc.aio
from spiffe import SpiffeId

from identity_client.credential import IdentitySnapshot
from identity_client.integrations.grpc.channel_arguments import (
    channel_credentials,
    channel_options,
)
from identity_client.rotation import Generation, Rotation
from identity_client.tls import SnapshotSource

__all__ = ["RotatingAioChannel", "secure_channel_aio"]


def secure_channel_aio(
    source: SnapshotSource,
    target: str,
    *,
    peer: str | SpiffeId,
    options: Sequence[tuple[str, Any]] | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
) -> RotatingAioChannel:
    """A channel to the service at `target`, which must be exactly `peer`.

    Calls raise `SourceError` while there is no identity to call with, and
    `grpc.aio.AioRpcError` as ever.

    Args:
        source: whose identity to show.
        target: as for `grpc.aio.secure_channel`.
        peer: the SPIFFE ID the server must have.
        options: as for `grpc.aio.secure_channel`; the verified name is not theirs to change.
        interceptors: as for `grpc.aio.secure_channel`.

    Raises:
        SettingsInvalid: `peer` is not a SPIFFE ID, or its trust domain not a DNS name.
    """
    return RotatingAioChannel(source, target, channel_options(peer, options), interceptors)


class RotatingAioChannel(grpc.aio.Channel):
    """See `secure_channel_aio`. Belongs to one event loop."""

    def __init__(
        self,
        source: SnapshotSource,
        target: str,
        options: tuple[tuple[str, Any], ...],
        interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
    ) -> None:
        self._target = target
        self._options = options
        self._interceptors = interceptors
        self._closing: set[asyncio.Task[None]] = set()
        self._rotation: Rotation[grpc.aio.Channel] = Rotation(
            source.snapshot, self._open, self._close_later
        )

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
        await asyncio.gather(*self._closing)

    def get_state(
        self,
        try_to_connect: bool = False,  # noqa: FBT001, FBT002 - grpc's signature
    ) -> grpc.ChannelConnectivity:
        """The newest generation's state."""
        generation = self._rotation.acquire()
        try:
            return generation.connection.get_state(try_to_connect)
        finally:
            self._rotation.release(generation)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Waits on the newest generation."""
        generation = self._rotation.acquire()
        try:
            await generation.connection.wait_for_state_change(last_observed_state)
        finally:
            self._rotation.release(generation)

    async def channel_ready(self) -> None:
        """Waits until the newest generation is connected."""
        generation = self._rotation.acquire()
        try:
            await generation.connection.channel_ready()
        finally:
            self._rotation.release(generation)

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._rotation, "unary_unary", arguments, keywords)

    def unary_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._rotation, "unary_stream", arguments, keywords)

    def stream_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._rotation, "stream_unary", arguments, keywords)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """As in grpc.aio.Channel."""
        return _Callable(self._rotation, "stream_stream", arguments, keywords)

    def _open(self, snapshot: IdentitySnapshot) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            self._target,
            channel_credentials(snapshot),
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


class _Callable:
    """One method, on whichever generation a call gets."""

    def __init__(
        self,
        rotation: Rotation[grpc.aio.Channel],
        kind: str,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> None:
        self._rotation = rotation
        self._kind = kind
        self._arguments = arguments
        self._keywords = keywords
        self._made: tuple[Generation[grpc.aio.Channel] | None, Any] = (None, None)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        generation = self._rotation.acquire()
        try:
            call = self._on(generation)(*arguments, **keywords)
        except BaseException:
            self._rotation.release(generation)
            raise
        call.add_done_callback(lambda _: self._rotation.release(generation))
        return call

    def _on(self, generation: Generation[grpc.aio.Channel]) -> Any:
        made_for, method = self._made
        if made_for is not generation:
            make = getattr(generation.connection, self._kind)
            method = make(*self._arguments, **self._keywords)
            self._made = (generation, method)
        return method
