"""A process that is never confused with another one of the same pid.

    SO_PEERPIDFD ──▶ pidfd ──▶ alive?   /proc/PID (a descriptor) ──▶ start, program, user

- The pidfd is the kernel's, taken from the connection: it names the process that called
  connect(2), whatever its pid is used for later. Without SO_PEERPIDFD (before Linux 6.5) it is
  opened by number: `pidfd_is_pinned` is False, and a process that ended between connect(2) and
  accept(2), with its pid given to another one of the same user and group, would be mistaken.
- /proc/PID is opened once, while the pidfd says that the process lives; a descriptor of it never
  shows another process.
- What was seen first must still hold at every `check`: program (device and inode), image (an exec
  moves it, even one of the same program), effective user and group.
- Nothing here waits for the file system that a program lies on: its owner may be who calls (FUSE in
  a user namespace), and would decide how long everybody waits. The program is asked about with
  AT_STATX_DONT_SYNC; `handle` opens nothing.
- What the agent may not read (another user's program, when it is not root) is None from the
  beginning and stays so; nothing is claimed about it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from identity_broker.domain.caller import LocalPeer
from identity_broker.domain.procfs import ProcessOwner, ProcessStat, parse_stat, parse_status
from identity_broker.errors import AttestationFailed, CallerUnknown, ProcessChanged
from identity_broker.localpeer.credentials import ConnectedProcess, process_of

_GONE: Final = frozenset({errno.ENOENT, errno.ESRCH})
_UNREADABLE: Final = frozenset({errno.EACCES, errno.EPERM})
_CHUNK: Final = 1 << 16
_MOST_BYTES: Final = 1 << 20  # of a file under /proc/PID: mountinfo is the longest
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_INO: Final = 0x100
_STATX_MNT_ID: Final = 0x1000  # since Linux 5.8; 0 before
_STATX_BYTES: Final = 256
_STATX_FOUND: Final = struct.Struct("=32xQ96xIIQ")  # stx_ino, stx_dev_major, _minor, stx_mnt_id
_statx: Final = ctypes.CDLL(None, use_errno=True).statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Executable:
    """The file a process runs, by what no rename changes, and where it saw it mounted."""

    device: int
    inode: int
    mount: int


@dataclass(frozen=True, slots=True)
class _Seen:
    stat: ProcessStat
    owner: ProcessOwner
    executable: Executable | None


class LiveProcess:
    """A process, held by a pidfd and a descriptor of its /proc directory: `close` it, once.

    Implements `attestors.workload.Process`.
    """

    __slots__ = (
        "_closed",
        "_closing",
        "_directory",
        "_loop",
        "_on_end",
        "_over",
        "_pidfd",
        "_pinned",
        "_seen",
        "peer",
    )

    def __init__(
        self, peer: LocalPeer, pidfd: int, directory: int, seen: _Seen, *, pinned: bool
    ) -> None:
        """Take over both descriptors; use one of the constructors below."""
        self.peer = peer
        self._pinned = pinned
        self._pidfd = pidfd
        self._directory = directory
        self._seen = seen
        self._closed = False
        self._closing = threading.Lock()  # held for what the kernel itself answers, at once
        self._over = asyncio.Event()
        self._on_end: list[Callable[[], object]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of_connection(cls, connection: socket.socket) -> Self:
        """Whoever called connect(2).

        Raises:
            CallerUnknown: it has ended, or is not visible from the agent's PID namespace.
            OSError: the connection is gone, or no descriptor is left.
        """
        return cls.of(process_of(connection))

    @classmethod
    def of(cls, connected: ConnectedProcess) -> Self:
        """The process that connected; its pidfd is taken over, also on failure.

        Raises:
            CallerUnknown, OSError: as `of_connection`.
        """
        peer = connected.peer
        if peer.pid == 0:
            connected.close()
            raise CallerUnknown(detail="its pid is 0: another PID namespace", uid=peer.uid)
        if connected.had_ended:
            raise _ended(peer.pid)
        pinned = connected.pidfd is not None
        pidfd = _open_pidfd(peer.pid) if connected.pidfd is None else connected.pidfd
        process = cls._held(peer, pidfd, pinned=pinned)
        owner = process._seen.owner  # noqa: SLF001  # our own
        if (owner.uid, owner.gid) != (peer.uid, peer.gid):
            process.close()
            if not pinned:
                raise CallerUnknown(detail="its pid is another user's by now", pid=peer.pid)
            raise ProcessChanged(detail="another user or group since it connected", pid=peer.pid)
        return process

    @classmethod
    def of_pid(cls, pid: int) -> Self:
        """The process that has that pid now; `pidfd_is_pinned` is False.

        Raises:
            CallerUnknown: there is none.
            OSError: no descriptor is left.
        """
        if pid <= 0:
            raise CallerUnknown(detail=f"{pid} is no pid")
        process = cls._held(LocalPeer(pid, 0, 0), _open_pidfd(pid), pinned=False)
        owner = process._seen.owner  # noqa: SLF001  # our own
        process.peer = LocalPeer(pid, owner.uid, owner.gid, owner.groups)
        return process

    @classmethod
    def _held(cls, peer: LocalPeer, pidfd: int, *, pinned: bool) -> Self:
        directory = -1
        try:
            try:
                directory = os.open(
                    f"/proc/{peer.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                )
            except FileNotFoundError as exc:
                raise _ended(peer.pid) from exc
            seen = _look(directory, peer.pid)
            # Last: whoever lives now held the pid all the while, so all of this was about it.
            if _has_ended(pidfd):
                raise _ended(peer.pid)
            return cls(peer, pidfd, directory, seen, pinned=pinned)
        except BaseException:
            os.close(pidfd)
            if directory >= 0:
                os.close(directory)
            raise

    def __repr__(self) -> str:
        return f"LiveProcess(pid={self.pid}, start_time={self.start_time}, uid={self.uid})"

    @property
    def pid(self) -> int:
        """As this process's PID namespace numbers it."""
        return self.peer.pid

    @property
    def uid(self) -> int:
        """Effective user when it connected."""
        return self.peer.uid

    @property
    def gid(self) -> int:
        """Effective group when it connected."""
        return self.peer.gid

    @property
    def start_time(self) -> int:
        """Clock ticks after boot."""
        return self._seen.stat.start_time

    @property
    def executable(self) -> Executable | None:
        """What it ran when it was first looked at; None: this process may not know."""
        return self._seen.executable

    @property
    def pidfd_is_pinned(self) -> bool:
        """Whether the kernel itself tied the pidfd to the connection (SO_PEERPIDFD)."""
        return self._pinned

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return not self._closed and not _has_ended(self._pidfd)

    def handle(self, name: str) -> int:
        """Return a descriptor (O_PATH) of what /proc/PID/<name> leads to; "exe": the very file.

        Opening or looking at what it names may take as long as the file system's owner likes: do
        that in a thread, and call this there as well (NFS). Safe beside `close`.

        Returns:
            A descriptor, the caller's to close.

        Raises:
            CallerUnknown: the process has ended.
            AttestationFailed: it cannot be read; mostly, this process may not.
        """
        with self._closing:
            self._must_be_open()
            directory = os.dup(self._directory)
        try:
            return os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
        except OSError as exc:
            raise self._read_failed(name, exc) from exc
        finally:
            os.close(directory)

    def read(self, name: str) -> bytes:
        """Return the content of /proc/PID/<name>.

        Raises:
            CallerUnknown, AttestationFailed: as `handle`.
        """
        try:
            with self._closing:
                self._must_be_open()
                return _read(self._directory, name)
        except OSError as exc:
            raise self._read_failed(name, exc) from exc

    def link(self, name: str) -> str:
        """Return where the symbolic link /proc/PID/<name> points; "exe", "ns/mnt".

        Raises:
            CallerUnknown, AttestationFailed: as `handle`.
        """
        try:
            with self._closing:
                self._must_be_open()
                return os.readlink(name, dir_fd=self._directory)
        except OSError as exc:
            raise self._read_failed(name, exc) from exc

    def check(self) -> None:
        """Make sure that it still runs, the same program as the same user.

        Raises:
            CallerUnknown: it has ended.
            ProcessChanged: it runs another program, or as another user.
        """
        self._must_be_open()
        now = _look(self._directory, self.pid)
        if _has_ended(self._pidfd):
            raise _ended(self.pid)
        before = self._seen
        if now.stat.start_time != before.stat.start_time:
            raise _ended(self.pid)
        if now.executable != before.executable or now.stat.image != before.stat.image:
            raise ProcessChanged(detail="it has called exec since", pid=self.pid)
        if (now.owner.uid, now.owner.gid) != (before.owner.uid, before.owner.gid):
            raise ProcessChanged(detail="another user or group since", pid=self.pid)

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call back once, in the running loop, when the process ends; not after `close`."""
        if self._over.is_set():
            asyncio.get_running_loop().call_soon(callback)
            return
        self._on_end.append(callback)
        self._listen()

    async def ended(self) -> None:
        """Return when the process has ended, or `close` was called; any number may wait."""
        self._listen()
        await self._over.wait()

    def close(self) -> None:
        """Give the descriptors back and release whoever waits in `ended`. Twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._on_end.clear()
        self._tell_ended()
        with self._closing:
            os.close(self._pidfd)
            os.close(self._directory)

    def _listen(self) -> None:
        if self._loop is None and not self._over.is_set():
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._pidfd, self._tell_ended)

    def _tell_ended(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._pidfd)
        self._over.set()
        for callback in self._on_end:
            callback()
        self._on_end.clear()

    def _must_be_open(self) -> None:
        if self._closed:
            raise CallerUnknown(detail="its connection has ended", pid=self.pid)

    def _read_failed(self, name: str, exc: OSError) -> Exception:
        if exc.errno in _GONE:
            return _ended(self.pid)
        if exc.errno in _UNREADABLE:
            return AttestationFailed(
                f"the agent may not read /proc/PID/{name} of this process",
                hint="run the agent as root, or with CAP_SYS_PTRACE",
                pid=self.pid,
            )
        return AttestationFailed(
            f"/proc/PID/{name} of this process cannot be read", detail=str(exc), pid=self.pid
        )


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as exc:
        raise _ended(pid) from exc
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # a thread's number, not a process's
            raise CallerUnknown(detail="no process has that pid", pid=pid) from exc
        raise


