"""unix: the program a process runs, by path and by digest.

- The file is opened through /proc/PID/exe: it is the one that runs, whatever has its name by now.
- A path is vouched for only where the file lies on a mount of the agent's own, or the agent finds
  that very file under it. Anyone can make a mount namespace in which his program has a famous path.
- A file system that the agent has not mounted is never asked anything: it may be its user's own
  (FUSE), who could have it hang, or lie about the ctime. Such programs have no path and no digest.
- All of it is done in threads that are shared out among users: a file that hangs keeps its own user
  waiting, and nobody else.
- A digest is remembered by device, inode, size, mtime and ctime: a file's owner can set the mtime
  back after a change, the ctime nobody can. Of a file that changed a moment ago nothing is
  remembered.
- Neither tells programs of one user apart for certain: who runs a program can make it load his own
  code (LD_PRELOAD, ptrace). Entries need the user beside them.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from identity_broker.attestors.workload import Process
from identity_broker.attestors.workload.cgroup import Mount, parse_mountinfo
from identity_broker.attestors.workload.facts import selectors_of
from identity_broker.attestors.workload.owner import owner_of
from identity_broker.attestors.workload.patience import PatientThreads
from identity_broker.domain.selector import Selector
from identity_broker.errors import AttestationFailed

DEFAULT_MAX_BYTES: Final = 512 * 1024 * 1024
_MOST_DIGESTS: Final = 4096
_CHUNK: Final = 1 << 20
_SETTLED_NS: Final = 2_000_000_000  # a ctime is no finer than a few milliseconds
_DELETED: Final = " (deleted)"


class UnixPath:
    """path.

    Args:
        threads: where files are looked at.
    """

    name = "unix"
    keys = frozenset({"path"})

    def __init__(self, threads: PatientThreads | None = None) -> None:
        self._threads = PatientThreads("find a program") if threads is None else threads

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        path = await self._threads.run(owner_of(process).uid, lambda: _path_of(process))
        return selectors_of(self.name, () if path is None else (("path", path),))


class UnixDigest:
    """sha256.

    Args:
        digests: what is known already.
        threads: where files are read; not those of `UnixPath`, since reading takes longer.
    """

    name = "unix"
    keys = frozenset({"sha256"})

    def __init__(self, digests: ProgramDigests, threads: PatientThreads | None = None) -> None:
        self._digests = digests
        self._threads = PatientThreads("hash a program") if threads is None else threads

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        digest = await self._threads.run(owner_of(process).uid, lambda: self._digest_of(process))
        return selectors_of(self.name, () if digest is None else (("sha256", digest),))

    def _digest_of(self, process: Process) -> str | None:
        handle = process.handle("exe")
        try:
            if not _Place.of(process, handle).is_trusted:
                return None
            return self._digests.of(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True, slots=True)
class _Version:
    """A file as it was at one moment; another content has another one."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> _Version:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class ProgramDigests:
    """SHA-256 of programs, remembered. Blocks, and is to be used by several threads at once.

    Args:
        max_bytes: what is longer is not hashed.
        remembered: most digests held.
    """

    def __init__(
        self, max_bytes: int = DEFAULT_MAX_BYTES, *, remembered: int = _MOST_DIGESTS
    ) -> None:
        self._max_bytes = max_bytes
        self._most = remembered
        self._known: OrderedDict[_Version, str] = OrderedDict()
        self._lock = threading.Lock()  # of what is known; never held while a file is touched

    def of(self, handle: int) -> str:
        """Hash the file that the descriptor (O_PATH will do) names; 64 lower-case hex digits.

        Raises:
            AttestationFailed: it is no file, too long, unreadable, or changes while it is read.
        """
        try:
            found = os.fstat(handle)
            version = _Version.of(found)
            with self._lock:
                digest = self._known.get(version)
                if digest is not None:
                    self._known.move_to_end(version)
                    return digest
            self._check(found)
            descriptor = os.open(
                f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            )
            try:
                digest, settled = _digest(descriptor, version)
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise AttestationFailed("the program cannot be read", detail=str(exc)) from exc
        if settled:
            with self._lock:
                self._known[version] = digest
                while len(self._known) > self._most:
                    self._known.popitem(last=False)
        return digest

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise AttestationFailed("the program is not a regular file")
        if found.st_size > self._max_bytes:
            raise AttestationFailed(
                f"the program has {found.st_size} bytes; no more than {self._max_bytes} are hashed",
                hint="raise max_program_bytes of the unix attestor",
            )


