"""Passes the bytes of a Unix connection to an inner server that can then tell who connected.

    peer ──▶ outer socket (we accept; the kernel says who) ──splice──▶ inner socket (the server)

- Our end of the inner connection is bound to a random abstract name first. The server sees
  that name as its peer; `Splice.of` looks the process up by it while the connection lives.
- The inner socket lies in a directory of mode 0700: nobody else can reach the server.
- Either side's end of file is passed on (half-close); either side's loss ends both.
- A slow reader pauses its writer: no more than a transport's buffer is held for anyone.
- Connections are bounded, all together and for each user. One too many is closed at once, or takes
  the place of one of whoever holds most (`Admission`).
- Every byte must come from the process that connected: the kernel says so of each chunk
  (SO_PASSCRED). Bytes of anyone else, who inherited or was passed the descriptor, end the
  connection before they reach the server.
- With `presence`, what was sent before the process was looked at waits until it has sent something
  after. A process that sends its request and becomes another program is thus never heard as that
  program. Needs a protocol in which the server may speak first and the peer must answer: HTTP/2.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import secrets
import socket
import struct
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, cast

from identity_broker.domain.caller import LocalPeer
from identity_broker.errors import BrokerError, Unauthenticated
from identity_broker.localpeer.admission import Admission
from identity_broker.localpeer.credentials import peer_of, process_of
from identity_broker.localpeer.endpoint import Endpoint
from identity_broker.localpeer.subuids import SubordinateUids
from identity_broker.telemetry.logs import get_logger

_log = get_logger("localpeer")
_PEER_PREFIX: Final = "unix-abstract:"
_CONNECT_ATTEMPTS: Final = 200
_CONNECT_PAUSE: Final = 0.005
_LINGER: Final = 5.0
DEFAULT_CONNECTIONS: Final = 512
_ACCEPTS_AT_A_TIME: Final = 16
_LOG_PAUSE: Final = 1.0
_UCRED: Final = struct.Struct("iII")
_ONE_UCRED: Final = socket.CMSG_SPACE(_UCRED.size)  # and so no room for descriptors
_SCM_CREDENTIALS: Final = 2


class Peer(Protocol):
    """What a splice needs of the process it was told about: `ConnectedProcess`, `LiveProcess`."""

    @property
    def peer(self) -> LocalPeer: ...

    @property
    def is_alive(self) -> bool: ...

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call back once when the process ends, unless closed before."""
        ...

    def close(self) -> None: ...


