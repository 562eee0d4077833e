"""What one stranger may take of an HTTP listener: connections, time and memory.

- A connection is closed when it has not sent a whole request head, or a whole body, in time, and
  when its reader takes nothing of what was written for it.
- One network has a bounded number of connections; its own oldest idle one makes room for another,
  else the new one is closed. All together are bounded in the same way.
- Idle is a connection that owes us a request; the time an application takes is not limited here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from identity_broker.telemetry.logs import get_logger

_log = get_logger("listener")
_QUIET_SECONDS: Final = 60.0
_AT_ONCE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: what was not read is forgotten, instead of offered by the kernel for minutes."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of a listener.

    Attributes:
        head_seconds: for a request's head, from the connection or the head's first octet on.
        body_seconds: for its body, from the end of the head on.
        stall_seconds: how long a reader may take nothing of what waits for it.
        of_one_network: most connections of one IPv4 address, or one /64 of IPv6.
        together: most connections.
    """

    head_seconds: float = 5.0
    body_seconds: float = 15.0
    stall_seconds: float = 30.0
    of_one_network: int = 64
    together: int = 1024


class Connections:
    """The connections of one listener."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        # By age, each: a dict for its order.
        self._all: dict[GuardedConnection, None] = {}
        self._of: dict[str, dict[GuardedConnection, None]] = {}
        self._every = min(limits.head_seconds, limits.body_seconds, limits.stall_seconds) / 10
        self._looking: asyncio.TimerHandle | None = None
        self._said_at = -_QUIET_SECONDS

    def __len__(self) -> int:
        return len(self._all)

    def protocol(self) -> type[GuardedConnection]:
        """The class for uvicorn to make connections of."""
        connections = self

        class Guarded(GuardedConnection):
            crowd = connections

        return Guarded

    def admit(self, new: GuardedConnection) -> bool:
        """Count a connection that was made; False when there is no place for it."""
        siblings = self._of.get(new.network, {})
        if len(siblings) >= self._limits.of_one_network and not self._drop_idle(siblings):
            self._say("too many connections of one network", new.network)
            return False
        if len(self._all) >= self._limits.together and not self._drop_idle(self._all):
            self._say("too many connections", new.network)
            return False
        self._all[new] = None
        self._of.setdefault(new.network, {})[new] = None
        if self._looking is None:
            self._look_later()
        return True

    def forget(self, gone: GuardedConnection) -> None:
        """Give its place to others; without effect when it has none."""
        self._all.pop(gone, None)
        siblings = self._of.get(gone.network)
        if siblings is not None:
            siblings.pop(gone, None)
            if not siblings:
                del self._of[gone.network]

    def _drop_idle(self, some: Iterable[GuardedConnection]) -> bool:
        oldest = next((one for one in some if one.is_idle), None)
        if oldest is None:
            return False
        oldest.drop()
        return True

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(self._every, self._look)

    def _look(self) -> None:
        self._looking = None
        now = time.monotonic()
        for one in tuple(self._all):
            if one.is_late(self._limits, now):
                one.drop()
        if self._all:
            self._look_later()

    def _say(self, why: str, network: str) -> None:
        now = time.monotonic()
        if now - self._said_at >= _QUIET_SECONDS:
            self._said_at = now
            _log.warning("connection refused", detail=why, peer=network, count=len(self._all))


class GuardedConnection(H11Protocol):
    """A connection that has to get on with it.

    Attributes:
        crowd: the connections it is one of.
        network: whose it is.
    """

    crowd: Connections
    network: str = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._body_of: RequestResponseCycle | None = None
        self._taken_at = 0.0
        self._waiting_octets = 0

    # --- what uvicorn is told -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, or close."""
        super().connection_made(transport)
        self.network = network_of(self.client)
        self._head_since = self._taken_at = time.monotonic()
        if not self.crowd.admit(self):
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the place."""
        self.crowd.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Note what is still owed to us."""
        super().data_received(data)
        now = time.monotonic()
        owing = self.conn.their_state
        if owing is not h11.IDLE:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = now
        if owing is not h11.SEND_BODY:
            self._body_since = self._body_of = None
        elif self._body_of is not self.cycle:
            self._body_since, self._body_of = now, self.cycle

    def resume_writing(self) -> None:
        """The reader has taken most of what waited for it."""
        self._taken_at = time.monotonic()
        super().resume_writing()

    # --- what is asked ------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it only owes us a request."""
        return self.conn.their_state is h11.IDLE and not self.transport.get_write_buffer_size()

    def is_late(self, limits: ConnectionLimits, now: float) -> bool:
        """Whether its time is up; `now` is of the monotonic clock. To be asked again and again."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting or waiting < self._waiting_octets:
            self._taken_at = now
        self._waiting_octets = waiting
        return (
            now - self._taken_at >= limits.stall_seconds
            or _is_over(self._head_since, limits.head_seconds, now)
            or _is_over(self._body_since, limits.body_seconds, now)
        )

    def drop(self) -> None:
        """End it now, and free its place."""
        self.crowd.forget(self)
        self._end()

    def _end(self) -> None:
        if self.transport.get_write_buffer_size():
            peer: socket.socket | None = self.transport.get_extra_info("socket")
            if peer is not None:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.connections.discard(self)
        self.transport.abort()


def _is_over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds


def network_of(peer: tuple[str, int] | None) -> str:
    """The IPv4 address; of IPv6 the /64, since one host owns all of it."""
    if peer is None:
        return ""
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:
        return peer[0]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))
