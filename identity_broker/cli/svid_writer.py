"""An SVID as files that other programs read, replaced whole.

- `DIR/svid.pem`, `key.pem` (0600), `bundle.pem` and, where there are any, `crl.pem`; beside them
  what the SPIFFE Filesystem Delivery standard calls a credential folder: key and chain in
  `credential-bundle.private-key.pem` (0600), and `NAME.spiffe-trust-bundle.pem` per trust domain.
- All of them change in one rename: they are symbolic links through `.current`, which names the
  directory of the newest generation. No reader finds a key without its certificate, and a crash at
  any moment leaves the old generation or the new one.
- The generation before stays until `discard_old`, for a reader that is just walking the path.
- One process writes to a directory: it holds a lock on it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.cli.errors import FileUnusable

if TYPE_CHECKING:
    from identity_client.credential import IdentitySnapshot

_CURRENT = ".current"
_GENERATION = ".generation-"


@dataclass(frozen=True, slots=True)
class SvidFile:
    """One file; `secret` ones only their owner may read."""

    content: bytes = field(repr=False)
    secret: bool = False

    @property
    def mode(self) -> int:
        """Its permission bits."""
        return 0o600 if self.secret else 0o644


def svid_files(snapshot: IdentitySnapshot, crls: Sequence[bytes]) -> dict[str, SvidFile]:
    """The files of one moment, by name."""
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
    return files


class SvidFolder:
    """A directory that holds one identity's files; locked for as long as the block lasts.

    Raises:
        FileUnusable: it cannot be made or opened, or another process writes there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise _unusable(directory, "made", exc) from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise FileUnusable(
                f'another process writes to "{directory}"', hint="name another --write directory"
            ) from exc

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
            FileUnusable: something could not be written; the files before are still in place.
        """
        try:
            generation = Path(tempfile.mkdtemp(prefix=_GENERATION, dir=self._directory))
            try:
                _fill(generation, files)
            except BaseException:
                shutil.rmtree(generation, ignore_errors=True)
                raise
            # Names that are new point nowhere until the next line, those that stay at the old.
            for name in files:
                _link(self._directory / name, f"{_CURRENT}/{name}")
            _link(self._directory / _CURRENT, generation.name)
            os.fsync(self._lock)
            self._drop_links(keep=files)
        except OSError as exc:
            raise _unusable(self._directory, "written to", exc) from exc
        return {name: str(self._directory / name) for name in files}

    def discard_old(self) -> None:
        """Remove the generations before: nobody reads them any more."""
        current = (self._directory / _CURRENT).readlink().name
        for path in self._directory.glob(f"{_GENERATION}*"):
            if path.name != current:
                shutil.rmtree(path, ignore_errors=True)

    def _drop_links(self, *, keep: Mapping[str, SvidFile]) -> None:
        for path in self._directory.iterdir():
            ours = path.is_symlink() and path.readlink() == Path(_CURRENT, path.name)
            if ours and path.name not in keep:
                path.unlink()


def _fill(directory: Path, files: Mapping[str, SvidFile]) -> None:
    for name, file in files.items():
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / name, flags, file.mode)
        with os.fdopen(descriptor, "wb") as out:
            os.fchmod(descriptor, file.mode)  # Whatever the umask says.
            out.write(file.content)
            out.flush()
            os.fsync(descriptor)
    # Who may look is for the folder itself to say.
    directory.chmod(0o755)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, in one step, whatever it was."""
    if path.is_symlink() and path.readlink() == Path(target):
        return
    temporary = path.with_name(f".{path.name.lstrip('.')}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)


def _unusable(directory: Path, what: str, error: OSError) -> FileUnusable:
    return FileUnusable(
        f'"{directory}" cannot be {what}: {(error.strerror or "unknown reason").lower()}'
    )