def _look(directory: int, pid: int) -> _Seen:
    """See who it is now.

    Raises:
        CallerUnknown: it has ended, or nothing can be read of it.
    """
    try:
        return _Seen(
            stat=parse_stat(_read(directory, "stat")),
            owner=parse_status(_read(directory, "status")),
            executable=_executable(directory),
        )
    except OSError as exc:
        if exc.errno in _GONE:
            raise _ended(pid) from exc
        if exc.errno in _UNREADABLE:
            raise CallerUnknown(
                detail="/proc/PID cannot be read; is it mounted with hidepid?", pid=pid
            ) from exc
        raise
    except ValueError as exc:
        raise CallerUnknown(detail=f"/proc/PID cannot be understood: {exc}", pid=pid) from exc


def _executable(directory: int) -> Executable | None:
    # Not os.stat: that asks the file system, FUSE's owner for one, and waits for the answer.
    # What the kernel has in memory will do, since neither number of a running program changes.
    answer = (ctypes.c_char * _STATX_BYTES)()
    if _statx(directory, b"exe", _AT_STATX_DONT_SYNC, _STATX_INO | _STATX_MNT_ID, answer):
        number = ctypes.get_errno()
        if number in _UNREADABLE:
            return None
        raise OSError(number, os.strerror(number))
    inode, major, minor, mount = _STATX_FOUND.unpack_from(answer)
    return Executable(os.makedev(major, minor), inode, mount)


def _read(directory: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        # One read at a time is one look of the kernel: status and stat fit into the first.
        chunks: list[bytes] = []
        left = _MOST_BYTES
        while left > 0 and (chunk := os.read(descriptor, min(_CHUNK, left))):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _ended(pid: int) -> CallerUnknown:
    return CallerUnknown(detail="it has ended", pid=pid)
