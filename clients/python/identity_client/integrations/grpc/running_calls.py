"""The calls a server has running, so that those of a revoked peer are ended.

- A call is ended from outside of its handler, which may be waiting for something that never comes:
  the client is told PEER_REVOKED at once, whatever the handler does next.
- grpc.aio: the call is aborted and the handler's task cancelled, as when a client goes away. An
  abort must not meet the first message of an answer on its way, nor the answer itself: grpc.aio
  would send the headers twice, fail, and leave the client without an end. Such a call is ended
  right after that message (`held`).
- grpc: there is no public way to end a call with a status but from its handler. What its own abort
  does is done here, and where that changes, the call is cancelled without a reason. A handler that
  reads requests is woken; one that sleeps is not, and what it returns goes nowhere.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import grpc
import grpc._common
import grpc._server
import grpc.aio

from identity_client._wire.status import refusal_status
from identity_client.errors import IdentityError, PeerRejected
from identity_client.peer import Peer
from identity_client.tls import SnapshotSource

__all__ = ["AioCall", "AioThreadCall", "RunningCall", "RunningCalls", "SyncCall"]

_logger = logging.getLogger(__name__)

# A client that does not read may keep its refusal from being sent, but not its handler running.
_PATIENCE_SECONDS: Final = 1.0


class RunningCall:
    """One call. Its handler and whoever ends it may be of different threads.

    Attributes:
        peer: who calls.
        refusal: why it is ended, or to be ended; None for most.
    """

    def __init__(self, peer: Peer, context: Any) -> None:
        self.peer = peer
        self.refusal: IdentityError | None = None
        self._context = context
        self._lock = threading.Lock()
        self._held = False
        self._over = False

    def hold(self) -> bool:
        """Its first message is on its way until `free`; False where the call is being ended."""
        with self._lock:
            self._held = not self._over
            return self._held

    def free(self) -> IdentityError | None:
        """Its first message is sent; returns why the call is to be ended now, if it is."""
        with self._lock:
            self._held = False
            return self.refusal

    def finish(self) -> None:
        """Its handler is done: nobody ends it any more."""
        with self._lock:
            self._over = True

    def end(self, refusal: IdentityError) -> None:
        """Ends it, soon; does not block."""
        raise NotImplementedError

    def _may_end(self, refusal: IdentityError) -> bool:
        with self._lock:
            if self._over or self.refusal is not None:
                return False
            self.refusal = refusal
            self._over = not self._held
            return self._over


class RunningCalls:
    """The calls of one server. Any thread may use it.

    Args:
        source: whose revocations to follow.
        check: raises PeerRejected for a peer whose calls must end.
    """

    def __init__(self, source: SnapshotSource, check: Callable[[Peer], None]) -> None:
        self._check = check
        self._running: set[RunningCall] = set()
        self._lock = threading.Lock()
        source.denied.watch(self)

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, call: RunningCall) -> None:
        """A call runs.

        Raises:
            PeerRejected: its peer was revoked before it was known.
        """
        with self._lock:
            self._running.add(call)
        try:
            self._check(call.peer)
        except PeerRejected:
            self.end(call)
            raise

    def end(self, call: RunningCall) -> None:
        """A call's handler is done."""
        call.finish()
        with self._lock:
            self._running.discard(call)

    def peers_denied(self) -> None:
        """Ends the calls of whoever is revoked."""
        with self._lock:
            running = list(self._running)
        for call in running:
            try:
                self._check(call.peer)
            except PeerRejected as refusal:
                call.end(refusal)


class SyncCall(RunningCall):
    """A call of a threaded server."""

    def hold(self) -> bool:
        """Nothing is to be held back: what this server sends is counted when it begins."""
        return True

    def end(self, refusal: IdentityError) -> None:
        if not self._may_end(refusal):
            return
        try:
            _abort_now(self._context, refusal)
        except Exception:  # Not ours: how grpc keeps a call is its own business.
            _logger.debug("a call could not be ended with a reason", exc_info=True)
            self._context.cancel()


def _abort_now(context: Any, refusal: IdentityError) -> None:
    status: Any = refusal_status(refusal)
    state, call = context._state, context._rpc_event.call  # noqa: SLF001
    server, cancelled = grpc._server, grpc._server._CANCELLED  # noqa: SLF001
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


class AioCall(RunningCall):
    """A call of an asyncio server; made by its handler's task."""

    def __init__(self, peer: Peer, context: Any) -> None:
        super().__init__(peer, context)
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()

    def end(self, refusal: IdentityError) -> None:
        with suppress(RuntimeError):  # The loop has ended, and the server with it.
            self._loop.call_soon_threadsafe(self._start, refusal)

    def _start(self, refusal: IdentityError) -> None:
        task = self._loop.create_task(self._abort(refusal))
        _ends.add(task)
        task.add_done_callback(_ends.discard)

    async def _abort(self, refusal: IdentityError) -> None:
        # From here into the abort there is no await: the handler cannot answer in between.
        if not self._may_end(refusal):
            return
        status: Any = refusal_status(refusal)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await self._context.abort(status.code, status.details, status.trailing_metadata)
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            pass  # It says so whenever it did what it was told.
        finally:
            if self._task is not None:
                self._task.cancel()


_ends: set[asyncio.Task[None]] = set()


class AioThreadCall(RunningCall):
    """A call of an asyncio server whose handler runs in a thread."""

    def end(self, refusal: IdentityError) -> None:
        if self._may_end(refusal):
            # It waits for the server's loop, on which we may be.
            threading.Thread(
                target=self._abort, args=(refusal,), name="identity-end-call", daemon=True
            ).start()

    def _abort(self, refusal: IdentityError) -> None:
        status: Any = refusal_status(refusal)
        with suppress(grpc.aio.AbortError, grpc.aio.BaseError):
            self._context.abort(status.code, status.details, status.trailing_metadata)
