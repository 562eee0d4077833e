"""Where anyone may report a leaked key or token over HTTP.

POST /leaks/challenge   what a leaked key has to sign: challenge, message (base64), expires_in
POST /leaks             {"token": …} or {"public_key": PEM, "challenge": …, "signature": base64}

- Every well-formed report gets the same 202, whatever we know of the secret.
- Reports are few: each network address has a small budget, and all together a larger one.
- What is reported is dead when the answer comes; the listener need not be encrypted for that.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from identity_broker.domain.buckets import Buckets
from identity_broker.domain.clock import Clock
from identity_broker.errors import BrokerError, Kind, MalformedRequest, RateLimited
from identity_broker.lifecycle.leaks import Leaks

_MOST_OCTETS: Final = 64 * 1024
_TOGETHER: Final = 20  # times the budget of one address
_MINUTE: Final = 60.0
_HEADERS: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_STATUS: Final = {Kind.INVALID: 400, Kind.EXHAUSTED: 429, Kind.UNAVAILABLE: 503}


def leak_routes(
    leaks: Leaks,
    *,
    per_minute: int,
    clock: Clock,
    monotonic: Callable[[], float] = time.monotonic,
) -> Sequence[Route]:
    """The routes.

    Args:
        per_minute: reports of one network address that are looked at.
    """
    budget = _Budget(per_minute, monotonic)

    async def challenge(request: Request) -> Response:
        try:
            budget.spend(_address(request))
        except BrokerError as error:
            return _refused(error)
        made = leaks.challenge()
        return JSONResponse(
            {
                "challenge": made.challenge,
                "message": base64.b64encode(made.message).decode(),
                "expires_in": int((made.expires_at - clock.now()).total_seconds()),
            },
            headers=_HEADERS,
        )

    async def report(request: Request) -> Response:
        reporter = _address(request)
        try:
            budget.spend(reporter)
            fields = await _fields(request)
            if "token" in fields:
                await leaks.report_token(_text(fields, "token"), reporter)
            else:
                await leaks.report_key(
                    _text(fields, "public_key").encode(),
                    _text(fields, "challenge"),
                    _octets(fields, "signature"),
                    reporter,
                )
        except BrokerError as error:
            return _refused(error)
        return JSONResponse({"accepted": True}, 202, headers=_HEADERS)

    return (
        Route("/leaks/challenge", challenge, methods=["POST"]),
        Route("/leaks", report, methods=["POST"]),
    )


class _Budget:
    """How many reports are looked at."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self._cost = _MINUTE / per_minute
        self._monotonic = monotonic
        self._addresses: Buckets[str] = Buckets()
        self._together: Buckets[str] = Buckets(capacity=1)

    def spend(self, address: str) -> None:
        """Take one report out of the budget.

        Raises:
            RateLimited: there is none left for now.
        """
        now = self._monotonic()
        wait = self._addresses.take(address, self._cost, _MINUTE, now)
        wait = wait or self._together.take("", self._cost / _TOGETHER, _MINUTE, now)
        if wait:
            raise RateLimited("too many reports of leaks", retry_after=wait)


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


async def _fields(request: Request) -> dict[str, Any]:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_OCTETS:
            raise MalformedRequest(f"a report has at most {_MOST_OCTETS} bytes")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise MalformedRequest("a report is a JSON object", hint=_USAGE) from exc
    if not isinstance(found, dict):
        raise MalformedRequest("a report is a JSON object", hint=_USAGE)
    return found


_USAGE: Final = '{"token": …} or {"public_key": …, "challenge": …, "signature": …}'


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise MalformedRequest(f'a report needs "{name}", a string', hint=_USAGE)
    return value


def _octets(fields: dict[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(_text(fields, name), validate=True)
    except binascii.Error as exc:
        raise MalformedRequest(f'"{name}" is not base64', hint=_USAGE) from exc


def _refused(error: BrokerError) -> Response:
    headers = dict(_HEADERS)
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    return JSONResponse(
        {"accepted": False, "reason": error.reason, "message": error.public, "hint": error.hint},
        _STATUS.get(error.kind, 500),
        headers=headers,
    )
