"""The SPIFFE Workload API on the wire: its messages, its methods and its header.

- The only module that imports `spiffe._proto`: py-spiffe ships the standard's messages, and two
  copies of them cannot live in one process. The node agent takes them from here as well.
- Nothing is added to the standard's service (Workload API, section 2): the methods are those of
  the descriptor, and an unknown one is answered Unimplemented by gRPC itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Protocol

import grpc
import grpc.aio
from spiffe._proto.workload_pb2 import (
    DESCRIPTOR,
    X509SVID,
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
from spiffe._proto.workload_pb2 import JWTSVID as JWTSVID  # noqa: PLC0414 - published from here

__all__ = [
    "ENDPOINT_VARIABLE",
    "JWTSVID",
    "METHODS",
    "SECURITY_HEADER",
    "SECURITY_METADATA",
    "SECURITY_VALUE",
    "SERVICE_NAME",
    "X509SVID",
    "JWTBundlesRequest",
    "JWTBundlesResponse",
    "JWTSVIDRequest",
    "JWTSVIDResponse",
    "ValidateJWTSVIDRequest",
    "ValidateJWTSVIDResponse",
    "WorkloadApiServicer",
    "WorkloadApiStub",
    "X509BundlesRequest",
    "X509BundlesResponse",
    "X509SVIDRequest",
    "X509SVIDResponse",
    "workload_api_handler",
]

ENDPOINT_VARIABLE: Final = "SPIFFE_ENDPOINT_SOCKET"
"""Where a client looks for the endpoint's address when it was told none (section 4)."""

SECURITY_HEADER: Final = "workload.spiffe.io"
SECURITY_VALUE: Final = "true"
SECURITY_METADATA: Final = ((SECURITY_HEADER, SECURITY_VALUE),)
"""Metadata of every request; without it the server answers InvalidArgument (section 3)."""

SERVICE_NAME: Final[str] = DESCRIPTOR.services_by_name["SpiffeWorkloadAPI"].full_name
"""The service's name, for reflection and health: "SpiffeWorkloadAPI"."""

METHODS: Final[dict[str, str]] = {
    method.name: f"/{SERVICE_NAME}/{method.name}"
    for method in DESCRIPTOR.services_by_name["SpiffeWorkloadAPI"].methods
}
"""Full method names, by name."""

_Context = grpc.aio.ServicerContext[Any, Any]


class WorkloadApiServicer(Protocol):
    """What a server of the Workload API implements, as grpc.aio handlers."""

    def FetchX509SVID(  # noqa: N802 - the standard's name
        self, request: X509SVIDRequest, context: _Context
    ) -> AsyncIterator[X509SVIDResponse]:
        """X.509-SVIDs with keys and bundles; the full state at once and after every change."""
        ...

    def FetchX509Bundles(  # noqa: N802
        self, request: X509BundlesRequest, context: _Context
    ) -> AsyncIterator[X509BundlesResponse]:
        """X.509 bundles and CRLs; the full state at once and after every change."""
        ...

    async def FetchJWTSVID(  # noqa: N802
        self, request: JWTSVIDRequest, context: _Context
    ) -> JWTSVIDResponse:
        """JWT-SVIDs for the audiences asked for."""
        ...

    def FetchJWTBundles(  # noqa: N802
        self, request: JWTBundlesRequest, context: _Context
    ) -> AsyncIterator[JWTBundlesResponse]:
        """JWT bundles; the full state at once and after every change."""
        ...

    async def ValidateJWTSVID(  # noqa: N802
        self, request: ValidateJWTSVIDRequest, context: _Context
    ) -> ValidateJWTSVIDResponse:
        """Whether a JWT-SVID holds, and what it says."""
        ...


def workload_api_handler(servicer: WorkloadApiServicer) -> grpc.GenericRpcHandler:
    """The Workload API as `servicer` answers it, for `grpc.aio.Server.add_generic_rpc_handlers`."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "FetchX509SVID": grpc.unary_stream_rpc_method_handler(
            servicer.FetchX509SVID,
            X509SVIDRequest.FromString,
            X509SVIDResponse.SerializeToString,
        ),
        "FetchX509Bundles": grpc.unary_stream_rpc_method_handler(
            servicer.FetchX509Bundles,
            X509BundlesRequest.FromString,
            X509BundlesResponse.SerializeToString,
        ),
        "FetchJWTSVID": grpc.unary_unary_rpc_method_handler(
            servicer.FetchJWTSVID,
            JWTSVIDRequest.FromString,
            JWTSVIDResponse.SerializeToString,
        ),
        "FetchJWTBundles": grpc.unary_stream_rpc_method_handler(
            servicer.FetchJWTBundles,
            JWTBundlesRequest.FromString,
            JWTBundlesResponse.SerializeToString,
        ),
        "ValidateJWTSVID": grpc.unary_unary_rpc_method_handler(
            servicer.ValidateJWTSVID,
            ValidateJWTSVIDRequest.FromString,
            ValidateJWTSVIDResponse.SerializeToString,
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)


class WorkloadApiStub:
    """The calls of the Workload API; each wants `metadata=SECURITY_METADATA`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        def stream(name: str, answer: Callable[[bytes], Any]) -> Any:
            return channel.unary_stream(METHODS[name], _serialize, answer)

        def single(name: str, answer: Callable[[bytes], Any]) -> Any:
            return channel.unary_unary(METHODS[name], _serialize, answer)

        self.FetchX509SVID: grpc.aio.UnaryStreamMultiCallable[X509SVIDRequest, X509SVIDResponse] = (
            stream("FetchX509SVID", X509SVIDResponse.FromString)
        )
        self.FetchX509Bundles: grpc.aio.UnaryStreamMultiCallable[
            X509BundlesRequest, X509BundlesResponse
        ] = stream("FetchX509Bundles", X509BundlesResponse.FromString)
        self.FetchJWTSVID: grpc.aio.UnaryUnaryMultiCallable[JWTSVIDRequest, JWTSVIDResponse] = (
            single("FetchJWTSVID", JWTSVIDResponse.FromString)
        )
        self.FetchJWTBundles: grpc.aio.UnaryStreamMultiCallable[
            JWTBundlesRequest, JWTBundlesResponse
        ] = stream("FetchJWTBundles", JWTBundlesResponse.FromString)
        self.ValidateJWTSVID: grpc.aio.UnaryUnaryMultiCallable[
            ValidateJWTSVIDRequest, ValidateJWTSVIDResponse
        ] = single("ValidateJWTSVID", ValidateJWTSVIDResponse.FromString)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
