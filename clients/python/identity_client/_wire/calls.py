"""How calls over gRPC end: every one in a value or an IdentityError, whoever ended it.

- grpc.aio says CancelledError when its channel was closed and when a server says CANCELLED: only
  when our own task is being cancelled does it leave as that.
- A message whose octets cannot be read is a ProtocolViolation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar, cast

import grpc
import grpc.aio

from identity_client._wire.status import error_from_rpc
from identity_client.errors import (
    BrokerFailed,
    BrokerUnavailable,
    IdentityError,
    ProtocolViolation,
)

__all__ = [
    "REPLACED",
    "STREAM_CUT",
    "Duplex",
    "calling",
    "readable",
    "streaming",
    "write",
]

REPLACED: Final = "CONNECTION_REPLACED"
STREAM_CUT: Final = "STREAM_CUT"
_T = TypeVar("_T")
Translate = Callable[[grpc.RpcError], IdentityError]


class Duplex:
    """One call that streams both ways. Belongs to one event loop.

    Args:
        call: grpc.aio's.
        timeout: seconds one message of ours may take to be sent.
        translate: what a failure of the call means.
    """

    def __init__(self, call: Any, timeout: float, translate: Translate = error_from_rpc) -> None:
        self._call = call
        self._timeout = timeout
        self._translate = translate
        self._writing = asyncio.Lock()  # gRPC takes one message at a time.

    async def begin(self, request: object) -> None:
        """Sends the first message; why it could not be sent, the next read says."""
        writing = asyncio.ensure_future(write(self._call, request))
        # A write to a call that ends before it has begun waits for ever.
        self._call.add_done_callback(lambda _: writing.cancel())
        try:
            await asyncio.wait({writing})
        finally:
            writing.cancel()
        if not writing.cancelled():
            writing.exception()  # Seen.

    async def next_message(self, within: float) -> Any:
        """The other side's next message.

        Args:
            within: seconds after which the stream counts as broken.

        Raises:
            IdentityError: the stream has ended.
        """
        try:
            async with asyncio.timeout(within):
                message = await calling(self._call.read(), self._translate)
        except BrokerFailed as exc:
            if exc.correlation_id:
                raise
            # Not the broker's word: gRPC says so when an acknowledgement meets the end of the
            # call, and the broker's reason is lost. It will give it again.
            raise BrokerUnavailable("the stream was cut off", reason=STREAM_CUT) from exc
        except TimeoutError as exc:
            raise BrokerUnavailable(
                f"nothing was heard from the broker for {within:g} s", reason="STREAM_SILENT"
            ) from exc
        if message is grpc.aio.EOF:
            raise BrokerUnavailable("the broker ended the stream", reason="STREAM_ENDED")
        return message

    async def send(self, request: object) -> None:
        """Sends a later message; on a stream that has ended, does nothing."""
        try:
            async with asyncio.timeout(self._timeout), self._writing:
                await calling(_written(self._call, request), self._translate)
        except (TimeoutError, IdentityError):
            # Whoever reads the stream learns of it there; a broker that takes nothing for so
            # long would let go of us anyway.
            self.cancel()

    def cancel(self) -> None:
        """Ends the call."""
        self._call.cancel()


async def _written(call: Any, request: object) -> bool:
    await write(call, request)
    return True


async def write(call: Any, request: object) -> None:
    """Sends a message; where the call has ended, the next read says why."""
    with suppress(asyncio.InvalidStateError):
        await call.write(request)


async def readable(call: Any) -> AsyncIterator[Any]:
    """The messages of a call, as long as they can be read."""
    async for response in call:
        yield _read(response)


def _read(response: Any) -> Any:
    if response is None:  # grpc's way to say that the octets are no such message
        raise ProtocolViolation("the broker sent a message that cannot be read")
    return response


async def calling(call: Awaitable[_T], translate: Translate = error_from_rpc) -> _T:
    """The answer to one call; raises IdentityError."""
    try:
        return cast("_T", _read(await call))
    except grpc.RpcError as exc:
        raise translate(exc) from exc
    except asyncio.CancelledError as exc:
        _reraise_if_ours(exc)
        raise _replaced() from exc


@asynccontextmanager
async def streaming(call: Any) -> AsyncIterator[None]:
    """For as long as a stream is read; ends it on the way out. Raises IdentityError."""
    try:
        yield
    except grpc.RpcError as exc:
        raise error_from_rpc(exc) from exc
    except asyncio.CancelledError as exc:
        _reraise_if_ours(exc)
        raise _replaced() from exc
    finally:
        call.cancel()


def _reraise_if_ours(exc: asyncio.CancelledError) -> None:
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise exc


def _replaced() -> BrokerUnavailable:
    return BrokerUnavailable("the connection to the broker was replaced", reason=REPLACED)
