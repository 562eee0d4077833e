"""The connections that TLS contexts of ours have open, so that those of a revoked peer are closed.

- Connections are held weakly: whoever dropped one has closed it.
- A socket is shut down and not closed: its descriptor belongs to whoever reads it, and a number
  that is free may be somebody else's the next moment. A read or write that blocks ends at once,
  and raises PEER_REVOKED, because the peer is checked after every one.
- asyncio (and uvloop) keep an `SSLObject` in a protocol and tell it nothing of the transport. The
  collector knows which protocol that is; it is asked on the connection's own loop and only when
  somebody was revoked. The protocol is told that octets came (`buffer_updated`, part of asyncio's
  public interface), reads, is refused, and ends the connection with that error; where reading is
  paused, the transport is aborted.
- An `SSLObject` that no such protocol holds (trio, anyio) is refused at its next read or write.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from identity_client.peer import Peer

__all__ = ["OpenConnections"]

_logger = logging.getLogger(__name__)


class OpenConnections:
    """The established connections of one context. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakKeyDictionary[ssl.SSLSocket, Peer] = weakref.WeakKeyDictionary()
        self._objects: weakref.WeakKeyDictionary[
            ssl.SSLObject, tuple[Peer, asyncio.AbstractEventLoop]
        ] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._sockets) + len(self._objects)

    def add_socket(self, connection: ssl.SSLSocket, peer: Peer) -> None:
        """A handshake of a socket is over."""
        with self._lock:
            self._sockets[connection] = peer

    def add_object(self, connection: ssl.SSLObject, peer: Peer) -> None:
        """A handshake over memory is over; on the loop that does it, if one does."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        with self._lock:
            self._objects[connection] = (peer, loop)

    def close_those(self, refused: Callable[[Peer], bool]) -> None:
        """Ends the connections whose peer is refused; does not block."""
        with self._lock:
            sockets = [one for one, peer in self._sockets.items() if refused(peer)]
            by_loop: dict[asyncio.AbstractEventLoop, list[ssl.SSLObject]] = {}
            for one, (peer, loop) in self._objects.items():
                if refused(peer):
                    by_loop.setdefault(loop, []).append(one)
        for each in sockets:
            _shut_down(each)
        for loop, objects in by_loop.items():
            with suppress(RuntimeError):  # The loop has ended, and its connections with it.
                loop.call_soon_threadsafe(_cut_off, weakref.WeakSet(objects))


def _shut_down(connection: ssl.SSLSocket) -> None:
    with suppress(OSError):  # It is closed already.
        # Not SSLSocket's own: that one drops the TLS state below a thread that reads.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _cut_off(connections: Iterable[ssl.SSLObject]) -> None:
    doomed = list(connections)
    for protocol in _protocols_of(doomed):
        try:
            protocol.buffer_updated(0)
            transport = getattr(protocol, "_transport", None)
            if transport is not None and not transport.is_closing():
                transport.abort()
        except Exception:  # A foreign protocol; the next read or write is refused all the same.
            _logger.exception("the connection of a revoked peer could not be closed")


def _protocols_of(connections: list[ssl.SSLObject]) -> list[Any]:
    holders = gc.get_referrers(*connections)
    # An attribute may be held by the protocol itself or by its dictionary.
    tables = [one for one in holders if type(one) is dict]
    if tables:
        holders += gc.get_referrers(*tables)
    found = {id(one): one for one in holders if _is_protocol(one)}
    return list(found.values())


def _is_protocol(candidate: Any) -> bool:
    kind = type(candidate)
    return hasattr(kind, "buffer_updated") and hasattr(kind, "get_buffer")