def _digest(descriptor: int, version: _Version) -> tuple[str, bool]:
    """Hash the file; whether its version says all about its content."""
    digest = hashlib.sha256()
    left = version.size + 1
    while left > 0 and (chunk := os.read(descriptor, min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    settled = time.time_ns() - version.ctime_ns > _SETTLED_NS
    if left != 1 or _Version.of(os.fstat(descriptor)) != version:
        raise AttestationFailed("the program changes while it is read")
    return digest.hexdigest(), settled


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a program lies: found out from the kernel alone, not from the file system.

    Attributes:
        is_own: on one of the agent's mounts.
        device: of its file system, if that is mounted for the agent, too. Others were mounted by
            whoever could, in a namespace of his own: he may be who answers, when and what he likes.
        mounts: the agent's, where it is not on one of them.
    """

    is_own: bool
    device: str | None = None
    mounts: tuple[Mount, ...] = ()

    @classmethod
    def of(cls, process: Process, handle: int) -> _Place:
        """Find it; the handle is O_PATH, and keeps the mount's number from being another's.

        Raises:
            AttestationFailed: the kernel's answer cannot be understood.
        """
        try:
            number = _mount_of(handle)
            own = Path("/proc/self/mountinfo").read_bytes()
            if own.startswith(start := b"%d " % number) or b"\n" + start in own:
                return cls(is_own=True)
            mounts = parse_mountinfo(own)
            theirs = parse_mountinfo(process.read("mountinfo"))
        except (OSError, ValueError) as exc:
            raise AttestationFailed("the program's path cannot be found", detail=str(exc)) from exc
        device = next((mount.device for mount in theirs if mount.id == number), None)
        if device not in {mount.device for mount in mounts}:
            device = None
        return cls(is_own=False, device=device, mounts=mounts)

    @property
    def is_trusted(self) -> bool:
        """Whether the agent may have its file system answer."""
        return self.is_own or self.device is not None


def _path_of(process: Process) -> str | None:
    """The program's path as the agent knows it, or None. Blocks."""
    link, handle = process.link("exe"), process.handle("exe")
    try:
        place = _Place.of(process, handle)
        if place.is_own:
            # Our mount, so our path, even where the file was replaced or removed meanwhile.
            return link if _is_at(link, handle) else link.removesuffix(_DELETED)
        # Another mount namespace, such as a sandboxed service's. Look where it says, but go to no
        # other file system for it: the path may be made up to lead us to one that hangs.
        if not place.is_trusted or place.device != _device_under(link, place.mounts):
            return None
        return link if _is_at(link, handle) else None
    except OSError as exc:
        raise AttestationFailed("the program's path cannot be found", detail=str(exc)) from exc
    finally:
        os.close(handle)


def _is_at(path: str, handle: int) -> bool:
    running = os.fstat(handle)
    try:
        found = os.stat(path)  # noqa: PTH116  # as the kernel spelled it
    except (OSError, ValueError):
        return False
    return (found.st_dev, found.st_ino) == (running.st_dev, running.st_ino)


def _device_under(path: str, mounts: Sequence[Mount]) -> str | None:
    """The file system that the path leads to, going by the mounts."""
    over = [mount for mount in mounts if f"{path}/".startswith(f"{mount.point.rstrip('/')}/")]
    if not over:
        return None
    # Of several on one point the last one hides the others.
    return max(reversed(over), key=lambda mount: len(mount.point)).device


def _mount_of(descriptor: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_bytes().splitlines():
        key, _, value = line.partition(b":")
        if key == b"mnt_id":
            return int(value)
    raise ValueError("the kernel does not say on which mount the program lies")
