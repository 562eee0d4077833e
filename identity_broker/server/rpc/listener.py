"""The three doors: bootstrap (TLS), mTLS, and the admin socket.

- A listener is constructed, given its handlers, started, drained; each once.
- TLS material is asked for at every handshake, so that a new certificate or a new root counts
  from the next connection on. Old connections are the pipeline's to re-check.
- The mTLS listener lets no handshake pass without a client certificate under the bundle.
- The admin socket is the file system's to guard (0600, or 0660 for one group) and the
  authenticator's to check: it is told which process, user and group connected.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import grpc

from identity_broker.domain.caller import ListenerKind, LocalPeer
from identity_broker.errors import ConfigError, InvariantViolated
from identity_broker.localpeer.credentials import process_of
from identity_broker.localpeer.door import Access, LocalDoor
from identity_broker.localpeer.splice import DEFAULT_CONNECTIONS
from identity_broker.telemetry.logs import get_logger

_log = get_logger("listener")

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
_LAST_WORDS_SECONDS: Final = 1.0  # to tell peers across a network that calls were cancelled
_SEND_BYTES: Final = 64 * 1024 * 1024  # a page of 1,000 entries at their largest
_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.so_reuseport", 0),  # two brokers on one port is a mistake until it is a feature
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _SEND_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 1024),
    # A dead peer is noticed within a minute; a pinging one may do so every ten seconds.
    ("grpc.keepalive_time_ms", 40_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # No max_connection_age: watches are meant to live as long as their connection.
)


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """One generation of the broker's certificate and of the roots of its clients, all PEM.

    `roots_pem` is not used by the bootstrap listener.
    """

    key_pem: bytes
    chain_pem: bytes
    roots_pem: bytes

    def __repr__(self) -> str:
        return "TlsMaterial(…)"


class Listener(Protocol):
    """What the composition root needs of a door."""

    @property
    def kind(self) -> ListenerKind: ...

    @property
    def address(self) -> str:
        """Where it listens, once started."""
        ...

    async def start(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None: ...

    async def stop(self, grace: timedelta) -> None: ...


class _TlsListener:
    """A TLS port; see the two subclasses."""

    kind: ListenerKind
    _asks_client: bool

    def __init__(self, address: str, *, current_tls: Callable[[], TlsMaterial]) -> None:
        """Prepare to listen on "host:port"; port 0 takes a free one.

        `current_tls` is called in gRPC's threads, at every handshake: it must return a snapshot
        and never block.
        """
        self._wanted = address
        self._current_tls = current_tls
        self._server: grpc.aio.Server | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """Host and port; the port bound once started."""
        host = self._wanted.rpartition(":")[0]
        return f"{host}:{self._port}" if self._port else self._wanted

    async def start(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Listen and serve.

        Raises:
            ConfigError: the address cannot be bound.
        """
        if self._server is not None:
            raise InvariantViolated(detail="a listener starts once")
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(tuple(handlers))
        try:
            self._port = server.add_secure_port(self._wanted, self._credentials())
        except RuntimeError as exc:
            raise _cannot_bind(self._wanted, exc) from exc
        if self._port == 0:
            raise _cannot_bind(self._wanted, None)
        self._server = server
        await server.start()
        _log.info("listening", listener=str(self.kind), address=self.address)

    async def stop(self, grace: timedelta) -> None:
        """Refuse new calls at once; let running ones end within `grace`, then cancel them.

        Takes a few seconds more than `grace` at most.
        """
        if self._server is None:
            return
        seconds = grace.total_seconds()
        stopped = asyncio.create_task(self._server.stop(seconds))
        await asyncio.wait({stopped}, timeout=seconds + _LAST_WORDS_SECONDS)
        if not stopped.done():
            # gRPC waits until every peer has taken what was written for it, and some read nothing.
            # A server that is left behind half stopped would complain for ever after.
            _end_connections(self._port)
        await asyncio.wait({stopped}, timeout=_LAST_WORDS_SECONDS)
        if stopped.done():
            await stopped
        else:
            _log.warning("listener still closing", listener=str(self.kind))

    def _credentials(self) -> grpc.ServerCredentials:
        asks_client = self._asks_client
        served = self._current_tls()

        def configuration(tls: TlsMaterial) -> Any:
            return grpc.ssl_server_certificate_configuration(
                [(tls.key_pem, tls.chain_pem)], tls.roots_pem if asks_client else None
            )

        def fetch() -> Any:
            """The configuration for the next handshake; None where nothing changed."""
            nonlocal served
            try:
                current = self._current_tls()
                if current is served or current == served:
                    return None
                changed = configuration(current)
            except Exception as exc:  # noqa: BLE001  # gRPC's thread has nobody to tell
                _log.error(
                    "tls material unavailable", error=str(exc), error_type=type(exc).__name__
                )
                return None  # The last generation goes on serving.
            served = current
            return changed

        return grpc.dynamic_ssl_server_credentials(
            configuration(served), fetch, require_client_authentication=asks_client
        )


