"""A Unix socket whose server knows which process is calling: endpoint, inner server, splice.

    door = LocalDoor(path, identify=LiveProcess.of_connection, …)
    await door.open(serve)      # serve(inner) starts the server behind it
    door.of(context.peer())     # in a call

- Knows no gRPC: what serves behind it is the caller's.
- The inner socket lies in a directory of mode 0700 beside the outer one; both go at the end.
- There are descriptors for as many connections as are let in: whoever opens too many is turned
  away, or loses what is above a fair share, and takes no descriptor from the others.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import stat
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast

from identity_broker.errors import ConfigError, InvariantViolated
from identity_broker.localpeer.endpoint import ADMIN_SOCKET, MAX_PATH_BYTES, Naming, open_endpoint
from identity_broker.localpeer.splice import DEFAULT_CONNECTIONS, Peer, Splice
from identity_broker.telemetry.logs import get_logger

_log = get_logger("localpeer")
# The two ends of ours, the server's, the pidfd and the directory under /proc.
_DESCRIPTORS_EACH: Final = 5
_DESCRIPTORS_BESIDE: Final = 1024  # for other doors, the store, clients; better than
_FEWEST_BESIDE: Final = 256
_CLOSING_SECONDS: Final = 0.1

P = TypeVar("P", bound=Peer)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may connect.

    Attributes:
        mode: of the socket.
        gid: group of the socket; None leaves it.
        directory_mode: of its directory, where that has to be made.
    """

    mode: int = 0o600
    gid: int | None = None
    directory_mode: int = 0o700


class LocalDoor(Generic[P]):
    """One Unix socket with a server behind it; opened once, closed once.

    Args:
        path: of the socket.
        identify: as for `Splice`; what it makes is what `of` returns.
        access: who may connect.
        limit: most connections at a time.
        limit_per_uid: most of one uid; None: as many as `limit`.
        presence: see `Splice`; only where the server speaks HTTP/2.
        on_count: told how many connections there are, whenever that changes.
        naming: what messages call it.
    """

    def __init__(
        self,
        path: Path,
        *,
        identify: Callable[[socket.socket], P],
        access: Access = Access(),
        limit: int = DEFAULT_CONNECTIONS,
        limit_per_uid: int | None = None,
        presence: bool = False,
        on_count: Callable[[int], object] = lambda _count: None,
        naming: Naming = ADMIN_SOCKET,
    ) -> None:
        self._path = path
        self._identify = identify
        self._access = access
        self._limit = limit
        self._limit_per_uid = limit_per_uid
        self._presence = presence
        self._on_count = on_count
        self._naming = naming
        self._inner = path.parent / f".{path.name}"
        self._splice: Splice | None = None

    @property
    def path(self) -> Path:
        """Of the socket."""
        return self._path

    @property
    def count(self) -> int:
        """Connections now."""
        return 0 if self._splice is None else self._splice.count

    def of(self, peer: str) -> P:
        """What `identify` made of the process behind the server's peer name.

        Raises:
            Unauthenticated: no live connection has that name, or its process has ended.
            BrokerError: what `identify` raised.
        """
        if self._splice is None:
            raise InvariantViolated(detail="a call arrived before the listener started")
        return cast("P", self._splice.process(peer))  # it came from `identify`

    def drop(self, peer: str) -> None:
        """End the connection with that peer name, if it is still there."""
        if self._splice is not None:
            self._splice.drop(peer)

    async def open(self, serve: Callable[[Path], Awaitable[None]]) -> None:
        """Take the socket's path, have the server started, and let callers in.

        Args:
            serve: returns once the server listens on the (inner) path it is given.

        Raises:
            ConfigError: the path is too long or occupied, or a server is live behind it.
        """
        if self._splice is not None:
            raise InvariantViolated(detail="a listener starts once")
        inner = self._inner / "s"
        if len(os.fsencode(inner)) > MAX_PATH_BYTES:
            room = MAX_PATH_BYTES - (len(os.fsencode(inner)) - len(os.fsencode(self._path)))
            raise ConfigError(
                f"{self._naming.what}'s path may have at most {room} bytes: {self._path}",
                hint=f"set {self._naming.setting} to a shorter path",
            )
        self._make_directory()
        access = self._access
        endpoint = open_endpoint(self._path, gid=access.gid, mode=access.mode, naming=self._naming)
        try:
            self._make_private_directory()
            await serve(inner)
        except BaseException:
            endpoint.close()
            raise
        limit = _room_for(self._limit)
        per_uid = self._limit if self._limit_per_uid is None else self._limit_per_uid
        self._splice = Splice(
            endpoint,
            inner,
            limit=limit,
            limit_per_uid=max(1, per_uid * limit // self._limit),
            identify=self._identify,
            presence=self._presence,
            on_count=self._on_count,
        )
        self._splice.start()

    def stop_accepting(self) -> None:
        """Take no new connections; the socket goes, those open stay."""
        if self._splice is not None:
            self._splice.stop_accepting()

    async def drain(self, stop: Callable[[float], Coroutine[Any, Any, None]], grace: float) -> None:
        """Take no new connections, stop the server behind, and close.

        Args:
            stop: the server's own, given the seconds running calls may take to end.
            grace: those seconds.
        """
        self.stop_accepting()
        stopped = asyncio.create_task(stop(grace))
        # gRPC waits for every connection, and a peer that reads nothing would keep it for ever.
        await asyncio.wait({stopped}, timeout=grace + _CLOSING_SECONDS)
        await self.close()
        await stopped

    async def close(self) -> None:
        """End every connection and remove what was made. After the server has stopped."""
        if self._splice is None:
            return
        await self._splice.close()
        shutil.rmtree(self._inner, ignore_errors=True)

    def _make_directory(self) -> None:
        directory = self._path.parent
        try:
            directory.mkdir(mode=0o700, parents=True)
            directory.chmod(self._access.directory_mode)  # whatever the umask
        except FileExistsError:
            pass
        except OSError as exc:
            raise self._cannot_make(directory, exc) from exc

    def _make_private_directory(self) -> None:
        """An empty directory that is ours alone (mode 0700)."""
        path = self._inner
        try:
            try:
                path.mkdir(mode=0o700)
            except FileExistsError as exc:
                found = path.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                    raise ConfigError(f"{path} is in the way of {self._naming.what}") from exc
                path.chmod(0o700)
                # A killed predecessor's: nobody listens, since the outer socket was free.
                (path / "s").unlink(missing_ok=True)
        except OSError as exc:
            raise self._cannot_make(path, exc) from exc

    def _cannot_make(self, path: Path, exc: OSError) -> ConfigError:
        return ConfigError(
            f"the {self._naming.server} cannot make {path}: {(exc.strerror or str(exc)).lower()}"
        )


def _room_for(connections: int) -> int:
    """Raise this process's limit of descriptors, as far as it may; how many connections fit."""
    needed = connections * _DESCRIPTORS_EACH + _DESCRIPTORS_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= needed:
        return connections
    room = max(1, (soft - _FEWEST_BESIDE) // _DESCRIPTORS_EACH)
    _log.warning("few descriptors, so fewer local connections", count=room)
    return room
