"""The process at the other end of a Unix socket, as the kernel saw it when it connected.

- SO_PEERCRED and SO_PEERGROUPS are fixed at connect(2): a later exec, setuid or setgroups of the
  peer does not change them.
- A pid alone can be reused; where the kernel offers SO_PEERPIDFD (Linux 6.5), the pidfd taken
  with it says whether that very process is still alive.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from identity_broker.domain.caller import LocalPeer
from identity_broker.telemetry.logs import get_logger

_log = get_logger("localpeer")
_UCRED: Final = struct.Struct("iII")
_GID: Final = struct.Struct("I")
_SO_PEERGROUPS: Final = 59
_MOST_GROUP_BYTES: Final = 1024  # the most Python asks the kernel for: 256 groups
_NO_GROUPS: Final = frozenset({errno.ENOPROTOOPT, errno.ENODATA, errno.EINVAL})
_SO_PEERPIDFD: Final = 77
_NOBODY_LEFT: Final = frozenset({errno.ENODATA, errno.EINVAL, errno.ESRCH})


@dataclass(frozen=True, slots=True)
class ConnectedProcess:
    """A peer and, where the kernel gives one, its pidfd (owned: `close` it).

    `had_ended`: the kernel gave none because the process is gone; its pid may be another's.
    """

    peer: LocalPeer
    pidfd: int | None
    had_ended: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs; True where the kernel gives no pidfd."""
        if self.pidfd is None:
            return not self.had_ended
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Nothing: `is_alive` is asked at every call instead."""

    def close(self) -> None:
        """Give the pidfd back. Once."""
        if self.pidfd is not None:
            os.close(self.pidfd)


def process_of(connection: socket.socket) -> ConnectedProcess:
    """Who connected.

    A process with more than 256 supplementary groups is known by its own group alone.

    Raises:
        OSError: the connection is gone.
    """
    who = peer_of(connection)
    peer = LocalPeer(who.pid, who.uid, who.gid, _groups_of(connection))
    try:
        return ConnectedProcess(peer, _pidfd_of(connection))
    except ProcessLookupError:
        return ConnectedProcess(peer, None, had_ended=True)


def peer_of(connection: socket.socket) -> LocalPeer:
    """Who connected, without the supplementary groups.

    Raises:
        OSError: the connection is gone.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return LocalPeer(*_UCRED.unpack(raw))


def _groups_of(connection: socket.socket) -> frozenset[int]:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUP_BYTES)
    except OSError as exc:
        if exc.errno == errno.ERANGE:
            _log.warning("local peer has too many groups", count=_MOST_GROUP_BYTES // _GID.size)
            return frozenset()
        if exc.errno in _NO_GROUPS:
            return frozenset()
        raise
    return frozenset(gid for (gid,) in _GID.iter_unpack(raw))


def _pidfd_of(connection: socket.socket) -> int | None:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as exc:
        if exc.errno == errno.ENOPROTOOPT:  # before Linux 6.5
            return None
        if exc.errno in _NOBODY_LEFT:  # until Linux 6.16, once it was waited for
            raise ProcessLookupError(errno.ESRCH, "the peer has ended") from exc
        raise
