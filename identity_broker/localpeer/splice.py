"""Passes the bytes of a Unix connection to an inner server that can then tell who connected.

    peer ──▶ outer socket (we accept; the kernel says who) ──splice──▶ inner socket (the server)

- Our end of the inner connection is bound to a random abstract name first. The server sees
  that name as its peer; `Splice.of` looks the process up by it while the connection lives.
- The inner socket lies in a directory of mode 0700: nobody else can reach the server.
- Either side's end of file is passed on (half-close); either side's loss ends both.
- A slow reader pauses its writer: no more than a transport's buffer is held for anyone.
- Connections are bounded; one too many is closed at once.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from identity_broker.domain.caller import LocalPeer
from identity_broker.errors import Unauthenticated
from identity_broker.localpeer.credentials import ConnectedProcess, process_of
from identity_broker.localpeer.endpoint import Endpoint
from identity_broker.telemetry.logs import get_logger

_log = get_logger("localpeer")
_PEER_PREFIX: Final = "unix-abstract:"
_CONNECT_ATTEMPTS: Final = 200
_CONNECT_PAUSE: Final = 0.005
_LINGER: Final = 5.0
DEFAULT_CONNECTIONS: Final = 512


class Splice:
    """Accepts on an endpoint and splices every connection to the inner server.

    Args:
        endpoint: where peers connect; owned from now on.
        inner: path of the socket the inner server listens on.
        limit: most connections at a time.
        on_count: told how many connections there are, whenever that changes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        inner: Path,
        *,
        limit: int = DEFAULT_CONNECTIONS,
        on_count: Callable[[int], object] = lambda _count: None,
    ) -> None:
        self._endpoint = endpoint
        self._inner = inner
        self._limit = limit
        self._on_count = on_count
        self._processes: dict[str, ConnectedProcess] = {}
        self._halves: dict[str, tuple[_Half, _Half]] = {}
        self._names: set[str] = set()  # of every connection from accept to its end
        self._joining: dict[asyncio.Task[None], tuple[str, socket.socket]] = {}
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = asyncio.create_task(self._accept(), name="localpeer accept")

    def of(self, peer: str) -> LocalPeer:
        """The process behind the inner server's peer name.

        Raises:
            Unauthenticated: no live connection has that name, or its process has ended.
        """
        process = self._processes.get(peer.removeprefix(_PEER_PREFIX))
        if process is None or not peer.startswith(_PEER_PREFIX):
            raise Unauthenticated(
                "the process behind this connection is not known", detail=f"peer {peer}"
            )
        if not process.is_alive:
            raise Unauthenticated(
                "the process that opened this connection has ended", detail=f"peer {peer}"
            )
        return process.peer

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
        joining = list(self._joining)
        for task in joining:
            task.cancel()
        await asyncio.gather(*joining, return_exceptions=True)
        for pair in list(self._halves.values()):
            for half in pair:
                half.abort()
        await asyncio.sleep(0)  # The transports tell their ends, and the names are forgotten.

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._endpoint.listening)
            except OSError as exc:
                # Out of descriptors, most likely: the connections we hold must go on.
                _log.error("local accept failed", error=str(exc))
                await asyncio.sleep(0.1)
                continue
            if len(self._names) >= self._limit:
                _log.warning("local connections exhausted", count=self._limit)
                connection.close()
                continue
            name = f"idb-{secrets.token_hex(16)}"
            self._names.add(name)
            task = asyncio.create_task(self._join(name, connection), name="localpeer join")
            self._joining[task] = (name, connection)
            task.add_done_callback(self._joined)

    def _joined(self, task: asyncio.Task[None]) -> None:
        name, connection = self._joining.pop(task)
        if task.cancelled():  # perhaps before its first step
            connection.close()
            self._forget(name)

    async def _join(self, name: str, outer: socket.socket) -> None:
        """Connect the inner side, register the name, and let the bytes flow."""
        loop = asyncio.get_running_loop()
        inner: socket.socket | None = None
        process: ConnectedProcess | None = None
        try:
            process = process_of(outer)
            inner = await self._connected(name)
            self._register(name, process)
            process = None
            left, right = _Half(), _Half()
            left.other, right.other = right, left
            right.on_lost = lambda: self._forget(name)
            # The inner side first: bytes of the outer one have somewhere to go at once.
            await loop.create_unix_connection(lambda: right, sock=inner)
            inner = None
            self._halves[name] = (left, right)
            await loop.connect_accepted_socket(lambda: left, sock=outer)
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
        process: ConnectedProcess | None,
    ) -> None:
        outer.close()
        if inner is not None:
            inner.close()
        if process is not None:
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

    def _register(self, name: str, process: ConnectedProcess) -> None:
        self._processes[name] = process
        self._on_count(len(self._processes))

    def _forget(self, name: str) -> None:
        self._names.discard(name)
        self._halves.pop(name, None)
        process = self._processes.pop(name, None)
        if process is not None:
            process.close()
            self._on_count(len(self._processes))


class _Half(asyncio.Protocol):
    """One side of a spliced connection; writes what it reads to the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Half | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._ended = False
        self._early: list[bytes] = []

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
