"""An application behind an Envoy, and callers before one."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Application:
    """An HTTP/1.1 server that answers with the SPIFFE ID its proxy says the caller has.

    Attributes:
        address: "host:port".
        seen: callers, by SPIFFE ID.
    """

    address: str = ""
    seen: Counter[str] = field(default_factory=Counter)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                found = re.search(r"(?im)^x-forwarded-client-cert:.*?\bURI=([^;,\s]*)", head)
                caller = found[1] if found else ""
                self.seen[caller] += 1
                body = caller.encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def application() -> AsyncIterator[Application]:
    """An application on a free port."""
    app = Application()
    server = await asyncio.start_server(app.serve, "127.0.0.1", 0)
    app.address = "{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield app
    finally:
        server.close()


async def get(
    address: str, *, tls: ssl.SSLContext | None = None, seconds: float = 10
) -> tuple[int, str]:
    """GET / on a connection of its own: status and body.

    Raises:
        OSError: there is no answer.
    """
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
        try:
            return await _exchange(reader, writer)
        except asyncio.IncompleteReadError as exc:
            raise ConnectionError("the connection ended") from exc
        finally:
            writer.close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, str]:
    writer.write(b"GET / HTTP/1.1\r\nhost: peer\r\n\r\n")
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = re.search(r"content-length: (\d+)", head)
    body = await reader.readexactly(int(length[1]) if length else 0)
    return int(head.split()[1]), body.decode()


@dataclass
class Load:
    """What became of requests that are made without a pause."""

    answers: Counter[tuple[int, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Requests so far."""
        return self.answers.total() + len(self.failures)

    async def until(self, more: int, *, seconds: float = 30) -> None:
        """Wait for that many more requests."""
        target = self.count + more
        async with asyncio.timeout(seconds):
            while self.count < target:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def load_on(address: str, *, callers: int = 4) -> AsyncIterator[Load]:
    """Callers that keep a connection each and ask again and again."""
    load = Load()

    async def call() -> None:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            while True:
                try:
                    load.answers[await _exchange(reader, writer)] += 1
                except (OSError, asyncio.IncompleteReadError) as exc:
                    load.failures.append(repr(exc))
                    writer.close()
                    reader, writer = await asyncio.open_connection(host, int(port))
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call()) for _ in range(callers)]
        try:
            yield load
        finally:
            for task in tasks:
                task.cancel()
