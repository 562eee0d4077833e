"""The HTTP API of a container engine (Docker, podman) on its Unix socket: one question at a time.

- Only GET, only JSON objects, bounded: the engine is trusted, its socket may still be another's.
- Cancelling ends the connection: no thread is left waiting for an engine that hangs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from identity_broker.errors import AttestationFailed

_LONGEST_LINE: Final = 16 * 1024
_MOST_HEADERS: Final = 100
_MOST_BYTES: Final = 8 * 1024 * 1024


class Engine:
    """A container engine.

    Args:
        socket: of its API.
    """

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def owner(self) -> int | None:
        """The user whose engine it is; None: there is none."""
        try:
            return self.socket.stat().st_uid
        except OSError:
            return None

    async def get(self, target: str) -> Mapping[str, Any] | None:
        """Ask for an object; None: the engine does not know it.

        Args:
            target: path of the request, of characters that need no escape.

        Raises:
            AttestationFailed: the engine is away, refuses, or answers something else.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(self.socket, limit=_LONGEST_LINE)
        except OSError as exc:
            raise self._failed("cannot be reached", exc) from exc
        try:
            request = (
                f"GET {target} HTTP/1.1\r\nHost: localhost\r\n"
                "Accept: application/json\r\nConnection: close\r\n\r\n"
            )
            writer.write(request.encode("ascii"))
            await writer.drain()
            status, body = await _response(reader)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as exc:
            raise self._failed("does not answer as one should", exc) from exc
        finally:
            writer.transport.abort()  # all is read, or will not be
        if status == 404:
            return None
        if status != 200:
            raise self._failed(f"answers with status {status}", None)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise self._failed("does not answer with JSON", exc) from exc
        if not isinstance(answer, dict):
            raise self._failed("does not answer with an object", None)
        return answer

    def _failed(self, what: str, cause: BaseException | None) -> AttestationFailed:
        return AttestationFailed(
            f"the container engine at {self.socket} {what}",
            detail="" if cause is None else f"{type(cause).__name__}: {cause}",
        )


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    version, status, *_ = (await _line(reader)).split(" ", 2)
    if version not in {"HTTP/1.1", "HTTP/1.0"} or len(status) != 3 or not status.isdigit():
        raise ValueError("not an HTTP response")
    headers: dict[str, str] = {}
    while line := await _line(reader):
        name, colon, value = line.partition(":")
        if not colon or len(headers) >= _MOST_HEADERS:
            raise ValueError("not an HTTP header")
        headers[name.strip().lower()] = value.strip()
    return int(status), await _body(reader, headers)


async def _line(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\r\n"))[:-2].decode("latin-1")


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return await _chunks(reader)
    if "content-length" in headers:
        return await reader.readexactly(_size(headers["content-length"], 10))
    parts: list[bytes] = []
    size = 0
    while part := await reader.read(_LONGEST_LINE):
        parts.append(part)
        size += len(part)
        _size(str(size), 10)
    return b"".join(parts)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    total = 0
    while size := _size((await _line(reader)).partition(";")[0].strip(), 16):
        total += size
        _size(str(total), 10)
        parts.append(await reader.readexactly(size))
        if await reader.readexactly(2) != b"\r\n":
            raise ValueError("not a chunk")
    return b"".join(parts)


def _size(text: str, base: int) -> int:
    if not text.isalnum() or len(text) > 16 or not 0 <= (size := int(text, base)) <= _MOST_BYTES:
        raise ValueError("the response is too long")
    return size
