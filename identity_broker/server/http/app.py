"""What the broker says over plain HTTP: health, readiness, metrics, bundle. Nothing secret.

GET /healthz  the process answers             GET /metrics  Prometheus text
GET /readyz   the dependencies, one by one    GET /bundle   SPIFFE bundle (X.509 and JWT keys)
                                              GET /jwks     JWT keys alone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final, Protocol

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from identity_broker.server.http.readiness import Readiness
from identity_broker.telemetry.metrics import CONTENT_TYPE, Metrics

_NO_STORE: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


class PublishedBundle(Protocol):
    """What is shown of a trust bundle; `identity_ca.bundle.TrustBundle` is one."""

    @property
    def sequence(self) -> int: ...

    @property
    def refresh_hint(self) -> timedelta: ...

    def to_spiffe_json(self) -> bytes: ...

    def to_jwks(self) -> bytes: ...


def build_app(
    *,
    readiness: Readiness,
    metrics: Metrics,
    bundle: Callable[[], PublishedBundle],
    stopping: Callable[[], bool] = lambda: False,
    routes: Sequence[Route] = (),
) -> Starlette:
    """The application.

    Args:
        readiness: asked by /readyz.
        metrics: shown by /metrics.
        bundle: the current bundle, from memory.
        stopping: whether the broker drains; /readyz says so, for load balancers.
        routes: what other modules serve beside these, each with its own headers.
    """

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=_NO_STORE)

    async def readyz(_request: Request) -> Response:
        if stopping():
            content = {"ready": False, "stopping": True, "dependencies": {}}
            return JSONResponse(content, 503, headers=_NO_STORE)
        report = await readiness.report()
        return JSONResponse(report.to_json(), 200 if report.ready else 503, headers=_NO_STORE)

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.render(), headers={**_NO_STORE, "content-type": CONTENT_TYPE})

    async def show_bundle(request: Request) -> Response:
        current = bundle()
        return _published(request, current, "spiffe", current.to_spiffe_json)

    async def show_jwks(request: Request) -> Response:
        current = bundle()
        return _published(request, current, "jwks", current.to_jwks)

    return Starlette(
        routes=[
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
            Route("/metrics", show_metrics, methods=["GET"]),
            Route("/bundle", show_bundle, methods=["GET"]),
            Route("/jwks", show_jwks, methods=["GET"]),
            *routes,
        ],
        # Strangers that break off, or are cut off, are no bug and none of the log's business.
        exception_handlers={ClientDisconnect: _gone},
    )


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=408, headers={"connection": "close"})


def _published(
    request: Request, bundle: PublishedBundle, format: str, content: Callable[[], bytes]
) -> Response:
    """A bundle document, with the caching its refresh hint asks for (SPIFFE bundle, 4.1.3)."""
    headers = {
        "etag": f'"{format}-{bundle.sequence}"',
        "cache-control": f"public, max-age={int(bundle.refresh_hint.total_seconds())}",
        "x-content-type-options": "nosniff",
    }
    asked = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
    if headers["etag"] in asked:
        return Response(status_code=304, headers=headers)
    return Response(content(), media_type="application/json", headers=headers)