class Splice:
    """Accepts on an endpoint and splices every connection to the inner server.

    Args:
        endpoint: where peers connect; owned from now on.
        inner: path of the socket the inner server listens on.
        limit: most connections at a time. Root and this process's own user get in all the same,
            in the place of another.
        limit_per_uid: most of one uid; None: as many as `limit`.
        identify: looks at a process that has connected. A BrokerError refuses it, which it is told
            by whatever it calls.
        presence: see above.
        on_count: told how many connections there are, whenever that changes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        inner: Path,
        *,
        limit: int = DEFAULT_CONNECTIONS,
        limit_per_uid: int | None = None,
        identify: Callable[[socket.socket], Peer] = process_of,
        presence: bool = False,
        on_count: Callable[[int], object] = lambda _count: None,
    ) -> None:
        self._endpoint = endpoint
        self._inner = inner
        self._admission = Admission(
            limit,
            limit if limit_per_uid is None else limit_per_uid,
            user_of=SubordinateUids().user_of,
            favoured=frozenset({0, os.geteuid()}),
        )
        self._identify = identify
        self._presence = presence
        self._on_count = on_count
        self._processes: dict[str, Peer | BrokerError] = {}
        self._halves: dict[str, tuple[_Half, _Half]] = {}
        self._turned_away = 0
        self._logged_at = float("-inf")
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = asyncio.create_task(self._accept(), name="localpeer accept")

    def of(self, peer: str) -> LocalPeer:
        """Who is behind the inner server's peer name.

        Raises:
            Unauthenticated: no live connection has that name, or its process has ended.
            BrokerError: what `identify` raised.
        """
        return self.process(peer).peer

    def process(self, peer: str) -> Peer:
        """What `identify` made of the process behind the inner server's peer name.

        Raises:
            Unauthenticated, BrokerError: as `of`.
        """
        process = self._processes.get(peer.removeprefix(_PEER_PREFIX))
        if process is None or not peer.startswith(_PEER_PREFIX):
            raise Unauthenticated(
                "the process behind this connection is not known", detail=f"peer {peer}"
            )
        if isinstance(process, BrokerError):
            # A new one each time: a traceback that is raised again grows.
            raise type(process)(process.public, detail=process.detail, hint=process.hint)
        if not process.is_alive:
            raise Unauthenticated(
                "the process that opened this connection has ended", detail=f"peer {peer}"
            )
        return process

    def drop(self, peer: str) -> None:
        """End the connection with that peer name at once, if it is still there."""
        for half in self._halves.get(peer.removeprefix(_PEER_PREFIX), ()):
            half.abort()

    @property
    def count(self) -> int:
        """Connections now."""
        return len(self._processes)

    def stop_accepting(self) -> None:
        """Take no new connections; the socket file goes. Those open stay."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
        self._endpoint.close()

    async def close(self) -> None:
        """End every connection. Twice is harmless."""
        self.stop_accepting()
        joining = list(self._joining.values())
        for task in joining:
            task.cancel()
        await asyncio.gather(*joining, return_exceptions=True)
        for pair in list(self._halves.values()):
            for half in pair:
                half.abort()
        await asyncio.sleep(0)  # The transports tell their ends, and the names are forgotten.

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        accepted = 0
        while True:
            try:
                connection, _ = await loop.sock_accept(self._endpoint.listening)
            except OSError as exc:
                # Out of descriptors, most likely: the connections we hold must go on.
                _log.error("local accept failed", error=str(exc))
                await asyncio.sleep(0.1)
                continue
            self._admit(connection)
            accepted += 1
            if accepted % _ACCEPTS_AT_A_TIME == 0:
                await asyncio.sleep(0)  # While somebody waits, sock_accept never lets others run.

    def _admit(self, connection: socket.socket) -> None:
        try:
            uid = peer_of(connection).uid
        except OSError as exc:
            _log.warning("local connection failed", error=str(exc))
            connection.close()
            return
        name = f"idb-{secrets.token_hex(16)}"
        verdict = self._admission.admit(name, uid)
        if verdict.dropped is not None:
            self._make_way(verdict.dropped)
        if not verdict.admitted:
            connection.close()
        if not verdict.admitted or verdict.dropped is not None:
            self._tell_exhausted(uid)
        if verdict.admitted:
            task = asyncio.create_task(self._join(name, connection), name="localpeer join")
            self._joining[name] = task
            task.add_done_callback(lambda task: self._joined(task, name, connection))

    def _make_way(self, name: str) -> None:
        """End a connection, wherever it is between accept and its end."""
        joining = self._joining.get(name)
        if joining is not None:
            joining.cancel()
        for half in self._halves.get(name, ()):
            half.abort()

    def _tell_exhausted(self, uid: int) -> None:
        self._turned_away += 1
        now = asyncio.get_running_loop().time()
        if now - self._logged_at >= _LOG_PAUSE:  # whoever floods us does not flood the log
            _log.warning("local connections exhausted", uid=uid, count=self._turned_away)
            self._logged_at, self._turned_away = now, 0

    def _joined(self, task: asyncio.Task[None], name: str, connection: socket.socket) -> None:
        del self._joining[name]
        if task.cancelled():  # perhaps before its first step
            connection.close()
            self._forget(name)

    async def _join(self, name: str, outer: socket.socket) -> None:
        """Connect the inner side, register the name, and let the bytes flow."""
        loop = asyncio.get_running_loop()
        inner: socket.socket | None = None
        process: Peer | BrokerError | None = None
        try:
            pid = peer_of(outer).pid
            process = self._look(outer)
            early = _waiting(outer) if self._presence else 0
            inner = await self._connected(name)
            self._register(name, process)
            looked_at, process = process, None
            left, right = _Half(held_until=early), _Half()
            left.other, right.other = right, left
            right.on_lost = lambda: self._forget(name)
            # The inner side first: bytes of the outer one have somewhere to go at once.
            await loop.create_unix_connection(lambda: right, sock=inner)
            inner = None
            self._halves[name] = (left, right)
            outer = _OneSender.of(outer, pid)
            await loop.connect_accepted_socket(lambda: left, sock=outer)
            if not isinstance(looked_at, BrokerError):
                looked_at.when_ended(lambda: self.drop(name))
        except OSError as exc:
            _log.warning("local connection failed", error=str(exc))
            self._abandon(name, outer, inner, process)
        except BaseException:
            self._abandon(name, outer, inner, process)
            raise

    def _abandon(
        self,
        name: str,
        outer: socket.socket,
        inner: socket.socket | None,
        process: Peer | BrokerError | None,
    ) -> None:
        outer.close()
        if inner is not None:
            inner.close()
        if process is not None and not isinstance(process, BrokerError):
            process.close()
        for half in self._halves.get(name, ()):
            half.abort()
        self._forget(name)

    async def _connected(self, name: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.setblocking(False)
            connection.bind(f"\0{name}")
            for _ in range(_CONNECT_ATTEMPTS):
                try:
                    connection.connect(str(self._inner))
                except BlockingIOError:
                    # A full backlog: unlike TCP, a Unix connect does not go on by itself.
                    await asyncio.sleep(_CONNECT_PAUSE)
                else:
                    return connection
            raise TimeoutError("the inner server does not accept")
        except BaseException:
            connection.close()
            raise

    def _look(self, outer: socket.socket) -> Peer | BrokerError:
        try:
            return self._identify(outer)
        except BrokerError as exc:
            _log.info("local peer refused", reason=exc.reason, detail=exc.detail)
            return exc

    def _register(self, name: str, process: Peer | BrokerError) -> None:
        self._processes[name] = process
        self._on_count(len(self._processes))

    def _forget(self, name: str) -> None:
        self._admission.left(name)
        self._halves.pop(name, None)
        process = self._processes.pop(name, None)
        if process is not None:
            if not isinstance(process, BrokerError):
                process.close()
            self._on_count(len(self._processes))


class _OneSender(socket.socket):
    """A connected socket that hears one process alone: asyncio reads it through `recv`."""

    pid: int

    @classmethod
    def of(cls, connection: socket.socket, pid: int) -> _OneSender:
        """Take the connection's descriptor over.

        The listening socket has SO_PASSCRED, and so had the connection before its first byte.
        """
        heard = cls(socket.AF_UNIX, socket.SOCK_STREAM, 0, connection.detach())
        heard.setblocking(False)
        heard.pid = pid
        return heard

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        # The kernel never joins what two processes sent into one chunk.
        data, ancillary, _, _ = self.recvmsg(size, _ONE_UCRED, flags)
        if data and self._sender(ancillary) != self.pid:
            _log.warning("local connection used by another process", pid=self.pid)
            raise ConnectionAbortedError("bytes of another process")
        return data

    @staticmethod
    def _sender(ancillary: list[tuple[int, int, bytes]]) -> int | None:
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == _SCM_CREDENTIALS:
                pid: int = _UCRED.unpack(raw[: _UCRED.size])[0]
                return pid
        return None


def _waiting(connection: socket.socket) -> int:
    """How many bytes wait to be received."""
    count = array.array("i", [0])
    fcntl.ioctl(connection, termios.FIONREAD, count)
    return count[0]


class _Half(asyncio.Protocol):
    """One side of a spliced connection; writes what it reads to the other.

    Args:
        held_until: so many bytes may be old, and are passed on with the first one that is not.
    """

    def __init__(self, held_until: int = 0) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Half | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._ended = False
        self._early: list[bytes] = []
        self._held: list[bytes] = []
        self._held_until = held_until

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        other = self.other
        if other is not None and other.transport is None:
            # The other side is not there yet: read nothing until it is.
            self.transport.pause_reading()
        elif other is not None and other.transport is not None:
            for data in other._early:  # noqa: SLF001  # the two halves are one object in two parts
                self.transport.write(data)
            other._early.clear()  # noqa: SLF001  # as above
            other.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._held_until:
            self._held.append(data)
            held = b"".join(self._held)
            if len(held) <= self._held_until:
                return
            data = held
            self._held.clear()
            self._held_until = 0
        if self.other is None or self.other.transport is None:
            # Python 3.11.2 (Debian 12) reads all the same when paused in connection_made.
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        self._ended = True
        other = self.other
        if other is None or other.transport is None or other.transport.is_closing():
            return False
        if other._ended:  # noqa: SLF001  # the two halves are one object in two parts
            # Both have said their last: closing flushes what is buffered.
            other.transport.close()
            return False
        if other.transport.can_write_eof():
            other.transport.write_eof()
        return True  # Keep our own direction open.

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        other = self.other
        if other is not None and other.transport is not None:
            other.transport.close()
            # What is buffered is flushed, but not for a reader that never comes.
            asyncio.get_running_loop().call_later(_LINGER, other.abort)
        self.on_lost()

    def abort(self) -> None:
        """Close at once, dropping what is buffered."""
        if self.transport is not None:
            self.transport.abort()
