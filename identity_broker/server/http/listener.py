"""Runs the HTTP application in the broker's own event loop.

- The socket is ours: port 0 works, and the bound address is known before the first request.
- Signals are the broker's, not uvicorn's.
- What strangers may take of it is bounded; see `connections`.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from identity_broker.errors import ConfigError, InvariantViolated
from identity_broker.server.http.connections import ConnectionLimits, Connections
from identity_broker.telemetry.logs import get_logger

_log = get_logger("listener")
_BACKLOG: Final = 1024
_SEND_OCTETS: Final = 128 * 1024
"""Of the kernel, for each connection: what a reader has not taken must not grow to megabytes, and
that it takes something has to show before it has taken megabytes."""
_IDLE_SECONDS: Final = 15
_HEADER_BYTES: Final = 16 * 1024


class _Server(uvicorn.Server):
    """A server that leaves the process's signal handlers alone."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none."""
        yield


class HttpListener:
    """Serves an ASGI application on "host:port"; port 0 takes a free one.

    Args:
        limits: what connections may take; of `together`, no more than half of the file descriptors
            that the process may open.
    """

    def __init__(
        self, address: str, app: ASGIApp, *, limits: ConnectionLimits | None = None
    ) -> None:
        self._wanted = address
        self._app = app
        self._limits = limits or ConnectionLimits()
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Host and port; the port bound once started."""
        if self._socket is None:
            return self._wanted
        host = self._wanted.rpartition(":")[0]
        return f"{host}:{self._socket.getsockname()[1]}"

    async def start(self) -> None:
        """Bind, listen and serve.

        Raises:
            ConfigError: the address cannot be bound.
        """
        if self._task is not None:
            raise InvariantViolated(detail="a listener starts once")
        self._socket = await _bound(self._wanted)
        limits = _within_descriptors(self._limits)
        config = uvicorn.Config(
            self._app,
            http=Connections(limits).protocol(),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            # Connections are counted by us; tasks of those that are gone may linger.
            limit_concurrency=2 * limits.together,
            timeout_keep_alive=_IDLE_SECONDS,
            h11_max_incomplete_event_size=_HEADER_BYTES,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(
            self._server.serve(sockets=[self._socket]), name="http listener"
        )
        while not self._server.started:  # uvicorn offers no event
            if self._task.done():
                await self._task
                raise InvariantViolated(detail="the HTTP server ended while starting")
            await asyncio.sleep(0.001)
        _log.info("listening", listener="http", address=self.address)

    async def stop(self, grace: timedelta) -> None:
        """Take no new connections; let running requests end within `grace`."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=grace.total_seconds() + 0.2)
        if not done:
            self._server.force_exit = True
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()


def _within_descriptors(limits: ConnectionLimits) -> ConnectionLimits:
    """Leave some to the database, to gRPC and to what the broker reads."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    return replace(limits, together=min(limits.together, max(1, soft // 2)))


async def _bound(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            # A restart must not wait for the connections of the last run to be forgotten.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_OCTETS)
            bound.bind(where)
            bound.listen(_BACKLOG)
        except BaseException:
            bound.close()
            raise
    except OSError as exc:
        raise ConfigError(
            f"the broker cannot listen on {address}: {(exc.strerror or str(exc)).lower()}",
            hint="is the address this machine's, and the port free? another broker may be running",
        ) from exc
    return bound
