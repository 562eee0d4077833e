"""The agent's socket for workloads: anybody on this machine may connect, and is looked at.

- The kernel says who connected; nothing a caller sends says anything about it (EP-9).
- A Unix socket and nothing else: no TCP, so that nobody beyond this machine can try (EP-2), and
  no TLS, which no workload could verify before it has a bundle (EP-5).
- Connections, streams and message sizes are bounded before any Python runs for them.
- What nobody serves is Unimplemented; without the security header it is InvalidArgument, like
  everything else (EP-3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import grpc

from identity_broker.agent.caller import ConnectedCaller
from identity_broker.agent.rpc_status import abort_arguments
from identity_broker.agent.workload_api.front import has_security_header
from identity_broker.errors import (
    CallerUnknown,
    ConfigError,
    InvariantViolated,
    SecurityHeaderMissing,
    Unauthenticated,
)
from identity_broker.localpeer.door import Access, LocalDoor
from identity_broker.localpeer.endpoint import Naming
from identity_broker.localpeer.process import LiveProcess
from identity_broker.telemetry.logs import get_logger

_log = get_logger("listener")

MAX_MESSAGE_BYTES: Final = 512 * 1024
"""Longest request. A JWT-SVID to validate has at most 16 KiB, but Envoy names every extension it
was built with in its first one: 60 KiB, more with every release and with metadata of its own."""

CONNECTIONS: Final = 2048
CONNECTIONS_PER_USER: Final = 1024
STREAMS_PER_CONNECTION: Final = 100
WORKLOAD_API: Final = Naming(what="the Workload API", setting="agent.workload_api", server="agent")
ADMIN_SOCKET: Final = Naming(what="the admin socket", setting="agent.admin_socket", server="agent")
_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # No keepalive of ours and no end of idle connections: the kernel says when a peer is gone.
)


class Callers:
    """Knows which process is behind a connection."""

    def __init__(self, door: LocalDoor[LiveProcess]) -> None:
        self._door = door

    def of(self, peer: str) -> ConnectedCaller:
        """The process behind gRPC's peer name.

        Raises:
            CallerUnknown: it has ended, or is in a PID namespace that the agent cannot see into.
            ProcessChanged: it became another program or user while it connected.
        """
        try:
            process = self._door.of(peer)
        except Unauthenticated as exc:
            raise CallerUnknown(detail=exc.detail or exc.public) from exc
        return ConnectedCaller(process, lambda: self._door.drop(peer))


class WorkloadListener:
    """A gRPC server on a Unix socket that knows its callers.

    Args:
        path: of the socket; its directory is made (0755) if it does not exist.
        mode: of the socket.
        limit: most connections at a time.
        per_uid_limit: most connections of one user.
        on_count: told how many connections there are.
        naming: what messages call it.
        header: whether a call that nobody serves is asked for the security header.
    """

    def __init__(
        self,
        path: Path,
        *,
        mode: int = 0o666,
        limit: int = CONNECTIONS,
        per_uid_limit: int = CONNECTIONS_PER_USER,
        on_count: Callable[[int], object] = lambda _count: None,
        naming: Naming = WORKLOAD_API,
        header: bool = True,
    ) -> None:
        self._door = LocalDoor(
            path.absolute(),
            identify=LiveProcess.of_connection,
            access=Access(mode=mode, directory_mode=0o755),
            limit=limit,
            limit_per_uid=per_uid_limit,
            presence=True,
            on_count=on_count,
            naming=naming,
        )
        self._last: tuple[grpc.GenericRpcHandler, ...] = (_Unknown(),) if header else ()
        self._naming = naming
        self._server: grpc.aio.Server | None = None
        self.callers: Final = Callers(self._door)

    @property
    def address(self) -> str:
        """As in SPIFFE_ENDPOINT_SOCKET: "unix:///run/…" (EP-7)."""
        return f"unix://{self._door.path}"

    @property
    def count(self) -> int:
        """Connections now."""
        return self._door.count

    async def start(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Listen and serve.

        Raises:
            ConfigError: the path is too long or occupied, or an agent is live behind it.
        """
        if self._server is not None:
            raise InvariantViolated(detail="a listener starts once")
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((*handlers, *self._last))

        async def serve(inner: Path) -> None:
            try:
                bound = server.add_insecure_port(f"unix:{inner}")
            except RuntimeError as exc:
                raise ConfigError(f"the agent cannot listen on {inner}", detail=str(exc)) from exc
            if not bound:
                raise ConfigError(f"the agent cannot listen on {inner}")
            await server.start()

        await self._door.open(serve)
        self._server = server
        _log.info("listening", listener=self._naming.what, address=self.address)

    async def stop(self, grace: timedelta) -> None:
        """Take no new connections; let running calls end within `grace`, then cancel them."""
        if self._server is None:
            return
        await self._door.drain(self._server.stop, grace.total_seconds())


class _Unknown(grpc.GenericRpcHandler):
    """The last one asked: what nobody serves."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if has_security_header(handler_call_details.invocation_metadata):
            return None  # gRPC answers Unimplemented.
        return grpc.stream_stream_rpc_method_handler(cast("Any", _refuse_header))


async def _refuse_header(_messages: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(*abort_arguments(SecurityHeaderMissing()))