class BootstrapListener(_TlsListener):
    """Authenticates itself, asks nobody for a certificate: attestation and bundles."""

    kind = ListenerKind.BOOTSTRAP
    _asks_client = False


class MtlsListener(_TlsListener):
    """Takes no connection without a client certificate under the bundle's roots."""

    kind = ListenerKind.MTLS
    _asks_client = True


class LocalListener:
    """The admin socket: `path`, mode 0600, or 0660 for the group `gid`.

    Args:
        path: of the socket; its directory is made (0700) if it does not exist.
        gid: group that may connect beside root and the broker's own user.
        connections: most at a time.
        on_count: told how many there are.
    """

    kind = ListenerKind.LOCAL

    def __init__(
        self,
        path: Path,
        *,
        gid: int | None = None,
        connections: int = DEFAULT_CONNECTIONS,
        on_count: Callable[[int], object] = lambda _count: None,
    ) -> None:
        self._path = path
        self._server: grpc.aio.Server | None = None
        access = Access() if gid is None else Access(mode=0o660, gid=gid)
        self._door = LocalDoor(
            path, identify=process_of, access=access, limit=connections, on_count=on_count
        )

    @property
    def address(self) -> str:
        """As gRPC clients write it: "unix:<path>"."""
        return f"unix:{self._path}"

    def of(self, peer: str) -> LocalPeer:
        """See `pipeline.LocalPeers`: pass this listener as `local_peers`."""
        return self._door.of(peer).peer

    async def start(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Listen and serve.

        Raises:
            ConfigError: the path is too long or occupied, or a broker is live behind it.
        """

        async def serve(inner: Path) -> None:
            server = grpc.aio.server(options=_OPTIONS)
            server.add_generic_rpc_handlers(tuple(handlers))
            try:
                bound = server.add_insecure_port(f"unix:{inner}")
            except RuntimeError as exc:
                raise _cannot_bind(f"unix:{inner}", exc) from exc
            if bound == 0:
                raise _cannot_bind(f"unix:{inner}", None)
            await server.start()
            self._server = server

        await self._door.open(serve)
        _log.info("listening", listener=str(self.kind), address=self.address)

    async def stop(self, grace: timedelta) -> None:
        """Take no new connections; let running calls end within `grace`, then cancel them."""
        if self._server is None:
            return
        await self._door.drain(self._server.stop, grace.total_seconds())


def _end_connections(port: int) -> None:
    """End every TCP connection that this process accepted on a port, whoever holds it."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # descriptors, not files
        with suppress(OSError), _copy_of(int(name)) as connection:
            inet = connection.family in (socket.AF_INET, socket.AF_INET6)
            if inet and connection.getsockname()[1] == port:
                connection.getpeername()  # Not the listening one, nor one that has ended.
                connection.shutdown(socket.SHUT_RDWR)


def _copy_of(descriptor: int) -> socket.socket:
    """The socket behind a descriptor, which may be closed and given to another meanwhile.

    Raises:
        OSError: it is none, or gone.
    """
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _cannot_bind(address: str, cause: Exception | None) -> ConfigError:
    return ConfigError(
        f"the broker cannot listen on {address}",
        detail="" if cause is None else str(cause),
        hint="is the address this machine's, and the port free? another broker may be running",
    )
