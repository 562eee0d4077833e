"""OCSP over HTTP (RFC 6960 appendix A), for whoever asks.

POST /ocsp           an OCSPRequest, DER, at most 64 KiB
GET  /ocsp/<base64>  the same in the path; what caches may keep says for how long (RFC 5019)

- A refusal is an OCSP answer, hence HTTP status 200; only what is no OCSP message has another.
- Caches are told to ask again at half of an answer's validity, which is when we make a new one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Sequence
from datetime import datetime
from email.utils import format_datetime
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from identity_broker.domain.clock import Clock
from identity_broker.lifecycle.ocsp import Ocsp, OcspAnswer
from identity_broker.telemetry.metrics import Metrics
from identity_ca.ocsp import MAX_REQUEST_OCTETS

_REQUEST_TYPE: Final = "application/ocsp-request"
_ANSWER_TYPE: Final = "application/ocsp-response"
_NO_STORE: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_BODY_SECONDS: Final = 10.0


def ocsp_routes(ocsp: Ocsp, *, clock: Clock, metrics: Metrics) -> Sequence[Route]:
    """The routes; `metrics.ocsp_total` counts answers."""

    async def answered(request: bytes) -> OcspAnswer:
        answer = await ocsp.answer(request)
        metrics.ocsp_total.labels(answer.outcome).inc()
        return answer

    async def post(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != _REQUEST_TYPE:
            return _refused(415, f"the content type of an OCSP request is {_REQUEST_TYPE}")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _body(request)
        except (TimeoutError, ClientDisconnect):
            return _refused(408, "the request did not come in time")
        if body is None:
            return _refused(413, f"an OCSP request has at most {MAX_REQUEST_OCTETS} octets")
        answer = await answered(body)
        return Response(answer.der, media_type=_ANSWER_TYPE, headers=_NO_STORE)

    async def get(request: Request) -> Response:
        try:
            asked = base64.b64decode(request.path_params["encoded"], validate=True)
        except (binascii.Error, ValueError):
            asked = b""  # malformed, as what it is no base64 of
        answer = await answered(asked)
        headers = _caching(answer, clock.now())
        if "etag" in headers and _is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        return Response(answer.der, media_type=_ANSWER_TYPE, headers=headers)

    return (
        Route("/ocsp", post, methods=["POST"]),
        Route("/ocsp/{encoded:path}", get, methods=["GET"]),
    )


async def _body(request: Request) -> bytes | None:
    """The body; None when it is too long."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_REQUEST_OCTETS:
            return None
    return bytes(body)


def _refused(status: int, sentence: str) -> Response:
    # What is left of the body is not read: the connection is of no more use.
    return PlainTextResponse(f"{sentence}\n", status, headers={**_NO_STORE, "connection": "close"})


def _caching(answer: OcspAnswer, now: datetime) -> dict[str, str]:
    """The headers of RFC 5019 section 6.2."""
    if answer.fresh_until is None or answer.this_update is None or answer.next_update is None:
        return _NO_STORE
    seconds = max(0, int((answer.fresh_until - now).total_seconds()))
    return {
        "cache-control": f"max-age={seconds}, public, no-transform, must-revalidate",
        "etag": f'"{hashlib.sha256(answer.der).hexdigest()[:32]}"',
        "expires": format_datetime(answer.next_update, usegmt=True),
        "last-modified": format_datetime(answer.this_update, usegmt=True),
        "x-content-type-options": "nosniff",
    }


def _is_known(request: Request, etag: str) -> bool:
    asked = request.headers.get("if-none-match", "")
    return etag in [tag.strip() for tag in asked.split(",")]
