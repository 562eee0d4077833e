"""Signing keys in files: one PKCS #8 PEM file a key, mode 0600, in a directory of mode 0700.

- A key file appears complete and on disk, or not at all: written beside, synced, renamed, and the
  directory synced.
- A file that others could have read or written is refused, not repaired: the key in it may be
  known already. So is a symbolic link, whoever owns it.
- No key material in messages; no key id reaches the file system before it was checked.
- Nothing is deleted here: a key that signed something stays until the operator removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from identity_ca.backends.private_file import (
    check_private,
    read_private_file,
    storage_failed,
    write_private_file,
)
from identity_ca.errors import BackendMisconfigured, KeyNotFound, KeyTooWeak
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, SigningKey, generate_private_key

__all__ = ["FileKeyManager"]

_PURPOSES: Final = ("x509", "jwt")
_KEY_ID: Final = re.compile(r"file:((?:x509|jwt)-[0-9a-f]{28})@1", re.ASCII)


class FileKeyManager:
    """A `KeyManager` that keeps its keys in one directory of its own.

    The directory is made on first use. Several processes may share it. Safe to use from several
    threads.

    Args:
        directory: where the key files are; only its last component is created.
    """

    name: Final = "file"

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory: Final = Path(directory)

    def create(self, purpose: str, algorithm: KeyAlgorithm) -> SigningKey:
        """A new key, on disk before this returns.

        Raises:
            BackendMisconfigured: the purpose is neither `x509` nor `jwt`, or the directory is not
                private to this user.
            BackendUnavailable: the disk is full or fails.
        """
        if purpose not in _PURPOSES:
            raise BackendMisconfigured("a signing key is for x509 or for jwt")
        # Time first, so that a listing is in the order of creation.
        name = f"{purpose}-{int(time.time() * 1000):012x}{secrets.token_hex(8)}"
        private_key = generate_private_key(algorithm)
        pem = private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            with contextlib.suppress(FileExistsError):
                self._directory.mkdir(mode=0o700)
            self._check_directory()
            write_private_file(self._directory / f"{name}.pem", pem)
        except OSError as exc:
            raise storage_failed(exc, self._directory) from exc
        return LocalSigningKey(f"file:{name}@1", private_key)

    def load(self, key_id: str) -> SigningKey:
        """The key of that id.

        Raises:
            KeyNotFound: no such file, or not an id of this key manager.
            BackendMisconfigured: the file or directory is not private to this user, is a symbolic
                link, or holds no usable key.
            BackendUnavailable: the disk fails.
        """
        match = _KEY_ID.fullmatch(key_id)
        if match is None:
            raise _no_such_key(key_id)
        path = self._directory / f"{match[1]}.pem"
        try:
            self._check_directory()
            pem = read_private_file(path)
        except FileNotFoundError as exc:
            raise _no_such_key(key_id) from exc
        except OSError as exc:
            raise storage_failed(exc, path) from exc
        try:
            private_key = serialization.load_pem_private_key(pem, password=None)
            if not isinstance(
                private_key,
                ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
            ):
                raise KeyTooWeak("not a kind of key this library signs with")
            return LocalSigningKey(key_id, private_key)
        except (ValueError, TypeError, UnsupportedAlgorithm, KeyTooWeak) as exc:
            raise BackendMisconfigured(
                "a signing key file holds no usable private key",
                detail=str(path),
                hint="restore the file from a backup",
            ) from exc

    def check(self) -> None:
        """Returns when keys could be read and written; writes nothing.

        Raises:
            BackendMisconfigured: the directory is not private to this user, or not writable.
            BackendUnavailable: the disk fails.
        """
        try:
            self._check_directory()
            if not os.access(self._directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "not writable")
        except FileNotFoundError:
            # Made by the first `create`; what has to be there is the place for it.
            if not os.access(self._directory.parent, os.W_OK | os.X_OK):
                raise BackendMisconfigured(
                    "the key directory does not exist and cannot be made",
                    detail=str(self._directory),
                    hint="make it with: install -d -m 0700 DIRECTORY",
                ) from None
        except OSError as exc:
            raise storage_failed(exc, self._directory) from exc

    def close(self) -> None:
        """Nothing is held open."""

    def _check_directory(self) -> None:
        found = os.lstat(self._directory)
        if not stat.S_ISDIR(found.st_mode):
            raise BackendMisconfigured(
                "the key directory is not a directory, or a symbolic link to one",
                detail=str(self._directory),
            )
        check_private(found, self._directory)


def _no_such_key(key_id: str) -> KeyNotFound:
    return KeyNotFound(
        "the key directory holds no such signing key",
        detail=key_id[:128],
        hint="restore the file from a backup, or prepare and activate a new authority",
    )
