"""Files that hold private keys: read only if nobody else could have, written all or nothing.

- Every check is made on the open file, so that nobody can swap it in between.
- A file that others could reach is refused, not repaired: its content may be known already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from identity_ca.errors import BackendMisconfigured, BackendUnavailable

__all__ = ["check_private", "read_private_file", "storage_failed", "write_private_file"]

_MAX_FILE_BYTES: Final = 64 * 1024
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_ROOT: Final = 0

# ELOOP is what O_NOFOLLOW says of a symbolic link.
_WRONG_SET_UP: Final = frozenset(
    {
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


def read_private_file(path: Path, *, mounted: bool = False) -> bytes:
    """The content of a file that no other user could read or write.

    Args:
        mounted: the file was put there by an orchestrator, as Kubernetes mounts a secret: symbolic
            links are followed, and a file of root's may be readable by our group.

    Raises:
        BackendMisconfigured: no regular file, another owner, permissions for others, or longer
            than 64 KiB.
        OSError: as the operating system says, FileNotFoundError included; ELOOP for a symbolic
            link.
    """
    # O_NONBLOCK: opening a FIFO must not hang before it can be refused.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if mounted else os.O_NOFOLLOW)
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise BackendMisconfigured("a key file is not a regular file", detail=str(path))
        check_private(found, path, mounted=mounted)
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise BackendMisconfigured("a key file is too long to be one", detail=str(path))
    return content


def check_private(found: os.stat_result, path: Path, *, mounted: bool = False) -> None:
    """Returns when a file or directory is out of other users' reach; see `read_private_file`.

    Raises:
        BackendMisconfigured: it is not.
    """
    ours = found.st_uid == os.geteuid()
    if not ours and not (mounted and found.st_uid == _ROOT):
        raise BackendMisconfigured(
            "a key file or directory belongs to another user",
            detail=f"{path} belongs to uid {found.st_uid}",
            hint="replace the key: its owner can read it",
        )
    refused = _OTHERS if ours else _OTHERS & ~stat.S_IRGRP
    if found.st_mode & refused:
        wanted = "0700" if stat.S_ISDIR(found.st_mode) else "0600"
        raise BackendMisconfigured(
            "a key file or directory can be reached by other users",
            detail=f"{path} has mode {stat.S_IMODE(found.st_mode):04o}",
            hint=f"chmod {wanted} it, and replace the key if others may have read it",
        )


def write_private_file(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 so that a crash leaves all of it or nothing of it.

    Raises:
        OSError: nothing was written under that name.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask is
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def storage_failed(exc: OSError, path: Path) -> BackendMisconfigured | BackendUnavailable:
    """What to raise for a failing disk: a wrong set-up lasts, anything else may pass."""
    detail = f"{path}: {exc.strerror or exc}"
    if exc.errno in _WRONG_SET_UP:
        return BackendMisconfigured(
            "a key file or its directory cannot be used",
            detail=detail,
            hint="files of mode 0600 in a directory of mode 0700, owned by the broker's user",
        )
    return BackendUnavailable("the disk with the signing keys does not answer", detail=detail)
