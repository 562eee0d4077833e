"""Revocation lists over HTTP, for any verifier that fetches them.

GET /crl                        every list there is, as JSON
GET /crl/AUTHORITY.crl          everything an authority revoked
GET /crl/AUTHORITY/delta.crl    what changed since a full list
GET /crl/AUTHORITY/5-of-64.crl  the part that certificates name as their distribution point

- DER with `.crl` (RFC 5280 section 4.2.1.13, RFC 2585), the same as PEM with `.pem`.
- Caches may keep a list and have to ask whether it is still the one: there is news at any moment.
- A date tells lists apart by the second, and several may be made in one: `Last-Modified` is the
  second after, and there is none before that has come.
- A long list is sent piece by piece: a reader that is slow holds a piece, not a copy. Former lists
  that some still read are kept to `MOST_READ_OCTETS`; then the oldest one's readers are cut off.
"""

from __future__ import annotations

import binascii
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any, Final, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from identity_broker.domain.clock import Clock
from identity_broker.errors import BrokerError, NotFoundError
from identity_broker.lifecycle.crl.document import ListDocument, ListKind
from identity_ca.distribution import DistributionPoints, Shard
from identity_ca.errors import ProfileViolation

_DER: Final = "application/pkix-crl"
_PEM: Final = "application/x-pem-file"
_DELTA: Final = "delta"
_NOSNIFF: Final = {"x-content-type-options": "nosniff"}
MOST_READ_OCTETS: Final = 256 * 1024 * 1024
_PIECE: Final = 48 * 1024
"""Octets; a multiple of 48, so that a piece of PEM is whole lines."""


class PublishedLists(Protocol):
    """What is published; `lifecycle.crl.lists.RevocationLists` is one."""

    @property
    def points(self) -> DistributionPoints | None: ...

    def full_lists(self) -> list[ListDocument]: ...

    async def document(
        self, authority_id: str, kind: ListKind, shard: Shard | None = None
    ) -> ListDocument: ...


def crl_routes(lists: PublishedLists, *, clock: Clock) -> list[Route]:
    """The routes, for `app.build_app`."""
    read = ListsBeingRead()

    async def index(_request: Request) -> Response:
        content = {"lists": [_described(one, lists.points) for one in lists.full_lists()]}
        return JSONResponse(content, headers={**_NOSNIFF, "cache-control": "no-cache"})

    async def full(request: Request) -> Response:
        authority_id, _, form = request.path_params["name"].rpartition(".")
        return await _answer(request, form, authority_id, ListKind.FULL)

    async def some(request: Request) -> Response:
        authority_id = request.path_params["authority_id"]
        name, _, form = request.path_params["name"].rpartition(".")
        if name == _DELTA:
            return await _answer(request, form, authority_id, ListKind.DELTA)
        try:
            shard = Shard.parse(name)
        except ProfileViolation:
            return _refused(404, "there is no such revocation list")
        return await _answer(request, form, authority_id, ListKind.SHARD, shard)

    async def _answer(
        request: Request, form: str, authority_id: str, kind: ListKind, shard: Shard | None = None
    ) -> Response:
        if form not in ("crl", "pem"):
            return _refused(404, "revocation lists end in .crl (DER) or .pem")
        try:
            document = await lists.document(authority_id, kind, shard)
        except NotFoundError as error:
            return _refused(404, error.public)
        except BrokerError as error:
            return _refused(503, error.public, retry_after=error.retry_after or 1.0)
        return _sent(request, document, form, clock.now(), read)

    return [
        Route("/crl", index, methods=["GET"]),
        Route("/crl/{name}", full, methods=["GET"]),
        Route("/crl/{authority_id}/{name}", some, methods=["GET"]),
    ]


def _sent(
    request: Request, document: ListDocument, form: str, now: datetime, read: ListsBeingRead
) -> Response:
    """The list, or that it is the one the asker has."""
    pem = form == "pem"
    headers = {
        **_NOSNIFF,
        "etag": document.etag if not pem else f'{document.etag[:-1]}-pem"',
        "expires": format_datetime(document.next_update, usegmt=True),
        "cache-control": "public, no-cache",
    }
    modified_at = document.built_at.replace(microsecond=0) + timedelta(seconds=1)
    if modified_at <= now:
        headers["last-modified"] = format_datetime(modified_at, usegmt=True)
    if _is_known(request, headers["etag"], modified_at, now):
        return Response(status_code=304, headers=headers)
    headers["content-type"] = _PEM if pem else _DER
    octets = len(document.der)
    headers["content-length"] = str(_pem_octets(octets) if pem else octets)
    if request.method == "HEAD":
        return Response(headers=headers)
    return StreamingResponse(read.pieces(document.der, pem=pem), headers=headers)


