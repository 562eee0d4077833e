"""The calls a server has running, so that those of a revoked peer are ended.

- A call is ended from outside of its handler, which may be waiting for something that never comes:
  the client is told PEER_REVOKED at once, whatever the handler does next.
- grpc.aio: the call is aborted and the handler's task cancelled, as when a client goes away.
- grpc: there is no public way to end a call with a status but from its handler. What its own abort
  does is done here, and where that changes, the call is cancelled without a reason. A handler that
  reads requests is woken; one that sleeps is not, and what it returns goes nowhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc._common
import grpc._server
import grpc.aio

from identity_client._wire.status import refusal_status
from identity_client.errors import IdentityError, PeerRejected
from identity_client.peer import Peer
from identity_client.tls import SnapshotSource

__all__ = ["Ending", "RunningCalls", "aio_ending", "aio_thread_ending", "sync_ending"]

_logger = logging.getLogger(__name__)

Ending = Callable[[IdentityError], None]


class RunningCalls:
    """The calls of one server. Any thread may use it.

    Args:
        source: whose revocations to follow.
        check: raises PeerRejected for a peer whose calls must end.
    """

    def __init__(self, source: SnapshotSource, check: Callable[[Peer], None]) -> None:
        self._check = check
        self._numbers = itertools.count()
        self._running: dict[int, tuple[Peer, Ending]] = {}
        self._lock = threading.Lock()
        source.denied.watch(self)

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, peer: Peer, ending: Ending) -> int:
        """A call runs; returns what to `end` it with.

        Raises:
            PeerRejected: its peer was revoked before it was known.
        """
        number = next(self._numbers)
        with self._lock:
            self._running[number] = (peer, ending)
        try:
            self._check(peer)
        except PeerRejected:
            self.end(number)
            raise
        return number

    def end(self, number: int) -> None:
        """A call has ended."""
        with self._lock:
            self._running.pop(number, None)

    def peers_denied(self) -> None:
        """Ends the calls of whoever is revoked."""
        with self._lock:
            running = list(self._running.items())
        for number, (peer, ending) in running:
            try:
                self._check(peer)
            except PeerRejected as refusal:
                self.end(number)
                ending(refusal)


def sync_ending(context: Any) -> Ending:
    """How to end a call of a threaded server."""

    def ending(refusal: IdentityError) -> None:
        try:
            _abort_now(context, refusal)
        except Exception:  # Not ours: how grpc keeps a call is its own business.
            _logger.debug("a call could not be ended with a reason", exc_info=True)
            context.cancel()

    return ending


def _abort_now(context: Any, refusal: IdentityError) -> None:
    status: Any = refusal_status(refusal)
    state, call = context._state, context._rpc_event.call  # noqa: SLF001
    cancelled, server = grpc._server._CANCELLED, grpc._server  # noqa: SLF001
    with state.condition:
        if state.client is cancelled or state.statused:
            return
        state.code, state.details = status.code, grpc._common.encode(status.details)  # noqa: SLF001
        state.trailing_metadata = status.trailing_metadata
        state.aborted = True
        server._abort(state, call, state.code, state.details)  # noqa: SLF001
        # As when the client went away: nobody is answered, and whoever reads requests is woken.
        state.client = cancelled
        state.condition.notify_all()


def aio_ending(context: Any) -> Ending:
    """How to end a call of an asyncio server; made by its handler's task."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    async def end(refusal: IdentityError) -> None:
        status: Any = refusal_status(refusal)
        with suppress(grpc.aio.AbortError, grpc.aio.UsageError):
            await context.abort(status.code, status.details, status.trailing_metadata)
        if task is not None:
            task.cancel()

    def ending(refusal: IdentityError) -> None:
        with suppress(RuntimeError):  # The loop has ended, and the server with it.
            loop.call_soon_threadsafe(_start, loop, end, refusal)

    return ending


def aio_thread_ending(context: Any) -> Ending:
    """How to end a call of an asyncio server whose handler runs in a thread."""

    def abort(refusal: IdentityError) -> None:
        status: Any = refusal_status(refusal)
        with suppress(grpc.aio.AbortError, grpc.aio.UsageError):
            context.abort(status.code, status.details, status.trailing_metadata)

    def ending(refusal: IdentityError) -> None:
        # It waits for the server's loop, on which we may be.
        threading.Thread(
            target=abort, args=(refusal,), name="identity-end-call", daemon=True
        ).start()

    return ending


_ends: set[asyncio.Task[None]] = set()


def _start(loop: asyncio.AbstractEventLoop, end: Any, refusal: IdentityError) -> None:
    task = loop.create_task(end(refusal))
    _ends.add(task)
    task.add_done_callback(_ends.discard)
