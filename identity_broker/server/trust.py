"""The broker's bundle and server certificate, as those who need them see them.

- A new bundle goes to TLS and to the watchers at once; its file follows, atomically, and a file
  that cannot be written is tried again and keeps nobody from the bundle.
- `tls` is asked at every handshake, in gRPC's threads: it returns a snapshot made before.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from identity_broker.errors import ConfigError, InvariantViolated
from identity_broker.lifecycle.rotate import RotateServer
from identity_broker.server.rpc.listener import TlsMaterial
from identity_broker.signing import Signing
from identity_ca.bundle import TrustBundle

_PUBLIC = 0o644


class Trust:
    """Publishes bundles and hands the listeners their TLS material."""

    def __init__(self, signing: Signing, server: RotateServer, bundle_file: Path) -> None:
        self._signing = signing
        self._server = server
        self._bundle_file = bundle_file
        self._listeners: list[Callable[[TrustBundle], None]] = []
        self._published: TrustBundle | None = None
        self._written: TrustBundle | None = None
        self._tls: TlsMaterial | None = None

    def listen(self, listener: Callable[[TrustBundle], None]) -> Callable[[], None]:
        """Call `listener` with every new bundle; the returned function stops it."""
        self._listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def publish(self) -> None:
        """Hand the bundle and the certificate in force to TLS and the watchers, if they are new."""
        bundle = self._signing.bundle
        certificate = self._server.current
        if certificate is not None:
            self._tls = TlsMaterial(
                key_pem=certificate.key_pem,
                chain_pem=certificate.chain_pem,
                roots_pem=bundle.to_pem(),
            )
        if bundle != self._published:
            self._published = bundle
            for listener in tuple(self._listeners):
                listener(bundle)

    async def write_file(self) -> None:
        """Bring the bundle file up to date.

        Raises:
            ConfigError: it cannot be written; watchers have the bundle all the same.
        """
        bundle = self._published
        if bundle is None or bundle == self._written:
            return
        await asyncio.to_thread(write_public, self._bundle_file, bundle.to_pem())
        self._written = bundle

    def tls(self) -> TlsMaterial:
        """Return the key, the chain and the roots to serve with now."""
        if self._tls is None:
            raise InvariantViolated(detail="a listener was started before its certificate")
        return self._tls


def write_public(path: Path, content: bytes) -> None:
    """Replace a file that anyone may read, atomically.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), _PUBLIC)
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise ConfigError(f'"{path}" cannot be written: {error.strerror}') from error