def _is_known(request: Request, etag: str, modified_at: datetime, now: datetime) -> bool:
    """Whether the asker has it; the entity tag says more than the date (RFC 9110, 13.2.2)."""
    tags = request.headers.get("if-none-match")
    if tags is not None:
        asked = {tag.strip().removeprefix("W/") for tag in tags.split(",")}
        return etag in asked or "*" in asked
    try:
        since = parsedate_to_datetime(request.headers.get("if-modified-since", ""))
    except (ValueError, OverflowError):
        return False
    if since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    # A date that is yet to come would be later than any news.
    return modified_at <= since <= now


@dataclass(slots=True, eq=False)
class _Read:
    """A list while some read it; `der` is empty when it was taken from them."""

    der: bytes
    readers: int = 0


class ListsBeingRead:
    """Shares every list among its readers, and bounds what former lists they keep in memory."""

    def __init__(self) -> None:
        # By identity, the oldest first.
        self._lists: dict[int, _Read] = {}

    @property
    def octets(self) -> int:
        """Of all lists that are being read, each once."""
        return sum(len(one.der) for one in self._lists.values())

    async def pieces(self, der: bytes, *, pem: bool) -> AsyncGenerator[bytes, None]:
        """The list piece by piece; it ends too soon when the list is taken from its readers."""
        octets, one = len(der), self._take(der)
        del der  # it is for `one` to hold, and to let go
        try:
            if pem:
                yield _BEGIN
            for at in range(0, octets, _PIECE):
                piece = one.der[at : at + _PIECE]
                if not piece:
                    return  # the announced length tells the reader that it is not whole
                yield _pem_lines(piece) if pem else piece
            if pem:
                yield _END
        finally:
            self._leave(one)

    def _take(self, der: bytes) -> _Read:
        one = self._lists.setdefault(id(der), _Read(der))
        one.readers += 1
        while len(self._lists) > 1 and self.octets > MOST_READ_OCTETS:
            oldest = next(key for key in self._lists if key != id(der))
            self._lists.pop(oldest).der = b""
        return one

    def _leave(self, one: _Read) -> None:
        one.readers -= 1
        if not one.readers and self._lists.get(id(one.der)) is one:
            del self._lists[id(one.der)]


_BEGIN: Final = b"-----BEGIN X509 CRL-----\n"
_END: Final = b"-----END X509 CRL-----\n"
_LINE: Final = 64


def _pem_lines(piece: bytes) -> bytes:
    text = binascii.b2a_base64(piece, newline=False)
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    return b"\n".join(lines) + b"\n"


def _pem_octets(octets: int) -> int:
    text = (octets + 2) // 3 * 4
    return len(_BEGIN) + text + (text + _LINE - 1) // _LINE + len(_END)


def _described(document: ListDocument, points: DistributionPoints | None) -> dict[str, Any]:
    """One authority's lists: addresses are relative where there is no public one."""
    authority_id = document.authority_id
    base = "" if points is None else points.base_url
    found: dict[str, Any] = {
        "authority_id": authority_id,
        "url": f"{base}/crl/{authority_id}.crl",
        "number": document.number,
        "this_update": _text(document.this_update),
        "next_update": _text(document.next_update),
        "entries": document.entries,
        "bytes": len(document.der),
    }
    if document.own:
        found["delta_url"] = f"{base}/crl/{authority_id}/delta.crl"
        if points is not None:
            found["shards"] = points.shards
            found["shard_url"] = f"{base}/crl/{authority_id}/{{shard}}-of-{points.shards}.crl"
    return found


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _refused(status: int, why: str, *, retry_after: float | None = None) -> Response:
    headers = {**_NOSNIFF, "cache-control": "no-store"}
    if retry_after is not None:
        headers["retry-after"] = str(max(1, round(retry_after)))
    return JSONResponse({"error": why}, status, headers=headers)
