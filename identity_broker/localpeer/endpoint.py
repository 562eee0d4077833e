"""A Unix socket file: made with its permissions, never taken from a live owner, removed at the end.

- A left-over file is removed only when nobody listens behind it.
- The mode is set between bind(2) and listen(2), when nobody can connect yet.
- SO_PASSCRED is set before listen(2) too: whatever is ever received says who sent it.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from identity_broker.errors import ConfigError

MAX_PATH_BYTES: Final = 107  # sun_path is 108 bytes with its NUL
_BACKLOG: Final = 4096  # or net.core.somaxconn: a flood of one must not turn others away
_SO_PASSCRED: Final = 16


@dataclass(frozen=True, slots=True)
class Naming:
    """What messages call a socket: "broker", "the admin socket", "server.admin_socket"."""

    server: str
    what: str
    setting: str


ADMIN_SOCKET: Final = Naming("broker", "the admin socket", "server.admin_socket")


@dataclass(slots=True)
class Endpoint:
    """A listening socket and the file that names it."""

    path: Path
    listening: socket.socket
    inode: int

    def close(self) -> None:
        """Stop listening and remove the file, unless it is another's by now."""
        self.listening.close()
        try:
            if self.path.lstat().st_ino == self.inode:
                self.path.unlink()
        except FileNotFoundError:
            pass


def open_endpoint(
    path: Path,
    *,
    gid: int | None = None,
    mode: int = 0o600,
    naming: Naming = ADMIN_SOCKET,
) -> Endpoint:
    """Listen on `path`, with that mode and, unless None, that group; non-blocking.

    Raises:
        ConfigError: the path is too long or occupied, another process listens there, or the
            file system refuses.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"the socket path has more than {MAX_PATH_BYTES} bytes, which Unix does not allow: "
            f"{path}",
            hint=f"set {naming.setting} to a shorter path",
        )
    _remove_stale(path, naming)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, _SO_PASSCRED, 1)
        _bind(listening, path, gid, mode)
        listening.listen(_BACKLOG)
        return Endpoint(path, listening, path.lstat().st_ino)
    except OSError as exc:
        listening.close()
        raise ConfigError(
            f"the {naming.server} cannot listen on {path}: {(exc.strerror or str(exc)).lower()}",
            hint=f"may the {naming.server}'s user write to the directory?",
        ) from exc
    except BaseException:
        listening.close()
        raise


def _bind(listening: socket.socket, path: Path, gid: int | None, mode: int) -> None:
    # Nobody can connect before listen(2), so there is no moment with a wider mode.
    listening.bind(str(path))
    if gid is not None:
        os.chown(path, -1, gid)
    path.chmod(mode)


def _remove_stale(path: Path, naming: Naming) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ConfigError(
            f"the {naming.server} cannot use {path}: {(exc.strerror or str(exc)).lower()}"
        ) from exc
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} exists and is not a socket", hint="move it away, or set another path"
        )
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        path.unlink(missing_ok=True)
        return
    except BlockingIOError:
        pass  # Its backlog is full: somebody listens.
    except PermissionError:
        pass  # Somebody else's, dead or alive: not ours to remove.
    finally:
        probe.close()
    raise ConfigError(
        f"another process listens on {path}",
        hint=f"is one running already? stop it, or set another {naming.setting}",
    )
