"""An SVID as files that other programs read, replaced whole.

- `DIR/svid.pem`, `key.pem` (0600), `bundle.pem` and, where there are any, `crl.pem` and `ocsp.der`
  (the OCSP answer that a server staples to its SVID); beside them what the SPIFFE Filesystem
  Delivery standard calls a credential folder: key and chain in `credential-bundle.private-key.pem`
  (0600), and `NAME.spiffe-trust-bundle.pem` per trust domain.
- All of them change in one rename: they are symbolic links through `.current`, which names the
  directory of the newest generation. No reader finds a key without its certificate, and a crash at
  any moment leaves the old generation or the new one.
- The generation before stays until `discard_old`, for a reader that is just walking the path.
- One process writes to a directory: it holds a lock on it.
- Whoever owns or may write to the directory could take the key, or lead root's hand elsewhere. So
  it must be the writer's own or root's, and nobody else's to write to; a symbolic link on the way
  to it as well. From then on everything is done by descriptors: no path is walked twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.cli.errors import DirectoryExposed, FileUnusable

if TYPE_CHECKING:
    from identity_client.credential import IdentitySnapshot

_CURRENT = ".current"
_GENERATION = ".generation-"
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS = 40


@dataclass(frozen=True, slots=True)
class SvidFile:
    """One file; `secret` ones only their owner may read."""

    content: bytes = field(repr=False)
    secret: bool = False

    @property
    def mode(self) -> int:
        """Its permission bits."""
        return 0o600 if self.secret else 0o644


def svid_files(
    snapshot: IdentitySnapshot, crls: Sequence[bytes], staple: bytes | None = None
) -> dict[str, SvidFile]:
    """The files of one moment, by name; `staple` is the OCSP answer for this SVID, DER."""
    chain = snapshot.x509.chain_pem
    anchors = set(snapshot.bundle.x509_authorities)
    below_anchors = b"".join(
        one.public_bytes(Encoding.PEM)
        for one in snapshot.svid.cert_chain
        if one not in anchors  # Filesystem Delivery, section 2.1
    )
    files = {
        "svid.pem": SvidFile(chain),
        "key.pem": SvidFile(snapshot.x509.key_pem, secret=True),
        "bundle.pem": SvidFile(snapshot.bundle.roots_pem),
        "credential-bundle.private-key.pem": SvidFile(
            snapshot.x509.key_pem + below_anchors, secret=True
        ),
    }
    for bundle in (snapshot.bundle, *snapshot.federated.values()):
        if bundle.x509_authorities:
            name = f"{bundle.trust_domain}.spiffe-trust-bundle.pem"
            files[name] = SvidFile(bundle.roots_pem)
    if crls:
        lists = (x509.load_der_x509_crl(der) for der in crls)
        files["crl.pem"] = SvidFile(b"".join(one.public_bytes(Encoding.PEM) for one in lists))
    if staple is not None:
        files["ocsp.der"] = SvidFile(staple)
    return files


class SvidFolder:
    """A directory that holds one identity's files; locked for as long as the block lasts.

    Raises:
        DirectoryExposed: another user owns it, may write to it, or leads there by a link.
        FileUnusable: it cannot be made or opened, or another process writes there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._lock = _opened(directory)
        except OSError as exc:
            raise _unusable(directory, "made", exc) from exc
        try:
            self._check()
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise FileUnusable(
                f'another process writes to "{directory}"', hint="name another --write directory"
            ) from exc
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    def replace(self, files: Mapping[str, SvidFile]) -> dict[str, str]:
        """Put `files` in place of all that were written before; return their paths by name.

        Raises:
            DirectoryExposed: the directory has become another user's to write to.
            FileUnusable: something could not be written; the files before are still in place.
        """
        try:
            self._check()
            generation = f"{_GENERATION}{secrets.token_hex(8)}"
            os.mkdir(generation, 0o700, dir_fd=self._lock)
            try:
                self._fill(generation, files)
            except BaseException:
                shutil.rmtree(generation, ignore_errors=True, dir_fd=self._lock)
                raise
            # Names that are new point nowhere until the next line, those that stay at the old.
            for name in files:
                self._link(name, f"{_CURRENT}/{name}")
            self._link(_CURRENT, generation)
            os.fsync(self._lock)
            self._drop_links(keep=files)
        except OSError as exc:
            raise _unusable(self._directory, "written to", exc) from exc
        return {name: str(self._directory / name) for name in files}

    def discard_old(self) -> None:
        """Remove the generations before: nobody reads them any more."""
        current = self._target(_CURRENT)
        for name in self._names():
            if name.startswith(_GENERATION) and name != current:
                shutil.rmtree(name, ignore_errors=True, dir_fd=self._lock)

    def _names(self) -> list[str]:
        with os.scandir(self._lock) as found:
            return [one.name for one in found]

    def _check(self) -> None:
        found = os.fstat(self._lock)
        if found.st_uid not in _trusted():
            raise DirectoryExposed(
                f'"{self._directory}" belongs to another user, uid {found.st_uid}',
                hint="run this as that user, or name a directory of your own",
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise DirectoryExposed(
                f'other users may write to "{self._directory}" '
                f"(mode {stat.S_IMODE(found.st_mode):o})",
                hint="take it from them (chmod go-w), or name a new directory, which is made for "
                "you alone",
            )

    def _fill(self, generation: str, files: Mapping[str, SvidFile]) -> None:
        directory = os.open(generation, _DIRECTORY | os.O_RDONLY, dir_fd=self._lock)
        try:
            made = os.fstat(directory)
            if made.st_uid != os.geteuid():
                raise PermissionError(None, "somebody put another directory in its place")
            for name, file in files.items():
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(name, flags, file.mode, dir_fd=directory)
                with os.fdopen(descriptor, "wb") as out:
                    os.fchmod(descriptor, file.mode)  # Whatever the umask says.
                    out.write(file.content)
                    out.flush()
                    os.fsync(descriptor)
            # Who may look is for the folder itself to say.
            os.fchmod(directory, 0o755)
            os.fsync(directory)
            named = os.stat(generation, dir_fd=self._lock, follow_symlinks=False)
            if not os.path.samestat(made, named):
                raise PermissionError(None, "somebody put another directory in its place")
        finally:
            os.close(directory)

    def _drop_links(self, *, keep: Mapping[str, SvidFile]) -> None:
        for name in self._names():
            if name not in keep and self._target(name) == f"{_CURRENT}/{name}":
                os.unlink(name, dir_fd=self._lock)

    def _link(self, name: str, target: str) -> None:
        """Make `name` a symbolic link to `target`, in one step, whatever it was."""
        if self._target(name) == target:
            return
        temporary = f".{name.lstrip('.')}.new"
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._lock)
        os.symlink(target, temporary, dir_fd=self._lock)
        os.replace(temporary, name, src_dir_fd=self._lock, dst_dir_fd=self._lock)

    def _target(self, name: str) -> str | None:
        """Where a symbolic link leads; None for what is none."""
        try:
            return os.readlink(name, dir_fd=self._lock)
        except OSError:
            return None


