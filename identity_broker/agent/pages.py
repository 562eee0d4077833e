"""Three pages over HTTP for whoever supervises the agent: /healthz, /readyz, /metrics.

- Small on purpose: one request a connection, GET and HEAD alone, no body is read, everything is
  bounded in size, time and number.
- Nothing here is secret, and nothing can be changed. Not encrypted: loopback, or behind something.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from identity_broker.agent.health import Health, HealthReport
from identity_broker.errors import ConfigError
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import CONTENT_TYPE

_log = get_logger("listener")
_HEAD_BYTES: Final = 8 * 1024
_SECONDS: Final = 5.0
_CONNECTIONS: Final = 64
_TEXT: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Page:
    """One answer."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = _TEXT


def pages(
    health: Callable[[], HealthReport], metrics: Callable[[], bytes]
) -> Mapping[str, Callable[[], Page]]:
    """The pages by their path."""

    def ready() -> Page:
        found = health()
        down = found.health is Health.DOWN
        body = {"ready": not down, "health": found.health.value, "problems": found.problems}
        return Page(
            json.dumps(body).encode() + b"\n",
            HTTPStatus.SERVICE_UNAVAILABLE if down else HTTPStatus.OK,
            "application/json",
        )

    return {
        "/healthz": lambda: Page(b"ok\n"),
        "/readyz": ready,
        "/metrics": lambda: Page(metrics(), content_type=CONTENT_TYPE),
    }


class PageListener:
    """Serves pages on "host:port"; port 0 takes a free one."""

    def __init__(self, address: str, by_path: Mapping[str, Callable[[], Page]]) -> None:
        self._wanted = address
        self._pages = by_path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        """Host and port; the port bound once started."""
        if self._server is None or not self._server.sockets:
            return self._wanted
        host = self._wanted.rpartition(":")[0]
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be bound.
        """
        host, _, port = self._wanted.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._connected, host.strip("[]"), int(port), limit=_HEAD_BYTES
            )
        except OSError as exc:
            raise ConfigError(
                f"the agent cannot listen on {self._wanted}: {(exc.strerror or str(exc)).lower()}",
                hint="is the address this machine's, and the port free?",
            ) from exc
        _log.info("listening", listener="http", address=self.address)

    async def stop(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
            for writer in tuple(self._open):
                writer.transport.abort()
            await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            # What is too long, too slow or cut off gets no answer.
            with suppress(
                TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
            ):
                async with asyncio.timeout(_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(Page(b"", HTTPStatus.BAD_REQUEST))
        method, target = words[0], words[1].partition(b"?")[0].decode("latin-1")
        if method not in (b"GET", b"HEAD"):
            return _response(Page(b"", HTTPStatus.METHOD_NOT_ALLOWED))
        page = self._pages.get(target)
        if page is None:
            return _response(Page(b"not found\n", HTTPStatus.NOT_FOUND))
        return _response(page(), with_body=method == b"GET")


def _response(page: Page, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\n"
        f"content-type: {page.content_type}\r\n"
        f"content-length: {len(page.body)}\r\n"
        "cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (page.body if with_body else b"")
