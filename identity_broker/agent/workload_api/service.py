"""The SPIFFE Workload API (SPIFFE_Workload_API.md): the standard's methods and nothing besides.

- Who calls is what the kernel says of the connection; a call says nothing about it (EP-9).
- Every message of a stream is the full state (API-3); the first is sent at once (API-4).
- The WIT profile is not supported: its calls, like any unknown one, are Unimplemented (API-17).
- On the same socket: gRPC health and reflection (EP-10), behind the same header.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, cast

import grpc

from identity_broker.agent.identity import Caller, WorkloadIdentities
from identity_broker.agent.workload_api import messages
from identity_broker.agent.workload_api.front import Callers, Front, Handler
from identity_broker.agent.workload_api.introspection import health_handlers, reflection_handlers
from identity_broker.agent.workload_api.limits import CallerLimits
from identity_broker.errors import AudienceInvalid, InvalidSpiffeId, MalformedRequest
from identity_broker.telemetry.metrics import Metrics
from identity_ca.errors import SpiffeIdError
from identity_ca.spiffe_id import SpiffeId
from identity_client._wire.workload import (
    METHODS,
    SERVICE_NAME,
    JWTBundlesRequest,
    JWTBundlesResponse,
    JWTSVIDRequest,
    JWTSVIDResponse,
    ValidateJWTSVIDRequest,
    ValidateJWTSVIDResponse,
    X509BundlesRequest,
    X509BundlesResponse,
    X509SVIDRequest,
    X509SVIDResponse,
)

MAX_REQUEST_BYTES: Final = 64 * 1024
"""Longest request; a JWT-SVID to validate has at most 16 KiB."""

_NO_SERVICES: Final[tuple[str, ...]] = ()


class WorkloadApi:
    """The service, as handlers of a gRPC server.

    Args:
        identities: what processes get.
        callers: the process behind gRPC's peer name; raises CallerUnknown.
        limits: what a process and a user may do; may be shared with other services.
        metrics: where calls are counted.
        is_serving: whether the agent can answer now, for gRPC health.
        other_services: full names of the services beside this one, for reflection and health.
    """

    def __init__(
        self,
        identities: WorkloadIdentities,
        callers: Callers,
        *,
        limits: CallerLimits | None = None,
        metrics: Metrics | None = None,
        is_serving: Callable[[], bool] = lambda: True,
        other_services: tuple[str, ...] = _NO_SERVICES,
    ) -> None:
        self._identities = identities
        self._front = Front(
            callers, limits or CallerLimits(), metrics or Metrics(), longest=MAX_REQUEST_BYTES
        )
        self._is_serving = is_serving
        self._services = (SERVICE_NAME, *other_services)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What the listener serves."""
        front = self._front
        return [
            _Methods(
                {
                    METHODS["FetchX509SVID"]: front.stream(
                        METHODS["FetchX509SVID"], X509SVIDRequest, self._fetch_x509_svid
                    ),
                    METHODS["FetchX509Bundles"]: front.stream(
                        METHODS["FetchX509Bundles"], X509BundlesRequest, self._fetch_x509_bundles
                    ),
                    METHODS["FetchJWTSVID"]: front.unary(
                        METHODS["FetchJWTSVID"], JWTSVIDRequest, self._fetch_jwt_svid
                    ),
                    METHODS["FetchJWTBundles"]: front.stream(
                        METHODS["FetchJWTBundles"], JWTBundlesRequest, self._fetch_jwt_bundles
                    ),
                    METHODS["ValidateJWTSVID"]: front.unary(
                        METHODS["ValidateJWTSVID"], ValidateJWTSVIDRequest, self._validate_jwt_svid
                    ),
                    **health_handlers(front, self._services, self._is_serving),
                    **reflection_handlers(front, self._services),
                }
            )
        ]

    @property
    def streams(self) -> int:
        """Streams being served."""
        return self._front.streams

    def end_streams(self) -> None:
        """End every stream with Unavailable; for when the agent stops."""
        self._front.end_streams()

    # --- the standard's methods ---------------------------------------------------------------

    async def _fetch_x509_svid(
        self, _request: X509SVIDRequest, caller: Caller
    ) -> AsyncIterator[X509SVIDResponse]:
        async with aclosing(cast("Any", self._identities.watch(caller))) as states:
            async for state in states:
                yield messages.x509_svids(state)

    async def _fetch_x509_bundles(
        self, _request: X509BundlesRequest, caller: Caller
    ) -> AsyncIterator[X509BundlesResponse]:
        told: X509BundlesResponse | None = None
        async with aclosing(cast("Any", self._identities.watch_bundles(caller))) as states:
            async for state in states:
                answer = messages.x509_bundles(state)
                if answer != told:
                    yield answer
                told = answer

    async def _fetch_jwt_bundles(
        self, _request: JWTBundlesRequest, caller: Caller
    ) -> AsyncIterator[JWTBundlesResponse]:
        told: JWTBundlesResponse | None = None
        async with aclosing(cast("Any", self._identities.watch_bundles(caller))) as states:
            async for state in states:
                answer = messages.jwt_bundles(state)
                if answer != told:
                    yield answer
                told = answer

    async def _fetch_jwt_svid(self, request: JWTSVIDRequest, caller: Caller) -> JWTSVIDResponse:
        if not request.audience:
            raise AudienceInvalid("a JWT-SVID needs at least one audience")
        if request.spiffe_id:
            _parsed_id(request.spiffe_id)
        found = await self._identities.jwt_svids(
            caller, list(request.audience), request.spiffe_id or None
        )
        return messages.jwt_svids(found)

    async def _validate_jwt_svid(
        self, request: ValidateJWTSVIDRequest, caller: Caller
    ) -> ValidateJWTSVIDResponse:
        if not request.audience:
            raise MalformedRequest("the audience to validate the JWT-SVID for is missing")
        if not request.svid:
            raise MalformedRequest("the JWT-SVID to validate is missing")
        return messages.validated(
            await self._identities.validate_jwt(caller, request.svid, request.audience)
        )


class _Methods(grpc.GenericRpcHandler):
    """Finds a handler by name. gRPC answers Unimplemented where there is none."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        return self._handlers.get(handler_call_details.method)


def _parsed_id(text: str) -> SpiffeId:
    try:
        return SpiffeId.parse(text)
    except SpiffeIdError as exc:
        raise InvalidSpiffeId(f"the SPIFFE ID asked for is not one: {exc.message}") from exc
