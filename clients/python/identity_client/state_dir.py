"""The node's key and SVID on disk, so that a restart needs no new join token.

- The directory is ours alone (0700, our user) and so is every file in it (0600): anything more
  open is refused and never repaired silently, because the key may have been read already.
- One file holds key, chain and bundle, and is replaced atomically: never a torn pair.
- One source at a time uses a directory (flock; a forked child does not inherit the claim).
- The join token is never written.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import stat
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from identity_client.errors import SettingsInvalid

__all__ = ["NodeState", "StateDir", "read_private", "write_private"]

_FILE = "node.json"
_LOCK = "lock"
_VERSION = 1
_OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class NodeState:
    """What is kept of a node.

    Attributes:
        trust_domain: name, without scheme.
        key_pem: the node's private key; secret.
        chain: DER, leaf first.
        bundle: serialized TrustBundle message, the newest this node has seen.
        reattestable: whether the broker lets the node attest again.
    """

    trust_domain: str
    key_pem: bytes = field(repr=False)
    chain: tuple[bytes, ...] = field(repr=False)
    bundle: bytes = field(repr=False)
    reattestable: bool


class StateDir:
    """An open state directory. Its methods block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_if_open(path, "700")
            self._lock: int | None = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise _unusable(path, exc) from exc
        _claims.add(self)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self.close()
            raise SettingsInvalid(
                f'the state directory "{path}" is in use by another identity source',
                reason="STATE_DIR_IN_USE",
                hint="give each process a state directory of its own",
            ) from exc

    def __repr__(self) -> str:
        return f"StateDir({str(self._path)!r})"

    def load(self) -> NodeState | None:
        """What was kept; None in a new directory.

        Raises:
            SettingsInvalid: the file is open to others, or damaged.
        """
        path = self._path / _FILE
        try:
            _refuse_if_open(path, "600")
            text = path.read_text("ascii")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as exc:
            raise _unusable(path, exc) from exc
        try:
            return _decode(json.loads(text))
        except (ValueError, KeyError, TypeError):
            # "from None": the parser's message could quote the file, and the file holds a key.
            raise self.damaged() from None

    def save(self, state: NodeState) -> None:
        """Replaces what was kept; durable when it returns.

        Raises:
            SettingsInvalid: the directory cannot be written.
        """
        write_private(self._path / _FILE, json.dumps(_encode(state)))

    def damaged(self) -> SettingsInvalid:
        """The error for a state file that cannot be read; says nothing of its content."""
        path = self._path / _FILE
        return SettingsInvalid(
            f'the state file "{path}" is damaged',
            reason="STATE_DAMAGED",
            hint=f'attest again with a new token after: rm "{path}"',
        )

    def close(self) -> None:
        """Lets another source use the directory."""
        _claims.discard(self)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_private(path: Path, *, most: int) -> str | None:
    """The text of a file that is ours alone; None where there is none. Blocks.

    Args:
        path: the file, ASCII.
        most: octets it may have.

    Raises:
        SettingsInvalid: it is open to others, too large, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _unusable(path, exc) from exc
    with os.fdopen(descriptor, encoding="ascii") as file:
        _refuse_if_open(path, "600")
        try:
            text = file.read(most + 1)
        except (OSError, UnicodeDecodeError) as exc:
            raise _unusable(path, exc) from exc
    if len(text) > most:
        raise SettingsInvalid(f'the state "{path}" is too large', reason="STATE_UNUSABLE")
    return text


def write_private(path: Path, text: str) -> None:
    """Replaces a file of ours, 0600; durable when it returns. Blocks.

    Raises:
        SettingsInvalid: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_directory(path.parent)
    except OSError as exc:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise _unusable(path, exc) from exc


_claims: weakref.WeakSet[StateDir] = weakref.WeakSet()


def _drop_claims_in_child() -> None:
    # flock belongs to the open file, which fork shares: without this the child would keep the
    # parent's claim alive after the parent has ended.
    for claim in list(_claims):
        claim.close()


os.register_at_fork(after_in_child=_drop_claims_in_child)


def _refuse_if_open(path: Path, mode: str) -> None:
    found = path.stat(follow_symlinks=False)
    if found.st_uid != os.geteuid():
        raise SettingsInvalid(
            f'"{path}" belongs to another user', reason="STATE_DIR_UNSAFE", hint="choose another"
        )
    if stat.S_ISLNK(found.st_mode) or found.st_mode & _OPEN_TO_OTHERS:
        raise SettingsInvalid(
            f'"{path}" is open to other users, so its key may be known to them',
            reason="STATE_DIR_UNSAFE",
            hint=f'if you are sure it is not: chmod {mode} "{path}"',
        )


def _unusable(path: Path, exc: Exception) -> SettingsInvalid:
    why = getattr(exc, "strerror", None) or type(exc).__name__
    return SettingsInvalid(f'the state "{path}" cannot be used: {why}', reason="STATE_UNUSABLE")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(state: NodeState) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "trust_domain": state.trust_domain,
        "key": state.key_pem.decode("ascii"),
        "chain": [base64.b64encode(der).decode("ascii") for der in state.chain],
        "bundle": base64.b64encode(state.bundle).decode("ascii"),
        "reattestable": state.reattestable,
    }


def _decode(document: Any) -> NodeState:
    if document["version"] != _VERSION:
        raise ValueError("unknown version")
    return NodeState(
        trust_domain=str(document["trust_domain"]),
        key_pem=document["key"].encode("ascii"),
        chain=tuple(base64.b64decode(text, validate=True) for text in document["chain"]),
        bundle=base64.b64decode(document["bundle"], validate=True),
        reattestable=bool(document["reattestable"]),
    )
