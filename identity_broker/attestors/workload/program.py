"""unix: the program a process runs, by path and by digest.

- The file is opened through /proc/PID/exe: it is the one that runs, whatever has its name by now.
- A path is vouched for only where the file lies on a mount of the agent's own, or the agent finds
  that very file under it. Anyone can make a mount namespace in which his program has a famous path.
- A digest is remembered by device, inode, size, mtime and ctime: a file's owner can set the mtime
  back after a change, the ctime nobody can. Of a file that changed a moment ago nothing is
  remembered.
- Neither tells programs of one user apart for certain: who runs a program can make it load his own
  code (LD_PRELOAD, ptrace). Entries need the user beside them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from identity_broker.attestors.workload import Process
from identity_broker.attestors.workload.cgroup import Mount, parse_mountinfo
from identity_broker.attestors.workload.facts import selectors_of
from identity_broker.attestors.workload.owner import owner_of
from identity_broker.domain.selector import Selector
from identity_broker.errors import AttestationFailed

DEFAULT_MAX_BYTES: Final = 512 * 1024 * 1024
_MOST_DIGESTS: Final = 4096
_AT_A_TIME: Final = 2
_MOST_OF_ONE_USER: Final = 8
_CHUNK: Final = 1 << 20
_SETTLED_NS: Final = 2_000_000_000  # a ctime is no finer than a few milliseconds
_DELETED: Final = " (deleted)"


class UnixPath:
    """path."""

    name = "unix"
    keys = frozenset({"path"})

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(_AT_A_TIME)

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        # A thread: a path may lead to a file system that takes its time.
        looking = asyncio.create_task(self._look(process), name="find a program")
        looking.add_done_callback(_seen)
        path = await asyncio.shield(looking)
        return selectors_of(self.name, () if path is None else (("path", path),))

    async def _look(self, process: Process) -> str | None:
        # Held until the thread is back, even when nobody waits any more: no more than two hang.
        async with self._turn:
            link, descriptor = process.link("exe"), process.open("exe")
            return await asyncio.to_thread(_path_here, process, link, descriptor)


class UnixDigest:
    """sha256."""

    name = "unix"
    keys = frozenset({"sha256"})

    def __init__(self, digests: ProgramDigests) -> None:
        self._digests = digests

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        uid = owner_of(process).uid
        digest = await self._digests.of(process.open("exe"), uid)
        return selectors_of(self.name, (("sha256", digest),))


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
    """SHA-256 of programs, hashed once at a time in threads, remembered.

    One user has one turn at a time, and a few waiting: whoever makes many long programs waits for
    himself.

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
        self._running: dict[_Version, asyncio.Task[str]] = {}
        self._turn = asyncio.Semaphore(_AT_A_TIME)
        self._turn_of: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._of_uid: Counter[int] = Counter()

    async def of(self, descriptor: int, uid: int) -> str:
        """Hash the file; 64 lower-case hexadecimal digits. The descriptor is taken over.

        Raises:
            AttestationFailed: it is no file, too long, or changes while it is read; or its user
                has too many others waiting.
        """
        try:
            found = os.fstat(descriptor)
            version = _Version.of(found)
            digest = self._known.get(version)
            if digest is not None:
                self._known.move_to_end(version)
            elif version not in self._running:
                self._check(found, uid)
                self._start(version, os.dup(descriptor), uid)
        finally:
            os.close(descriptor)
        if digest is not None:
            return digest
        # Whoever cannot wait leaves; the next one finds the digest.
        return await asyncio.shield(self._running[version])

    def _check(self, found: os.stat_result, uid: int) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise AttestationFailed("the program is not a regular file")
        if found.st_size > self._max_bytes:
            raise AttestationFailed(
                f"the program has {found.st_size} bytes; no more than {self._max_bytes} are hashed",
                hint="raise max_program_bytes of the unix attestor",
            )
        if self._of_uid[uid] >= _MOST_OF_ONE_USER:
            raise AttestationFailed("too many programs of this user wait to be hashed")

    def _start(self, version: _Version, descriptor: int, uid: int) -> None:
        task = asyncio.create_task(self._hash(version, descriptor, uid), name="hash a program")
        self._running[version] = task
        self._of_uid[uid] += 1

        def done(task: asyncio.Task[str]) -> None:
            del self._running[version]
            self._of_uid[uid] -= 1
            if not self._of_uid[uid]:
                del self._of_uid[uid]
            _seen(task)

        task.add_done_callback(done)

    async def _hash(self, version: _Version, descriptor: int, uid: int) -> str:
        own_turn = self._turn_of.setdefault(uid, asyncio.Lock())
        handed_over = False
        try:
            async with own_turn, self._turn:
                handed_over = True
                digest, settled = await asyncio.to_thread(_digest, descriptor, version)
        finally:
            if not handed_over:
                os.close(descriptor)
        if settled:
            self._known[version] = digest
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return digest


def _digest(descriptor: int, version: _Version) -> tuple[str, bool]:
    """Hash the file and close it; whether its version says all about its content."""
    try:
        digest = hashlib.sha256()
        left = version.size + 1
        while left > 0 and (chunk := os.read(descriptor, min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        settled = time.time_ns() - version.ctime_ns > _SETTLED_NS
        if left != 1 or _Version.of(os.fstat(descriptor)) != version:
            raise AttestationFailed("the program changes while it is read")
    except OSError as exc:
        raise AttestationFailed("the program cannot be read", detail=str(exc)) from exc
    finally:
        os.close(descriptor)
    return digest.hexdigest(), settled


def _path_here(process: Process, link: str, descriptor: int) -> str | None:
    """The program's path as the agent knows it, or None; the descriptor is closed."""
    try:
        running = os.fstat(descriptor)
        number = _mount_of(descriptor)
        own = Path("/proc/self/mountinfo").read_bytes()
        if own.startswith(start := b"%d " % number) or b"\n" + start in own:
            # Our mount, so our path, even where the file was replaced or removed meanwhile.
            return link if _is_at(link, running) else link.removesuffix(_DELETED)
        # Another mount namespace, such as a sandboxed service's. Look where it says, but go to no
        # other file system for it: the path may be made up to lead us to one that hangs.
        theirs = parse_mountinfo(process.read("mountinfo"))
        device = next((mount.device for mount in theirs if mount.id == number), None)
        if device is None or device != _device_under(link, parse_mountinfo(own)):
            return None
        return link if _is_at(link, running) else None
    except (OSError, ValueError) as exc:
        raise AttestationFailed("the program's path cannot be found", detail=str(exc)) from exc
    finally:
        os.close(descriptor)


def _is_at(path: str, running: os.stat_result) -> bool:
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


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # perhaps nobody waits for it any more