def _opened(path: Path) -> int:
    """A descriptor of a directory, made with mode 0700 if there is none.

    Raises:
        DirectoryExposed: a symbolic link on the way is another user's.
        OSError: the way cannot be gone.
    """
    steps = deque(path.parts)
    here = os.open(steps.popleft() if path.is_absolute() else ".", os.O_PATH | _DIRECTORY)
    links = 0
    try:
        while steps:
            step = steps.popleft()
            found = _step(here, step, 0o777 if steps else 0o700)
            try:
                seen = os.fstat(found)
                if not stat.S_ISLNK(seen.st_mode):
                    here, found = found, here
                    continue
                links += 1
                if seen.st_uid not in _trusted():
                    raise DirectoryExposed(
                        f'on the way to "{path}", "{step}" is a symbolic link of another user, '
                        f"uid {seen.st_uid}",
                        hint="name the directory that it leads to",
                    )
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = Path(os.readlink("", dir_fd=found))
                steps.extendleft(reversed(target.parts))
            finally:
                os.close(found)
            if target.is_absolute():
                start = os.open(steps.popleft(), os.O_PATH | _DIRECTORY)
                os.close(here)
                here = start
        return os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=here)
    finally:
        os.close(here)


def _step(here: int, name: str, mode: int) -> int:
    """A descriptor of what has that name, be it a link; a directory is made if there is nothing."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=here)
    except FileNotFoundError:
        with suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=here)
        return os.open(name, flags, dir_fd=here)


def _trusted() -> frozenset[int]:
    """Whose directories may be written to."""
    return frozenset({0, os.geteuid()})


def _unusable(directory: Path, what: str, error: OSError) -> FileUnusable:
    return FileUnusable(
        f'"{directory}" cannot be {what}: {(error.strerror or "unknown reason").lower()}'
    )
